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
    from collections.abc import Callable

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


class EpochScheduler:
    """Decides which round of the live network runs, as far as the chain decides (see `pocd.mining.control`).

    A round that runs keeps its parameters when the chain's change, and goes on by the newest answer of the chain while
    none comes: until its last block.

    Args:
        source: Source of what the chain says of its epoch, and of blocks.
        control: Gets the round that should run.
        outbox: Store of the highest head.
        health: Told which phase it is, and why the round that is due is not mined.
        model: Name of the model on the chain.
        make_round: Makes the round of a block, whose hash its nonces depend on, by the chain's parameters; the last
            argument tells whether inputs are drawn by all 256 bits of their seed.
        clock: Paces the log.
        log: Gets a line when a round that is due cannot be mined.
    """

    def __init__(
        self,
        source: EpochSource,
        control: Control,
        outbox: OutboxThread,
        *,
        health: ChainHealth,
        model: str,
        make_round: Callable[[Block, Recipe, bool], Round],
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        self._source = source
        self._control = control
        self._health = health
        self._model = model
        self._make_round = make_round
        self._log = log
        self._highest = Highest(outbox, clock=clock, log=log)
        self._info: EpochInfo | None = None  # the newest answer

    async def on_head(self, head: Head) -> None:
        """Pass the round that is due at `head` to `control`.

        Raises:
            ChainError: The chain could not be asked; what it said before is followed.
            StoreUnavailableError: The store cannot remember now what it must.
        """
        if head.corrects:
            self._info = None
        self._highest.note(head, self._control.chain_round)
        mined = None
        try:
            await self._highest.remember(head.block.chain_id)
            silent = await self._ask()
            due = self._due()
            mined = self._mined(due)
            await self._control.follow(mined or (await self._round(due, head.block) if due else None))
        except (ChainError, StoreUnavailableError):
            if mined != self._control.chain_round:
                await self._control.follow(None)
            raise
        if silent is not None:
            raise silent

    async def _ask(self) -> ChainError | None:
        """Learn what the chain says, unless it is older than what it said before; returns why it says nothing."""
        try:
            info = await self._source.epoch_info()
        except ChainError as error:
            return error
        if self._info is None or info.height >= self._info.height:
            self._info = info
        return None

    def _due(self) -> EpochRound | None:
        """Return the round whose nonces are to be generated now, and tell the phase."""
        if self._info is None:
            self._health.epoch = None
            return None
        height = max(self._info.height, self._highest.height)
        stage = stage_at(self._info, height)
        refused = self._why_not(self._info, stage.round) if stage.round else None
        if refused and (self._health.epoch is None or self._health.epoch.refused != refused):
            self._log.error("the round that is due is not mined", action="round_refused", cause=refused)
        self._health.epoch = EpochState(self._info.epoch, stage, refused, accepted_at(self._info, height))
        return None if refused else stage.round

    def _why_not(self, info: EpochInfo, due: EpochRound) -> str | None:
        try:
            recipe_of(info, due.scheme, self._model)
        except NotComputedError as error:
            return str(error)
        return None

    def _mined(self, due: EpochRound | None) -> Round | None:
        """Return the round that runs, where it is the one that is due."""
        mined = self._control.chain_round
        same = due and mined and mined.block_height == due.height and due.seed in {None, mined.block_hash}
        return mined if same else None

    async def _round(self, due: EpochRound, newest: Block) -> Round:
        assert self._info is not None, "a round is due by what the chain said"
        block = (
            await self._source.block(due.height)
            if due.seed is None
            else replace(newest, height=due.height, hash=due.seed)
        )
        recipe = recipe_of(self._info, due.scheme, self._model)
        return self._make_round(block, recipe, self._info.stronger_rng)
