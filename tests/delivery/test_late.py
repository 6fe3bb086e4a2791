"""What an orchestrator's round found is set aside when it is late, and not before."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import structlog

from pocd.config.settings import load
from pocd.daemon.compose import compose, make_loads
from pocd.delivery.late import EpochWindows, LateArtifacts, OrchestratedWindows
from pocd.mining.control import Control, RoundRequest
from pocd.mining.follower import ChainHealth, EpochState
from pocd.mining.phases import Mode
from pocd.protocol.epochs import Phase, Stage
from pocd.protocol.live_jobs import JudgedArtifacts
from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs, Round
from pocd.store import deliveries, jobs
from pocd.store.batches import form_batches
from pocd.store.deliveries import next_pending
from pocd.store.outbox import Outbox, Work
from pocd.store.proofs import Weights
from pocd.store.thread import OutboxThread
from tests.support.clocks import ManualClock
from tests.support.processes import config
from tests.support.stored import commit_span

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.chain.failover import Failover
    from pocd.store.jobs import JobState

CALLBACK, URL = "callback-1", "http://127.0.0.1:9/v2"
NODE = Node(0, 1)
FIRST = Round("AB", 10, "key", None, "artifacts", "tiny", 16)
NEXT = Round("cd", 20, "key", None, "artifacts", "tiny", 16)


@dataclass
class Decided:
    """What decides which round is open."""

    mode: Mode
    asked: RoundRequest | None


async def found(outbox: OutboxThread, round_: Round, clock: ManualClock) -> None:
    """Begin a round, and queue three of its artifacts."""
    asked = RoundRequest(round_, NODE, 0.01, CALLBACK, URL)
    proofs = Proofs((0, 1, 2), bytes(72))
    await outbox(Outbox.begin_round, asked.work, clock.now)
    await outbox(commit_span, round_, NODE, Span(0, 3), proofs, Weights("f00d", "float32"), clock.now)
    await outbox(form_batches, [], size=10, age=0.0, now=clock.now, current=None, is_live=True)


async def test_a_round_is_open_while_it_is_mined_and_some_seconds_after(tmp_path: Path) -> None:
    clock = ManualClock()
    with closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        decided = Decided(Mode.GENERATING, RoundRequest(FIRST, NODE, 0.01, CALLBACK, URL))
        log = structlog.get_logger()
        windows = OrchestratedWindows(cast("Control", decided), seconds=60.0, clock=clock)
        late = LateArtifacts(windows, outbox, clock=clock, log=log)

        async def waiting() -> tuple[int, int]:
            await late.look()
            queue = outbox.view.queues[CALLBACK]
            return queue.pending_nonces, queue.expired_nonces

        await found(outbox, FIRST, clock)
        clock.advance(1000.0)
        assert await waiting() == (3, 0), "it is mined"
        decided.mode = Mode.STOPPED
        clock.advance(59.0)
        assert await waiting() == (3, 0)
        clock.advance(1.0)
        assert await waiting() == (0, 3)

        decided.mode, decided.asked = Mode.GENERATING, RoundRequest(NEXT, NODE, 0.01, CALLBACK, URL)
        await found(outbox, NEXT, clock)
        assert await waiting() == (3, 3)


async def test_rounds_of_other_chains_are_never_late(tmp_path: Path) -> None:
    for port in (None, 0):
        given = {} if port is None else {"orchestrator__port": port}
        settings = load(config(tmp_path, "http://127.0.0.1:9", {}, **given))
        source, log = cast("Failover", None), structlog.get_logger()
        with closing(OutboxThread(settings.store.path)) as outbox:
            made = compose(settings, outbox, source, [], make_loads(settings), clock=ManualClock(), log=log)
        assert (made.orchestrated is None) == (made.late is None) == (port is None)


async def test_a_round_of_the_chain_is_open_by_height_also_after_a_restart(tmp_path: Path) -> None:
    clock, log, path = ManualClock(), structlog.get_logger(), tmp_path / "outbox.db"
    health = ChainHealth()
    stage = Stage(Phase.INFERENCE, None, None, "")
    with closing(OutboxThread(path)) as outbox:
        for round_ in (FIRST, NEXT):
            await outbox(Outbox.begin_round, Work(round_, NODE), clock.now)
            proofs = Proofs((0, 1, 2), bytes(72))
            await outbox(commit_span, round_, NODE, Span(0, 3), proofs, Weights("f00d", "float32"), clock.now)
            await outbox(form_batches, ["one", "two"], size=10, age=0.0, now=clock.now, current=None)
        late = LateArtifacts(EpochWindows(health), outbox, clock=clock, log=log)
        clock.advance(1e6)
        await late.look()
        assert outbox.view.queues["one"].pending_nonces == 6, "the chain has said nothing yet"
        health.epoch = EpochState(1, stage, None, {10: 15, 20: 30})
        await late.look()
        assert outbox.view.queues["one"].pending_nonces == 6
        head = await outbox(next_pending, "one")
        assert head is not None
        await outbox(deliveries.record_delivered, "one", head.batch, clock.now)
        health.epoch = EpochState(1, stage, None, {20: 30})
        await late.look()
        queues = outbox.view.queues
        assert (queues["one"].pending_nonces, queues["one"].expired_nonces) == (3, 0), "the first was accepted in time"
        assert (queues["two"].pending_nonces, queues["two"].expired_nonces) == (3, 3)
    with closing(OutboxThread(path)) as outbox:
        late = LateArtifacts(EpochWindows(health), outbox, clock=clock, log=log)
        await late.look()
        assert outbox.view.queues["two"].pending_nonces == 3
        health.epoch = EpochState(2, stage, None, {})
        await late.look()
        assert outbox.view.totals.expired == 6


async def test_what_no_block_of_the_chain_began_has_no_height_to_be_late_at(tmp_path: Path) -> None:
    clock = ManualClock()
    with closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        await found(outbox, FIRST, clock)
        assert await outbox(deliveries.set_closed_aside, [], clock.now) == (0, 0)


async def test_the_next_round_ends_the_one_before_and_its_verdicts(tmp_path: Path) -> None:
    clock = ManualClock()
    with closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        decided = Decided(Mode.STOPPED, RoundRequest(FIRST, NODE, 0.01, CALLBACK, URL))
        log = structlog.get_logger()
        windows = OrchestratedWindows(cast("Control", decided), seconds=60.0, clock=clock)
        late = LateArtifacts(windows, outbox, clock=clock, log=log)
        await found(outbox, FIRST, clock)
        clock.advance(10.0)
        verdict = JudgedArtifacts("asked", 200, b"{}")
        await outbox(jobs.ask, "asked", b"{}", nonces=200, callback=(CALLBACK, URL), most=1000, now=clock.now)
        state: JobState = "completed"
        await outbox(jobs.finish, "asked", state, b"{}", verdict=verdict, receiver=CALLBACK, now=clock.now)
        clock.advance(100.0)
        await late.look()
        head = await outbox(next_pending, CALLBACK)
        assert head is not None
        assert head.kind == "validated", "its round may be validated for long"
        decided.mode, decided.asked = Mode.GENERATING, RoundRequest(NEXT, NODE, 0.01, CALLBACK, URL)
        await found(outbox, NEXT, clock)
        await late.look()
        head = await outbox(next_pending, CALLBACK)
        assert head is not None
        assert b'"cd"' in head.body
        assert outbox.view.queues[CALLBACK].expired_batches == 2
