"""Whose rounds are mined: the chain's, until the admin API takes the wheel, and again once it gives it back.

One call after another: each is decided by the table of `phases.py`, then on disk, then done. So what was decided
outlives a restart, and where the disk does not take it, nothing has changed.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import orjson

from pocd.mining.phases import Call, Mode, mode_after
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.store.outbox import Outbox, Work

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.mining.miner import Miner
    from pocd.observe.events import Events
    from pocd.store.thread import OutboxThread

MINING = {Mode.FOLLOWING, Mode.GENERATING}


class NoRoundError(Exception):
    """A phase was asked for, and there is no round to go on with."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A round that was asked for through the API, and what belongs to it.

    Attributes:
        fraud_threshold: Batches are fraud below this probability of honesty.
        callback: The receiver that wants its batches beside the configured ones.
    """

    round: Round
    node: Node
    fraud_threshold: float
    callback: str | None

    @property
    def work(self) -> Work:
        """It, as the miner takes it."""
        return Work(self.round, self.node, by_chain=False, callback=self.callback)


def encode(mode: Mode, asked: Asked | None) -> str | None:
    """Return what the store is to remember; None where the chain decides, which needs no remembering."""
    if mode is Mode.FOLLOWING:
        return None
    return orjson.dumps({"mode": mode, "asked": asdict(asked) if asked else None}).decode()


def decode(control: str | None) -> tuple[Mode, Asked | None]:
    """Read back what `encode` gave."""
    if control is None:
        return Mode.FOLLOWING, None
    fields: dict[str, Any] = orjson.loads(control)
    asked = fields["asked"]
    if asked is not None:
        asked = Asked(**asked | {"round": Round(**asked["round"]), "node": Node(**asked["node"])})
    return Mode(fields["mode"]), asked


class Control:
    """Decides what the miner works on.

    Attributes:
        mode: What was decided last.
        asked: The round that was asked for last, until the chain has the wheel again.
        chain_round: The round that should be active by the chain, whether it is mined or not.
    """

    def __init__(
        self,
        miner: Miner,
        outbox: OutboxThread,
        node: Node,
        *,
        clock: Clock,
        log: FilteringBoundLogger,
        events: Events,
    ) -> None:
        self._miner = miner
        self._outbox = outbox
        self._node = node
        self._clock = clock
        self._log = log
        self._events = events
        self._lock = asyncio.Lock()
        self.mode, self.asked = decode(outbox.view.control)
        self.chain_round: Round | None = None
        miner.paused = self.mode not in MINING

    async def restore(self) -> None:
        """Take up the round again that was asked for before the daemon was restarted."""
        if self.asked is not None:
            async with self._lock:
                work = self.asked.work
                done = await self._outbox.persistently(Outbox.begin_round, work, self._clock.wall())
                self._miner.take_up(work, done)
                self._tell(work)

    async def follow(self, round_: Round | None) -> None:
        """Take note of the round that should be active by the chain, and mine it if the chain decides.

        While mining is stopped it is taken up as well, for status to tell of, unless a round was asked for.

        Raises:
            StoreUnavailableError: It cannot be begun now; nothing has changed.
        """
        async with self._lock:
            if self.mode is Mode.FOLLOWING or (self.mode is Mode.STOPPED and self.asked is None):
                work = self._of_chain(round_)
                is_news = not self._miner.works_on(work)
                await self._miner.set_round(work)
                if is_news:
                    self._tell(work)
            self.chain_round = round_

    async def call(self, call: Call, asked: Asked | None = None) -> None:
        """Do what a call of the API says; `asked` is the round that an init brings.

        Raises:
            NoRoundError: The table has no answer to it; nothing has changed.
            StoreUnavailableError: It cannot be remembered now; likewise.
        """
        # To its end, though the caller gives up: what is on disk is what is done.
        await asyncio.shield(asyncio.ensure_future(self._call(call, asked)))

    async def _call(self, call: Call, asked: Asked | None) -> None:
        async with self._lock:
            mode = mode_after(self.mode, call)
            if mode is None:
                raise NoRoundError(self.mode)
            if mode is Mode.FOLLOWING:
                work = self._of_chain(self.chain_round)
            else:
                asked = asked or self.asked
                work = asked.work if asked and mode is not Mode.STOPPED else None
            done = await self._outbox(Outbox.set_control, encode(mode, asked), work, self._clock.wall())
            if (mode, asked) != (self.mode, self.asked):
                who = "the chain" if mode is Mode.FOLLOWING else "the API"
                self._log.info(f"{who} decides", action="control", call=call, mode=mode)
            self.mode, self.asked = mode, asked
            self._miner.pause(mode not in MINING)
            if mode is Mode.STOPPED:
                return  # the round stays, so that status shows it
            is_news = not self._miner.works_on(work)
            self._miner.take_up(work, done)
            if is_news:
                self._tell(work)

    def _of_chain(self, round_: Round | None) -> Work | None:
        return Work(round_, self._node) if round_ else None

    def _tell(self, work: Work | None) -> None:
        """Say which round is worked on from now on."""
        if work is None:
            self._log.info("no round is active", action="round_end")
            self._events.publish("round", id=None)
            return
        by = "chain" if work.by_chain else "api"
        where = {"height": work.round.block_height, "block_hash": work.round.block_hash}
        self._log.info("round begins", action="round_begin", **where, round=work.round.id, by=by)
        self._events.publish("round", **where, id=work.round.id, by=by)
