"""Validation over a real store and a real worker: beside what is mined, through restarts, once for each question."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import structlog

from pocd.clock import SYSTEM
from pocd.delivery.posting import Receiver
from pocd.lab import command
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.pool.limits import WorkerLimits
from pocd.pool.pool import Pool
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Proofs, Round
from pocd.store import validations
from pocd.store.deliveries import next_pending
from pocd.store.outbox import Work
from pocd.store.thread import OutboxThread
from pocd.validation.claim import Claim
from pocd.validation.queue import QueueFullError, ValidationRequest, Validator
from pocd.validation.verdict import Terms
from pocd.worker import frames, messages
from pocd.worker.messages import Load
from tests.support.delivering import dispatchers
from tests.support.family_models import FAMILIES
from tests.support.forking import at_work
from tests.support.waiting import PATIENCE, soon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

MODEL = "bundled:tiny-llama"
LOAD = Load(MODEL, "float32", ("cpu",), "poc2", 16, 8)
NODE = Node(0, 1)
MINED = Round("block_alpha", 1, "node_A", 1.4142, "poc2", MODEL, 16)
THEIRS = Round("block_beta", 2, "node_B", 1.4142, "poc2", MODEL, 16)


def computed(round_: Round, nonces: range, *, batch_size: int = 8, dtype: str = "float32") -> dict[int, float]:
    """Distances by the command line's way, without a worker."""
    request = command.ComputeRequest(
        model=round_.model,
        scheme=round_.scheme,
        block_hash=round_.block_hash,
        public_key=round_.public_key,
        seq_len=round_.seq_len,
        dtype=dtype,
        device="cpu",
        batch_size=batch_size,
    )
    return dict(command.distances(request, nonces))


def terms(fingerprint: str, scheme: str = "poc2", **changes: Any) -> Terms:  # noqa: ANN401 - any field
    known: dict[str, Any] = {
        "r_target": 1.4142,
        "fraud_threshold": 0.01,
        "mismatch": 5e-4,
        "tolerance": 1e-5,
        "scheme": scheme,
        "model": MODEL,
        "model_fingerprint": fingerprint,
        "dtype": "float32",
        "seq_len": 16,
        "node_count": 1,
    }
    return Terms(**known | changes)


def those_valid(round_: Round, distances: dict[int, float]) -> dict[int, float]:
    assert round_.r_target is not None
    return {nonce: distance for nonce, distance in distances.items() if distance < round_.r_target}


def claim_of(round_: Round, distances: dict[int, float]) -> Claim:
    valid = those_valid(round_, distances)
    return Claim(
        public_key=round_.public_key,
        block_hash=round_.block_hash,
        block_height=round_.block_height,
        nonces=list(valid),
        dist=list(valid.values()),
    )


@dataclasses.dataclass
class Bench:
    """A validator, the workers and the miner, over one store."""

    outbox: OutboxThread
    miner: Miner
    pool: Pool
    validator: Validator
    events: Events

    async def verdict(self, request: ValidationRequest) -> dict[str, Any]:
        """Ask, wait, and return the verdict."""
        name = (await self.validator.ask(request)).id
        found = await self.validator.until_finished(name, PATIENCE)
        assert found is not None
        assert found.answer is not None, found
        verdict: dict[str, Any] = orjson.loads(found.answer)
        return verdict

    async def request(self, claim: Claim, **changes: Any) -> ValidationRequest:  # noqa: ANN401 - of the terms
        async with asyncio.timeout(PATIENCE):
            await self.pool.ready.wait()
        assert self.pool.info is not None
        return ValidationRequest(claim, terms(self.pool.info.fingerprint, **changes), None, None, None)


@contextlib.contextmanager
def opened(
    folder: Path,
    load: Load = LOAD,
    *receivers: str,
    most: int = 4,
    until_free: Callable[[], Awaitable[None]] | None = None,
) -> Iterator[Bench]:
    """A bench on which nothing runs yet."""
    with contextlib.closing(OutboxThread(folder / "outbox.db")) as outbox:
        log, events = structlog.get_logger(), Events(SYSTEM)
        changes = Changes()
        miner = Miner(outbox, changes, clock=SYSTEM)
        limits = WorkerLimits(batch=60.0)
        pool = Pool([load], miner, limits, cache=folder, changes=changes, clock=SYSTEM, log=log, events=events)
        served = dispatchers(outbox, [Receiver(name, "http://127.0.0.1:1", None) for name in receivers])
        validator = Validator(
            outbox, pool, served, most=most, clock=SYSTEM, log=log, events=events, until_free=until_free
        )
        yield Bench(outbox, miner, pool, validator, events)


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    load: Load = LOAD,
    *receivers: str,
    mined: Round | None = MINED,
    until_free: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[Bench]:
    with opened(folder, load, *receivers, until_free=until_free) as bench:
        await bench.miner.set_round(Work(mined, NODE) if mined else None)
        tasks = [asyncio.create_task(part) for part in (bench.pool.run(), bench.validator.run())]
        try:
            yield bench
            assert not any(task.done() for task in tasks), [task for task in tasks if task.done()]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def checked(bench: Bench) -> int:
    assert bench.miner.mining is not None
    return bench.miner.mining.checked


async def until(bench: Bench, more: int) -> None:
    """Wait until so many more nonces were mined."""
    wanted = checked(bench) + more
    async with asyncio.timeout(PATIENCE):
        while checked(bench) < wanted:  # noqa: ASYNC110 - another process is watched
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("scheme", ["poc2", "random-embed", "poc3"])
async def test_a_batch_is_validated_between_those_that_are_mined_and_disturbs_none(tmp_path: Path, scheme: str) -> None:
    """Of a scheme that draws weights, or measures its outputs, too: what is mined after it has its own again."""
    load = dataclasses.replace(LOAD, scheme=scheme)
    mined, theirs = (dataclasses.replace(round_, scheme=scheme) for round_ in (MINED, THEIRS))
    distances = computed(theirs, range(40))
    async with running(tmp_path, load, mined=mined) as bench:
        await until(bench, 8)
        verdict = await bench.verdict(await bench.request(claim_of(theirs, distances), scheme=scheme))
        before = checked(bench)
        await until(bench, 16)
        proofs = bench.miner.mining.latest if bench.miner.mining else Proofs()
        latest = dict(zip(proofs.nonces, proofs.distances, strict=True))
    valid = those_valid(theirs, distances)
    assert verdict["nonces"] == list(valid)
    assert verdict["dist"] == pytest.approx(list(valid.values()), abs=2e-5)
    assert (verdict["n"], verdict["n_invalid"], verdict["fraud_detected"]) == (len(valid), 0, False)
    after = {nonce: distance for nonce, distance in latest.items() if nonce >= before}
    expected = computed(mined, range(before, max(after) + 1))
    assert after == pytest.approx({nonce: expected[nonce] for nonce in after}, abs=2e-5)


async def test_claims_are_judged_by_the_size_of_their_differences_beside_the_count(tmp_path: Path) -> None:
    """Claims ten times as far off as an honest miner's, within the tolerance, so that counting finds nothing."""
    theirs = dataclasses.replace(THEIRS, r_target=2.0)
    honest = computed(theirs, range(48), dtype="bfloat16")
    cheap = {nonce: distance + 1.5e-3 * (-1) ** nonce for nonce, distance in honest.items()}
    async with running(tmp_path, dataclasses.replace(LOAD, dtype="bfloat16")) as bench:
        verdicts = [
            await bench.verdict(
                await bench.request(claim_of(theirs, each), r_target=2.0, tolerance=2e-3, dtype="bfloat16")
            )
            for each in (honest, cheap)
        ]
    assert [verdict["verdict"] for verdict in verdicts] == ["honest", "honest"]
    assert [verdict["differences"]["result"] for verdict in verdicts] == ["honest", "fraud"]
    for verdict in verdicts:
        found = verdict["differences"]
        assert (found["numbers"], found["allowance"]) == (1, 1.5)
        for claimed, reference, error in zip(
            verdict["received_dist"], verdict["reference_dist"], found["claimed_errors"], strict=True
        ):
            assert error == pytest.approx((claimed - reference) ** 2)
    (one, other) = (verdict["differences"]["own_errors"] for verdict in verdicts)
    assert one == pytest.approx(other, rel=1e-3)
    assert len(one) == 48


async def test_a_mixtures_verdict_weighs_how_near_its_routers_came_to_another_choice(tmp_path: Path) -> None:
    """By the worker's answers to several questions; the chances follow from the nonces, whatever is claimed of them."""
    folder = tmp_path / "mixture"
    FAMILIES["qwen3 moe"].build().save_pretrained(folder)
    load = dataclasses.replace(LOAD, model=str(folder))
    theirs = dataclasses.replace(THEIRS, model=load.model)
    distances = computed(theirs, range(30))
    async with running(tmp_path, load, mined=None) as bench:
        honest = await bench.verdict(await bench.request(claim_of(theirs, distances)))
        forged = await bench.verdict(await bench.request(claim_of(theirs, dict.fromkeys(honest["nonces"], 1.0))))
        free = await bench.verdict(await bench.request(claim_of(theirs, dict.fromkeys(range(30), 1.0))))
    assert (honest["verdict"], forged["verdict"], free["verdict"]) == ("honest", "honest", "fraud")
    assert len(honest["nonces"]) > 8
    request = command.ComputeRequest(load.model, "poc2", "block_beta", "node_B", 16, "float32", "cpu", 8)
    with command.prepared(request) as run:
        chances = command.chances(run, range(30), 8)
    assert chances is not None
    assert honest["mixture"]["turned"] == [chances[nonce] for nonce in honest["nonces"]]
    assert forged["mixture"] == honest["mixture"]
    assert free["mixture"]["turned"] == list(chances.values())


async def answers_of_another_model_are_none(bench: Bench) -> None:
    """As of a daemon that was started with another model since it was asked: it judges nothing."""
    request = await bench.request(claim_of(THEIRS, computed(THEIRS, range(16))), dtype="bfloat16")
    await bench.validator.ask(request)
    found = await bench.validator.until_finished(request.id, PATIENCE)
    assert found is not None
    assert (found.state, found.answer) == ("failed", None)
    assert found.reason is not None
    assert "another model or dtype" in found.reason
    # Asked again, it is tried again.
    assert (await bench.validator.ask(request)).state == "pending"
    await bench.validator.until_finished(request.id, PATIENCE)


async def test_a_question_has_one_answer_whatever_becomes_of_workers_and_daemons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = asyncio.Event()
    encode = frames.encode

    def encode_and_note(message: messages.Message) -> bytes:
        if isinstance(message, messages.Recompute):
            sent.set()
        return encode(message)

    monkeypatch.setattr(frames, "encode", encode_and_note)
    device = Device()
    distances = computed(THEIRS, range(40))
    claim = claim_of(THEIRS, {nonce: distances[nonce] for nonce in range(16)})
    async with running(tmp_path, LOAD, "one", mined=None, until_free=device.until_free) as bench:
        await a_validation_waits_before_each_part_until_the_device_is_free(bench, device)
        await answers_of_another_model_are_none(bench)
        request = await bench.request(claim)
        first = await bench.verdict(request)
        worker = at_work(bench.pool.workers[0].pids[0])
        os.kill(worker, signal.SIGSTOP)  # so that nobody computes
        assert await bench.verdict(request) == first
        with contextlib.suppress(ProcessLookupError):  # replaced, where that took longer than its silence may
            os.kill(worker, signal.SIGCONT)
        bodies = await verdicts_for(bench, "one")
        assert bodies[-1] == (first["batch_id"], first)
        assert [body for _, body in bodies].count(first) == 1
        assert bench.outbox.view.totals.stored == 0, "the funnel counts what was mined"
        await a_verdict_also_goes_to_the_receiver_that_was_named(bench, request)

        # What a worker that is killed had in its hands is the next one's.
        whole = await bench.request(claim_of(THEIRS, distances))
        os.kill(at_work(bench.pool.workers[0].pids[0]), signal.SIGSTOP)  # so that what it is given stays there
        restarts = bench.pool.restarts
        sent.clear()
        asked = asyncio.create_task(bench.verdict(whole))
        await soon(sent.wait())
        os.kill(bench.pool.workers[0].pids[0], signal.SIGKILL)
        verdict = await asked
        assert bench.pool.restarts == restarts + 1
        assert (verdict["n_invalid"], verdict["fraud_detected"]) == (0, False)
    later = dataclasses.replace(request, seed="asked later")
    with opened(tmp_path) as bench:
        assert (await bench.validator.ask(later)).state == "pending"
    async with running(tmp_path, mined=None) as bench:
        found = await bench.validator.until_finished(later.id, PATIENCE)
        assert found is not None
        assert found.state == "done"


class Device:
    """What is asked whether it has time for validations; it has, unless a test says otherwise."""

    def __init__(self) -> None:
        self.asked, self.free = asyncio.Event(), asyncio.Event()
        self.free.set()
        self.times = 0

    async def until_free(self) -> None:
        self.times += 1
        self.asked.set()
        await self.free.wait()


async def a_validation_waits_before_each_part_until_the_device_is_free(bench: Bench, device: Device) -> None:
    device.free.clear()
    claim = claim_of(THEIRS, dict.fromkeys(range(20), 1.0))
    name = (await bench.validator.ask(await bench.request(claim))).id
    finished = asyncio.create_task(bench.validator.until_finished(name, PATIENCE))
    waiting = asyncio.create_task(device.asked.wait())
    await asyncio.wait({finished, waiting}, return_when=asyncio.FIRST_COMPLETED)
    assert not finished.done(), "nothing is recomputed while the device has better to do"
    assert device.times == 1
    device.free.set()
    assert (await soon(finished)) is not None
    assert device.times == 3, "20 nonces are three parts of 8 at most"


async def verdicts_for(bench: Bench, receiver: str) -> list[tuple[str, dict[str, Any]]]:
    """The ids and bodies of the verdicts that wait for a receiver, in order."""
    found: list[tuple[str, dict[str, Any]]] = []
    after = 0
    while head := await bench.outbox(next_pending, receiver, after):
        assert head.kind == "validated"
        found.append((head.id, orjson.loads(head.body)))
        after = head.sequence
    return found


async def a_verdict_also_goes_to_the_receiver_that_was_named(bench: Bench, request: ValidationRequest) -> None:
    """And each receiver gets one answer once, whichever questions it answers."""
    before = bench.outbox.view.queues["one"].pending_batches
    for callback in ("callback-own", "callback-other"):
        await bench.verdict(dataclasses.replace(request, callback=callback))
        assert len(await verdicts_for(bench, callback)) == 1
    assert bench.outbox.view.queues["one"].pending_batches == before


async def test_a_full_queue_takes_nothing_more_and_still_knows_what_it_has(tmp_path: Path) -> None:
    with opened(tmp_path, most=2) as bench:
        requests = [
            ValidationRequest(claim_of(THEIRS, {1: 1.0}), terms("f00d"), 1, seed, None)
            for seed in ("one", "two", "three")
        ]
        for request in requests[:2]:
            await bench.validator.ask(request)
        with pytest.raises(QueueFullError, match="2 validations are waiting"):
            await bench.validator.ask(requests[2])
        assert await bench.validator.find(requests[2].id) is None
        assert (await bench.validator.ask(requests[0])).state == "pending"
        assert await bench.outbox(validations.pending) == [request.id for request in requests[:2]]
        waited = await bench.validator.until_finished(requests[0].id, 0.01)
        assert waited is not None
        assert waited.state == "pending"


def test_a_request_reads_back_as_it_was() -> None:
    claim = Claim.model_validate_json(
        b'{"public_key": "k", "block_hash": "b", "block_height": 1, "nonces": [1, 1], "dist": [NaN, 1], "more": 1, '
        b'"model": "m", "params": {"seq_len": 16, "batch_size": 8}}'
    )
    request = ValidationRequest(claim, terms("f00d"), 1, "seed", "callback-1")
    again = ValidationRequest.from_json(request.to_json())
    assert (again, again.id) == (request, request.id)
    assert b"callback-1" in request.to_json()[:64]  # where the store looks who is still waited for
    others = [
        dataclasses.replace(request, sample=2),
        dataclasses.replace(request, seed="other"),
        dataclasses.replace(request, terms=terms("f00d", r_target=1.4)),
        dataclasses.replace(request, callback=None),
    ]
    assert len({each.id for each in [request, *others]}) == 5


async def test_finished_validations_are_kept_for_a_while_and_not_without_end(tmp_path: Path) -> None:
    with opened(tmp_path, most=200) as bench:
        names = [
            (
                await bench.validator.ask(
                    ValidationRequest(claim_of(THEIRS, {1: 1.0}), terms("f00d"), 1, f"{number}", None)
                )
            ).id
            for number in range(validations.KEPT + 5)
        ]
        for now, name in enumerate(names[:-1]):
            await bench.outbox(validations.fail, name, "no reason", float(now))
        assert await bench.outbox(validations.prune, 2.0) == 4  # two are old, two more are too many
        kept = [name for name in names if await bench.validator.find(name)]
        assert kept == names[4:]
        assert await bench.outbox(validations.pending) == names[-1:]
