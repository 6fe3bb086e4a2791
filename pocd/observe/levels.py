"""How something that is well or not becomes few lines of log, also when it flaps."""

from __future__ import annotations

from typing import Literal

CALM = 60.0
"""Seconds; what gets worse again sooner than this after it got better flaps."""


class Level:
    """A state that is told when it gets worse, and when it gets better.

    Both are told at once, until it flaps; then it is told as better when it was well for `CALM` seconds on end.

    Attributes:
        times: How often it got worse since it was last told as better.
    """

    def __init__(self) -> None:
        self.times = 0
        self._bad = False
        self._told_bad = False
        self._flaps = False
        self._well_since = float("-inf")

    def look(self, now: float, *, bad: bool) -> Literal["worse", "better"] | None:
        """Note the state, and return what has to be told now.

        Args:
            now: Monotonic time in seconds.
            bad: Whether the state is bad.
        """
        worse, better = bad and not self._bad, self._bad and not bad
        self._bad = bad
        if better:
            self._well_since = now
        if worse:
            self.times = self.times + 1 if self._told_bad else 1
            self._flaps = now - self._well_since < CALM
        if bad and not self._told_bad:
            self._told_bad = True
            return "worse"
        if not bad and self._told_bad and (not self._flaps or now - self._well_since >= CALM):
            self._told_bad = False
            return "better"
        return None
