"""How many per second, over the last minute and the last quarter of an hour."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST = 900  # seconds kept


class RateWindow:
    """Counts events in buckets of one second and keeps a quarter of an hour of them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = clock()
        self._buckets: deque[tuple[int, int]] = deque(maxlen=LONGEST)

    def add(self, count: int) -> None:
        """Count `count` events now."""
        second = int(self._clock())
        if self._buckets and self._buckets[-1][0] == second:
            count += self._buckets.pop()[1]
        self._buckets.append((second, count))

    def per_second(self, seconds: float) -> float:
        """Events per second over the last `seconds` (at most 900), or since the start if that is shorter."""
        now = self._clock()
        span = max(1.0, min(seconds, now - self._started))  # in the first second a rate means nothing
        return sum(count for second, count in self._buckets if second > now - seconds) / span
