"""The scheduler: decides at every head which round should run now.

Level-triggered: it acts on the current state, not on changes. A missed block, a restart or an outage needs no
catching up, and a step that failed is repeated at the next head (docs/protocol.md section 8).
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from pocd.chain.source import BlockUnavailableError, ChainError, same_hash
from pocd.mining.highest import Highest
from pocd.protocol.rounds import active_start
from pocd.store.errors import StoreUnavailableError
from pocd.store.rounds import recent_rounds, reinstate_round, replace_round

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from pocd.chain.source import Block, ChainSource, Head
    from pocd.clock import Clock
    from pocd.mining.control import Control
    from pocd.observe.changes import Changes
    from pocd.protocol.proof import Round
    from pocd.protocol.rounds import RoundPolicy
    from pocd.store.thread import OutboxThread

DEEPEST = 256
"""Number of rounds that are compared with the chain at one head, and of blocks on top of one that will not come back:
no chain replaces as many blocks at once."""

ALWAYS_HELD = 128
"""Blocks below its head that no node has pruned; one that lacks such a block is asked again."""


class RoundScheduler:
    """Decides which round runs, as far as the chain decides (see `pocd.mining.control`).

    The height that counts is the highest ever seen, which the store remembers, until it is proven a lie: a node that
    lags behind it, or a restart, begins no round that is over and ends none that runs. Only the blocks that the head
    can vouch for are asked of the chain, so a round whose start a lagging node has not seen yet begins when it has.

    Where blocks may be replaced, the rounds in the store are compared with the chain before any other begins. A round
    whose block is gone is marked there, and its place is taken by the new block's; where the block comes back, so does
    the round, also when it is over by then.

    Args:
        source: Source of the blocks that rounds start at.
        control: Gets the round that should run.
        outbox: Store of the highest head and of the rounds.
        policy: Heights at which rounds start, and how long they live.
        make_round: Makes the round that a block starts.
        withdraw: Whether to withdraw the pending batches of a round whose block was replaced.
        queued: Notified when batches that were withdrawn are queued again.
        clock: Dates what is stored by its wall clock, and paces the log by its monotonic clock.
        log: Gets a line when a round is replaced or comes back, when the head goes back, and when it is no longer back.
    """

    def __init__(
        self,
        source: ChainSource,
        control: Control,
        outbox: OutboxThread,
        *,
        policy: RoundPolicy,
        make_round: Callable[[Block], Round],
        withdraw: bool,
        queued: Changes,
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        self._source = source
        self._control = control
        self._outbox = outbox
        self._policy = policy
        self._make_round = make_round
        self._withdraw = withdraw
        self._queued = queued
        self._buried: set[Round] = set()  # replaced for good, as far as this process can find out
        self._clock = clock
        self._log = log
        self._highest = Highest(outbox, clock=clock, log=log)

    async def on_head(self, head: Head) -> None:
        """Pass the round that should be active at `head` to `control`.

        Raises:
            ChainError: A block that is needed could not be read.
            StoreUnavailableError: The store cannot remember now what it must.
        """
        self._highest.note(head, self._control.chain_round)
        start = active_start(self._highest.height, self._policy)
        mined = self._control.chain_round
        if mined is not None and mined.block_height != start:
            mined = None  # it is over, whatever comes next
        round_ = mined
        try:
            await self._highest.remember(head.block.chain_id)
            round_ = await self._wanted(start, head.block, mined)
            await self._control.follow(round_)
        except (ChainError, StoreUnavailableError):
            if round_ != self._control.chain_round:
                await self._control.follow(None)
            raise

    async def _wanted(self, start: int | None, head: Block, mined: Round | None) -> Round | None:
        """Return the round that starts at `start`: `mined`, if it is the same, or a new one."""
        blocks = {head.height: head}
        if self._source.reorganises:
            await self._replace_orphans(blocks, head.height)
        elif mined is not None:
            return mined
        if start is None:
            return None
        if start > head.height:
            return mined  # this node cannot say what is there
        block = await self._block(blocks, start)
        if mined is not None and same_hash(mined.block_hash, block.hash):
            return mined
        return self._make_round(block)

    async def _replace_orphans(self, blocks: dict[int, Block], height: int) -> None:
        """Mark the rounds whose blocks are no longer on the chain, and those whose blocks are on it again.

        Rounds are compared from the newest backwards, until one is on the chain that was not replaced: then its
        ancestors are too, and older rounds were compared with them before it began. Where a round was replaced, its
        height is compared all the same, as long as its block may come back.
        """
        recent = await self._outbox(recent_rounds, DEEPEST)
        self._buried &= recent.keys()
        rounds = [round_ for round_ in recent if round_.block_height <= height]
        agreed = False
        for start, same_height in groupby(rounds, key=lambda round_: round_.block_height):
            compared = list(same_height)
            if agreed and not any(recent[round_] and round_ not in self._buried for round_ in compared):
                continue
            try:
                block = await self._block(blocks, start)
            except BlockUnavailableError:
                if height - start < ALWAYS_HELD:
                    raise
                self._buried.update(round_ for round_ in rounds if round_.block_height <= start)
                return  # pruned, and so are those before it
            for round_ in compared:
                on_chain, replaced = same_hash(round_.block_hash, block.hash), recent[round_]
                agreed = agreed or (on_chain and not replaced)
                if on_chain and replaced:
                    await self._reinstate(round_)
                elif not on_chain and not replaced:
                    await self._replace(round_, block)
                elif not on_chain and height - start >= DEEPEST:
                    self._buried.add(round_)

    async def _replace(self, round_: Round, block: Block) -> None:
        reason = f"block {block.height} was replaced: {block.hash} took the place of {round_.block_hash}"
        await self._outbox(replace_round, round_, reason, withdraw=self._withdraw, now=self._clock.wall())
        self._log.warning(
            "round replaced",
            action="round_replaced",
            height=block.height,
            block_hash=round_.block_hash,
            new_block_hash=block.hash,
            round=round_.id,
        )

    async def _reinstate(self, round_: Round) -> None:
        await self._outbox(reinstate_round, round_, self._clock.wall())
        self._queued.notify()
        self._log.warning(
            "round is on the chain again",
            action="round_reinstated",
            height=round_.block_height,
            block_hash=round_.block_hash,
            round=round_.id,
        )

    async def _block(self, blocks: dict[int, Block], height: int) -> Block:
        """Return the block at `height`, which is requested once per head."""
        if height not in blocks:
            blocks[height] = await self._source.block(height)
        return blocks[height]
