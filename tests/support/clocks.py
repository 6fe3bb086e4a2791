"""The time that tests set, and the round that they mine."""

from __future__ import annotations

from pocd.clock import Clock
from pocd.protocol.proof import Round

NOW = 1_700_000_000.0
ROUND = Round("AB", 10, "miner", 1.4, "poc2", "tiny", 16)
NEXT = Round("CD", 20, "miner", 1.4, "poc2", "tiny", 16)


class ManualClock(Clock):
    """A clock that stands still until the test moves it, or goes on by `tick` whenever it is read.

    Attributes:
        now: Wall time; to set it alone is to set the wall clock.
        elapsed: Monotonic time.
        tick: Seconds.
    """

    def __init__(self, now: float = NOW, elapsed: float = 100.0) -> None:
        super().__init__(wall=self._read_wall, monotonic=self._read_monotonic)
        self.now = now
        self.elapsed = elapsed
        self.tick = 0.0

    def advance(self, seconds: float) -> None:
        """Let time go on, by both clocks."""
        self.now += seconds
        self.elapsed += seconds

    def _read_wall(self) -> float:
        self.advance(self.tick)
        return self.now

    def _read_monotonic(self) -> float:
        self.advance(self.tick)
        return self.elapsed
