"""Control of mining: the chain decides which round is mined, except while the admin API has taken control.

Calls are done one after another: each is decided by the table of `phases.py`, then stored, then done. So the decision
outlives a restart, and where the disk does not take it, nothing has changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import orjson

from pocd.mining.phases import Call, Mode, mode_after
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.store.outbox import Outbox, Work
from pocd.tasks import shielded

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.mining.miner import Miner
    from pocd.observe.events import Events
    from pocd.store.thread import OutboxThread

MINING = {Mode.FOLLOWING, Mode.GENERATING}

Runs = Mapping[str, str | None]
"""What decides a distance beside a round's block and key, by the key of the configuration: "model.name" and others."""


class NoRoundError(Exception):
    """A phase was requested, but no round was."""


@dataclass(frozen=True, slots=True)
class RoundRequest:
    """A round that was requested through the API, and what belongs to it.

    Attributes:
        fraud_threshold: Batches are fraud below this probability of honesty.
        callback: Name of the receiver of the round's batches beside the configured ones.
        callback_url: URL of that receiver; None where it is a configured one.
    """

    round: Round
    node: Node
    fraud_threshold: float
    callback: str | None
    callback_url: str | None = None

    @property
    def work(self) -> Work:
        """This round as the `Work` that the miner is given."""
        return Work(self.round, self.node, by_chain=False, callback=self.callback, callback_url=self.callback_url)


def encode(mode: Mode, asked: RoundRequest | None, runs: Runs) -> str | None:
    """Return the decision as text for the store, with what the daemon runs; None while the chain decides."""
    if mode is Mode.FOLLOWING:
        return None
    return orjson.dumps({"mode": mode, "asked": asdict(asked) if asked else None, "runs": runs}).decode()


def decode(control: str | None) -> tuple[Mode, RoundRequest | None]:
    """Return the decision that `encode` wrote."""
    if control is None:
        return Mode.FOLLOWING, None
    fields: dict[str, Any] = orjson.loads(control)
    asked = fields["asked"]
    if asked is not None:
        asked = RoundRequest(**asked | {"round": Round(**asked["round"]), "node": Node(**asked["node"])})
    return Mode(fields["mode"]), asked


def why_foreign(control: str | None, runs: Runs) -> str | None:
    """Return why the daemon cannot mine the requested round that `encode` wrote; None where it can, or there is none.

    The daemon may have been started anew with another model, and would find other nonces under the round's name.
    """
    fields: dict[str, Any] = orjson.loads(control) if control else {}
    if not fields.get("asked"):
        return None
    round_ = fields["asked"]["round"]
    # An earlier version stored the round alone, which names the model and the scheme.
    made_by = fields.get("runs") or {"model.name": round_["model"], "round.scheme": round_["scheme"]}
    differing = [key for key in runs if key in made_by and made_by[key] != runs[key]]
    if not differing:
        return None
    theirs, ours = (", ".join(f"{key} {values[key]!r}" for key in differing) for values in (made_by, runs))
    return (
        f"the requested round at height {round_['block_height']} is of {theirs}, but this daemon runs {ours}, so it is "
        "not mined: POST /api/v1/pow/init with another round, or /api/v1/pow/resume"
    )


class Control:
    """Decides what the miner works on.

    Attributes:
        mode: The mode that was decided last.
        asked: The round that was requested last; None once the chain decides again.
        foreign: Why the round that was requested before a restart is not mined after it, until the next call; the store
            keeps that round until then. None where it is mined, or there is none.
        chain_round: The round that should be active by the chain, whether it is mined or not.
    """

    def __init__(
        self,
        miner: Miner,
        outbox: OutboxThread,
        node: Node,
        *,
        runs: Runs,
        clock: Clock,
        log: FilteringBoundLogger,
        events: Events,
    ) -> None:
        self._miner = miner
        self._outbox = outbox
        self._node = node
        self._runs = runs
        self._clock = clock
        self._log = log
        self._events = events
        self._lock = asyncio.Lock()
        self.mode, self.asked = decode(outbox.view.control)
        self.foreign = why_foreign(outbox.view.control, runs)
        if self.foreign:
            self.mode, self.asked = Mode.STOPPED, None
        self.chain_round: Round | None = None
        miner.paused = self.mode not in MINING

    async def restore(self) -> None:
        """Resume the round that was requested before the daemon was restarted, where the daemon can still mine it."""
        if self.foreign:
            self._log.warning(self.foreign, action="round_not_restored")
        if self.asked is not None:
            async with self._lock:
                work = self.asked.work
                done = await self._outbox.persistently(Outbox.begin_round, work, self._clock.wall())
                self._miner.activate(work, done)
                self._report(work)

    async def follow(self, round_: Round | None) -> None:
        """Note the round that should be active by the chain, and mine it if the chain decides.

        While mining is stopped the round becomes active as well, so that status shows it, unless another was requested.

        Raises:
            StoreUnavailableError: The round cannot be stored now; nothing has changed.
        """
        async with self._lock:
            if self.mode is Mode.FOLLOWING or (self.mode is Mode.STOPPED and self.asked is None):
                work = self._of_chain(round_)
                is_news = not self._miner.works_on(work)
                await self._miner.set_round(work)
                if is_news:
                    self._report(work)
            self.chain_round = round_

    async def call(self, call: Call, asked: RoundRequest | None = None) -> None:
        """Do a call of the API; `asked` is the round that an init brings.

        Raises:
            NoRoundError: The call needs a requested round, and there is none; nothing has changed.
            StoreUnavailableError: The decision cannot be stored now; nothing has changed.
        """
        # Shielded, so that the call ends though its caller gives up: what is stored is what is done.
        await shielded(f"control: {call}", self._call(call, asked), self._log)

    async def _call(self, call: Call, asked: RoundRequest | None) -> None:
        async with self._lock:
            mode = mode_after(self.mode, call)
            if mode is None:
                raise NoRoundError(self.mode)
            if mode is Mode.FOLLOWING:
                work = self._of_chain(self.chain_round)
            else:
                asked = asked or self.asked
                work = asked.work if asked and mode is not Mode.STOPPED else None
            done = await self._outbox(Outbox.set_control, encode(mode, asked, self._runs), work, self._clock.wall())
            if (mode, asked) != (self.mode, self.asked):
                who = "the chain" if mode is Mode.FOLLOWING else "the API"
                self._log.info(f"{who} decides", action="control", call=call, mode=mode)
            self.mode, self.asked, self.foreign = mode, asked, None
            self._miner.pause(mode not in MINING)
            if mode is Mode.STOPPED:
                return  # the round stays active, so that status shows it
            is_news = not self._miner.works_on(work)
            self._miner.activate(work, done)
            if is_news:
                self._report(work)

    def _of_chain(self, round_: Round | None) -> Work | None:
        return Work(round_, self._node) if round_ else None

    def _report(self, work: Work | None) -> None:
        """Log and publish which round is active from now on."""
        if work is None:
            self._log.info("no round is active", action="round_end")
            self._events.publish("round", id=None)
            return
        by = "chain" if work.by_chain else "api"
        where = {"height": work.round.block_height, "block_hash": work.round.block_hash}
        self._log.info("round begins", action="round_begin", **where, round=work.round.id, by=by)
        self._events.publish("round", **where, id=work.round.id, by=by)
