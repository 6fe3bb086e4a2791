"""The status as bytes: names, order and values, held to what was recorded when callers began to rely on them."""

from __future__ import annotations

import contextlib
import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import structlog
from prometheus_client import generate_latest

from pocd.admin import status
from pocd.admin.metrics import registry
from pocd.admin.operations import answer
from pocd.chain.source import Block, Head
from pocd.config.settings import load
from pocd.daemon.compose import compose, make_loads, make_receivers
from pocd.mining.control import RoundRequest
from pocd.mining.phases import Call
from pocd.pool.cards import CardReading
from pocd.pool.causes import Cause
from pocd.pool.processes import Place
from pocd.protocol.conditioning import Conditioning
from pocd.protocol.nonces import Ledger, Node, Progress
from pocd.protocol.proof import Round
from pocd.store import deliveries
from pocd.store.batches import form_batches
from pocd.store.callbacks import ENDED
from pocd.store.proofs import Weights
from pocd.store.thread import OutboxThread
from pocd.worker.messages import CardIdentity, Ready
from tests.support.clocks import NOW, ManualClock
from tests.support.processes import config

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from pocd.admin.parts import Parts
    from pocd.chain.failover import Failover

RECORDED = Path(__file__).parent.parent / "data" / "status.jsonl"  # at the start; while mining
ROUND = Round("9F2E", 4_100_040, "gonka1ö", 1.5, "poc2", "bundled:tiny-llama", 16)
READY = Ready(
    model="bundled:tiny-llama",
    fingerprint="f00d",
    dtype="float32",
    device="cpu",
    hidden_size=64,
    layers=2,
    decoder="flat",
    decoder_reason="it agrees",
    execution="eager",
    execution_reason="on the CPU",
    load_seconds=0.25,
    compile_seconds=0.0,
    batch_size=8,
    longest_seq_len=128,
    torch="2.9.1",
    conditioning=Conditioning(error=0.015625, flipped=0.0, own_share=0.5),
)
READING = CardReading(temperature=61.0, power=None, memory_used=2**30, memory_total=2**36, utilization=0.5)


@contextlib.contextmanager
def made(folder: Path, clock: ManualClock) -> Iterator[Parts]:
    """The parts of a daemon of two workers and two receivers, of which none runs."""
    urls = {"one": "http://user:secret@127.0.0.1:9/pow", "two": "http://127.0.0.1:9"}
    settings = load(config(folder, "http://127.0.0.1:9", urls, model__device=["cpu", "cpu"]))
    nowhere = cast("Failover", None)  # nothing is asked of it
    receivers, loads, log = make_receivers(settings, folder), make_loads(settings), structlog.get_logger()
    with contextlib.closing(OutboxThread(settings.store.path)) as outbox:
        yield compose(settings, outbox, nowhere, receivers, loads, clock=clock, log=log).parts


async def mine(parts: Parts, clock: ManualClock) -> None:
    """Have something to tell in every field."""
    first, second = parts.workers.workers
    for worker in (first, second):
        worker.start()
        worker.load("loading the model")
        worker.become_ready(READY)
        worker.pids = [4000 + worker.number]
    second.end()
    second.start()
    second.load("loading the model")
    second.last_error = parts.workers.last_error = "killed by signal 9"
    second.causes[Cause.CRASH] = 3
    second.cards = {"cuda:1": CardIdentity("NVIDIA H200", "GPU-1")}
    parts.cards._readings = {"GPU-1": READING}
    parts.workers.ready.set()
    block = Block("gonka", 4_100_047, "AB" * 32, datetime.fromtimestamp(NOW, UTC))
    parts.chain.head, parts.chain.seen_at = Head(block, catching_up=False), NOW
    await parts.control.call(Call.INIT_GENERATE, RoundRequest(ROUND, Node(1, 3), 0.02, "one"))
    lease = await parts.miner.lease(8)
    clock.advance(50.0)
    await parts.miner.complete(lease, [1.25, 1.75, 0.1 + 0.2, 1.5, 1.6, 1e-7, 1.9, 2.0], Weights("f00d", "float32"))
    assert parts.miner.mining
    parts.miner.mining.expected_valid_rate = 0.1003


async def test_the_bytes_are_those_that_callers_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "__version__", "0.1.0")
    at_start, mining = RECORDED.read_bytes().splitlines(keepends=True)
    clock = ManualClock()
    with made(tmp_path, clock) as parts:
        assert answer(status.view(parts)).body == at_start
        await mine(parts, clock)
        assert answer(status.view(parts)).body == mining


async def test_receivers_that_are_gone_and_have_nothing_left_are_one_line(tmp_path: Path) -> None:
    clock = ManualClock()
    with made(tmp_path, clock) as parts:
        await mine(parts, clock)
        names = ["one", *(f"gone{number}" for number in range(20))]
        await parts.outbox(form_batches, names, size=1, age=0.0, now=NOW, current=None)
        for name in names[1:]:
            while head := await parts.outbox(deliveries.next_pending, name):
                if name == "gone7" and head.sequence == 1:
                    await parts.outbox(deliveries.record_set_aside, name, head.batch, "no", NOW)
                else:
                    await parts.outbox(deliveries.record_delivered, name, head.batch, NOW)
        shown = {each.name: each for each in status.receivers(parts)}
        assert list(shown) == ["one", "two", "gone7", ENDED]
        batches = shown["one"].pending_batches
        assert shown["gone7"].dead_batches == 1
        assert (shown[ENDED].delivered_batches, shown[ENDED].pending_batches) == (19 * batches, 0)
        metrics = generate_latest(registry(parts)).decode()
        assert f'pocd_receiver_delivered_batches_total{{receiver="{ENDED}"}} {19.0 * batches}' in metrics
        assert "gone8" not in metrics


async def test_a_daemon_that_mines_and_computes_nothing_is_not_ready(tmp_path: Path) -> None:
    clock = ManualClock()
    with made(tmp_path, clock) as parts:
        await mine(parts, clock)
        first, second = await parts.miner.lease(1), await parts.miner.lease(1)
        weights = Weights("f00d", "float32")
        clock.advance(status.STALLED_SECONDS - 1)
        assert "miner" not in {problem.part for problem in status.problems(parts)}
        clock.advance(1)
        told = {problem.part: problem.reason for problem in status.problems(parts)}
        assert "no nonce was computed for 60 s" in told["miner"]
        await parts.miner.complete(first, [1.25], weights)
        assert "miner" not in {problem.part for problem in status.problems(parts)}
        clock.advance(status.STALLED_SECONDS + 1)
        parts.miner.hold("the disk is full")
        assert "miner" not in {problem.part for problem in status.problems(parts)}, "the store is why"
        parts.miner.give_back(second)


async def test_a_round_without_nonces_left_is_idle_and_says_why(tmp_path: Path) -> None:
    clock = ManualClock()
    with made(tmp_path, clock) as parts:
        await mine(parts, clock)
        assert parts.miner.mining
        parts.miner.mining.ledger = Ledger(Progress(), size=1)
        lease = await parts.miner.lease(8)
        assert status.state(parts) == "GENERATING"
        parts.miner.refuse(lease)
        assert status.state(parts) == "IDLE"
        told = {problem.part: problem.reason for problem in status.problems(parts)}
        assert told["miner"].startswith("scheme 'poc2' has no nonce above 9223372036854775807, and all of this node's")
        assert status.view(parts).worker.non_finite_nonces == 1
        assert "pocd_worker_non_finite_nonces_total 1.0" in generate_latest(registry(parts)).decode()


async def test_the_machines_of_a_cluster_have_the_sums_of_their_workers(tmp_path: Path) -> None:
    clock = ManualClock()
    with made(tmp_path, clock) as parts:
        workers = [*parts.workers.workers, *parts.workers.workers[:1]]
        assert status.machines(workers) == [], "processes of this machine"
        first, second = parts.workers.workers
        first.place = second.place = Place("two", "10.0.0.2")
        first.start()
        first.load("loading the model")
        first.become_ready(READY)
        for worker in (first, second):
            worker.count(30)
        clock.advance(30)
        (machine,) = status.machines(parts.workers.workers)
        assert (machine.node, machine.address, machine.workers, machine.ready) == ("two", "10.0.0.2", 2, 1)
        assert machine.computed_per_second_1m == sum(each.computed_rate.per_second(60) for each in (first, second)) > 0
        second.place = Place("one", "10.0.0.1")
        assert [each.node for each in status.machines(parts.workers.workers)] == ["one", "two"]
        text = generate_latest(registry(parts)).decode()
    assert "pocd_cluster_degraded 0.0" in text
    assert 'pocd_worker_place_info{address="10.0.0.1",node="one",worker="1"} 1.0' in text


async def test_a_worker_whose_results_depend_on_rounding_is_an_alarm(tmp_path: Path) -> None:
    with made(tmp_path, ManualClock()) as parts:
        first, second = parts.workers.workers
        for worker, flipped in ((first, 0.0), (second, 0.25)):
            worker.start()
            worker.load("loading the model")
            worker.become_ready(dataclasses.replace(READY, conditioning=Conditioning(0.5, flipped, 0.75, 0.125)))
        (alarm,) = status.alarms(parts)
        assert alarm.part == "worker 1 (cpu)"
        assert "25.00% of honest nonces would be found invalid" in alarm.reason
        text = generate_latest(registry(parts)).decode()
    assert 'pocd_worker_rounding_alarm{worker="0"} 0.0' in text
    assert 'pocd_worker_rounding_alarm{worker="1"} 1.0' in text
    assert 'pocd_worker_flipped_ratio{worker="1"} 0.25' in text
    assert 'pocd_worker_rounding_error_ratio{worker="0"} 0.5' in text
    assert 'pocd_worker_own_share_ratio{worker="0"} 0.75' in text
    assert 'pocd_worker_turned_ratio{worker="0"} 0.125' in text
