"""The one place where the daemon reads time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

JUMP_SECONDS = 1.0  # less is the clock being steered, not set


@dataclass(frozen=True)
class Clock:
    """Two clocks, in seconds.

    Attributes:
        wall: Seconds since the epoch, for what is stored and sent. The clock may be set at any moment.
        monotonic: Seconds from an unknown start, never set back, for waits and rates.
    """

    wall: Callable[[], float]
    monotonic: Callable[[], float]


SYSTEM = Clock(wall=time.time, monotonic=time.monotonic)


class JumpDetector:
    """Tells how far the wall clock was set since the last look."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset = clock.wall() - clock.monotonic()

    def jump(self) -> float:
        """Return the seconds that the wall clock was set forward (or, negative, back); 0 where it was not."""
        offset = self._clock.wall() - self._clock.monotonic()
        jump, self._offset = offset - self._offset, offset
        return jump if abs(jump) > JUMP_SECONDS else 0.0
