"""The scheduler of the live network's rounds: decides at every head which round of the epoch should run now.

Level-triggered, as `RoundScheduler`: what is due follows from the chain's newest answer and the height alone, so a
missed block, a restart or an outage needs no catching up (docs/live.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from pocd.chain.source import ChainError
from pocd.mining.follower import EpochState
from pocd.mining.highest import Highest
from pocd.protocol.epochs import NotComputedError, accepted_at, recipe_of, stage_at
from pocd.store.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from structlog.typing import FilteringBoundLogger

    from pocd.chain.source import Block, Head
    from pocd.clock import Clock
    from pocd.mining.control import Control
    from pocd.mining.follower import ChainHealth
    from pocd.protocol.epochs import EpochInfo, EpochRound, Recipe
    from pocd.protocol.proof import Round
    from pocd.store.thread import OutboxThread


class EpochSource(Protocol):
    """A chain with epochs."""

    async def epoch_info(self) -> EpochInfo:
        """Return what the chain says of its latest epoch.

        Raises:
            ChainError: The chain cannot be read.
        """

    async def block(self, height: int) -> Block:
        """Return the block at `height`; see `ChainSource.block`."""


class EpochWatcher:
    """Tells which phase of its epoch the chain is in, and what is due.

    Attributes:
        info: What the chain said last; None before it said anything.

    Args:
        source: Source of what the chain says of its epoch.
        health: Told the phase, and why a round that is due is not computed.
        models: Names that the model may have on the chain.
        log: Gets a line when a round that is due cannot be computed.
    """

    def __init__(
        self, source: EpochSource, *, health: ChainHealth, models: Sequence[str], log: FilteringBoundLogger
    ) -> None:
        self._source = source
        self._health = health
        self._models = models
        self._log = log
        self.info: EpochInfo | None = None

    async def on_head(self, head: Head) -> None:
        """Tell the phase at `head`; for a daemon whose rounds come from elsewhere.

        Raises:
            ChainError: The chain could not be asked; the phase is told by what it said before.
        """
        if head.corrects:
            self.info = None
        silent = await self.ask()
        self.due(head.block.height)
        if silent is not None:
            raise silent

    async def ask(self) -> ChainError | None:
        """Learn what the chain says, unless it is older than what it said before; returns why it says nothing."""
        try:
            info = await self._source.epoch_info()
        except ChainError as error:
            return error
        if self.info is None or info.height >= self.info.height:
            self.info = info
        return None

    def due(self, highest: int) -> EpochRound | None:
        """Return the round whose nonces are to be generated at the height `highest`, and tell the phase."""
        if self.info is None:
            self._health.epoch = None
            return None
        height = max(self.info.height, highest)
        stage = stage_at(self.info, height)
        refused = self._why_not(self.info, stage.round) if stage.round else None
        if refused and (self._health.epoch is None or self._health.epoch.refused != refused):
            self._log.error("the round that is due is not mined", action="round_refused", cause=refused)
        self._health.epoch = EpochState(self.info.epoch, stage, refused, accepted_at(self.info, height))
        return None if refused else stage.round

    def recipe(self, due: EpochRound) -> Recipe:
        """Return the parameters of a round that is due.

        Raises:
            NotComputedError: pocd does not compute it.
        """
        assert self.info is not None, "a round is due by what the chain said"
        return recipe_of(self.info, due.scheme, *self._models)

    def _why_not(self, info: EpochInfo, due: EpochRound) -> str | None:
        try:
            recipe_of(info, due.scheme, *self._models)
        except NotComputedError as error:
            return str(error)
        return None


class EpochScheduler:
    """Decides which round of the live network runs, as far as the chain decides (see `pocd.mining.control`).

    A round that runs keeps its parameters when the chain's change, and goes on by the newest answer of the chain while
    none comes: until its last block.

    Args:
        source: Source of blocks.
        watcher: Asks the chain what is due, and tells it.
        control: Gets the round that should run.
        outbox: Store of the highest head.
        make_round: Makes the round of a block, whose hash its nonces depend on, by the chain's parameters; the last
            argument tells whether inputs are drawn by all 256 bits of their seed.
        clock: Paces the log.
        log: Gets a line when the head falls back.
    """

    def __init__(
        self,
        source: EpochSource,
        watcher: EpochWatcher,
        control: Control,
        outbox: OutboxThread,
        *,
        make_round: Callable[[Block, Recipe, bool], Round],
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        self._source = source
        self._watcher = watcher
        self._control = control
        self._make_round = make_round
        self._highest = Highest(outbox, clock=clock, log=log)

    async def on_head(self, head: Head) -> None:
        """Pass the round that is due at `head` to `control`.

        Raises:
            ChainError: The chain could not be asked; what it said before is followed.
            StoreUnavailableError: The store cannot remember now what it must.
        """
        if head.corrects:
            self._watcher.info = None
        self._highest.note(head, self._control.chain_round)
        mined = None
        try:
            await self._highest.remember(head.block.chain_id)
            silent = await self._watcher.ask()
            due = self._watcher.due(self._highest.height)
            mined = self._mined(due)
            await self._control.follow(mined or (await self._round(due, head.block) if due else None))
        except (ChainError, StoreUnavailableError):
            if mined != self._control.chain_round:
                await self._control.follow(None)
            raise
        if silent is not None:
            raise silent

    def _mined(self, due: EpochRound | None) -> Round | None:
        """Return the round that runs, where it is the one that is due."""
        mined = self._control.chain_round
        same = due and mined and mined.block_height == due.height and due.seed in {None, mined.block_hash}
        return mined if same else None

    async def _round(self, due: EpochRound, newest: Block) -> Round:
        recipe = self._watcher.recipe(due)
        assert self._watcher.info is not None, "a round is due by what the chain said"
        stronger_rng = self._watcher.info.stronger_rng
        block = (
            await self._source.block(due.height)
            if due.seed is None
            else replace(newest, height=due.height, hash=due.seed)
        )
        return self._make_round(block, recipe, stronger_rng)
