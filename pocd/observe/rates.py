"""Rates per second, over the last minute and the last quarter of an hour."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocd.clock import Clock

LONGEST = 900  # seconds kept


class RateWindow:
    """Counts events by the second, over a quarter of an hour; adding and reading take constant or logarithmic time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started = clock.monotonic()
        self._seconds: list[int] = []  # in which there were events, ascending
        self._totals: list[int] = []  # events until the end of each of them
        self._before = 0  # events before the first

    def add(self, count: int) -> None:
        """Count `count` events now."""
        second = int(self._clock.monotonic())
        if not self._seconds or self._seconds[-1] != second:
            self._seconds.append(second)
            self._totals.append(self._totals[-1] if self._totals else self._before)
        self._totals[-1] += count
        if len(self._seconds) == 2 * LONGEST:  # now and then, as to drop the first of a list moves all others
            self._before = self._totals[LONGEST - 1]
            del self._seconds[:LONGEST], self._totals[:LONGEST]

    def per_second(self, seconds: float) -> float:
        """Return events per second over the last `seconds` (at most 900), or since the start if that is shorter."""
        now = self._clock.monotonic()
        span = max(1.0, min(seconds, now - self._started))  # in the first second a rate means nothing
        earlier = bisect_right(self._seconds, now - seconds)
        until = self._totals[earlier - 1] if earlier else self._before
        return ((self._totals[-1] if self._totals else 0) - until) / span
