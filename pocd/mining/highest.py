"""The highest head ever seen, which is the height that counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocd.observe.levels import Level
from pocd.store.outbox import Outbox

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from pocd.chain.source import Head
    from pocd.clock import Clock
    from pocd.protocol.proof import Round
    from pocd.store.thread import OutboxThread


class Highest:
    """The highest head ever seen, which the store remembers, until it is proven a lie.

    A node that lags behind it, or a restart, begins no round that is over and ends none that runs.

    Args:
        outbox: Store of the highest head.
        clock: Paces the log.
        log: Gets a line when the head goes back, and when it is no longer back.

    Attributes:
        height: Height of the head; 0 before the first one.
    """

    def __init__(self, outbox: OutboxThread, *, clock: Clock, log: FilteringBoundLogger) -> None:
        self._outbox = outbox
        self._clock = clock
        self._log = log
        self._went_back = Level()
        known = outbox.view.chain
        self.height = known.height if known else 0

    def note(self, looked_at: Head, mined: Round | None) -> None:
        """Raise the height to that of a head, or correct it; `mined` is the round that runs, for the log."""
        head = looked_at.block
        if looked_at.corrects:
            self._log.warning(
                "the highest head was a lie", action="head_corrected", height=head.height, highest=self.height
            )
            self.height = head.height
        turn = self._went_back.look(self._clock.monotonic(), bad=head.height < self.height)
        if turn == "worse":
            self._log.warning(
                "head went back",
                action="head_back",
                height=head.height,
                highest=self.height,
                round=mined.block_height if mined else None,
            )
        elif turn == "better":
            self._log.info(
                "head is where it was again", action="head_well", height=head.height, times=self._went_back.times
            )
        self.height = max(self.height, head.height)

    async def remember(self, chain_id: str) -> None:
        """Store the height where it has changed.

        Raises:
            StoreUnavailableError: The store cannot remember it now.
        """
        known = self._outbox.view.chain
        if known is None or known.height != self.height:
            await self._outbox(Outbox.remember_head, chain_id, self.height)
