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


class SteadyClock(Clock):
    """A wall clock that goes on as time really passes, and follows one that was set when it is told to.

    So ages and waits that are measured by it are never longer or shorter than what passed: whoever keeps its times
    elsewhere moves them by the jump, in the same step as `follow`.

    Args:
        source: Clock that may be set at any moment.
    """

    def __init__(self, source: Clock) -> None:
        super().__init__(wall=lambda: source.monotonic() + self._offset, monotonic=source.monotonic)
        self._source = source
        self._offset = source.wall() - source.monotonic()

    def follow(self) -> float:
        """Go by the source's wall clock from now on.

        Returns:
            The seconds that it was set forward (or, negative, back) since the last time; 0 where it was not.
        """
        offset = self._source.wall() - self._source.monotonic()
        jump, self._offset = offset - self._offset, offset
        return jump if abs(jump) > JUMP_SECONDS else 0.0
