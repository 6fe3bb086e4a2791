"""Workers as real processes, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import orjson
import pytest
import structlog
import structlog.testing
import torch
from safetensors.torch import load_file, save_file

from pocd.clock import SYSTEM
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.pool import processes
from pocd.pool.causes import Cause, WorkerRefusedError
from pocd.pool.feeder import take_batch_size
from pocd.pool.limits import WorkerLimits
from pocd.pool.pool import Pool
from pocd.pool.processes import Ended, FailedError
from pocd.protocol.names import BUNDLED
from pocd.protocol.nonces import Node, Progress
from pocd.protocol.proof import Round
from pocd.protocol.schemes import SCHEMES
from pocd.store.outbox import Outbox, Work
from pocd.store.thread import OutboxThread
from pocd.worker import frames, messages
from pocd.worker.messages import BatchShrunk, Cancel, Cancelled, Compute, Load, Message, Ready, Recompute
from tests.support.forking import at_work
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

LOAD = Load("bundled:tiny-llama", "float32", ("cpu",), "poc2", 16, 8)
AUTO = dataclasses.replace(LOAD, is_auto=True)
DENSE = SimpleNamespace(by_layers=SimpleNamespace(layers=[]))  # a model without routers
NODE = Node(0, 1)
ROUND = Round("block_alpha", 1, "node_A", 1.4142, "poc2", "bundled:tiny-llama", 16)


def compute(number: int, first: int, count: int) -> Compute:
    """A batch of `count` nonces from `first` on."""
    return Compute(number, ROUND, list(range(first, first + count)))


@contextlib.contextmanager
def prepared(folder: Path, load: Load, **limits: float) -> Iterator[tuple[Pool, Miner]]:
    """Workers that do not run yet, and their miner, on a real store."""
    with contextlib.closing(OutboxThread(folder / "outbox.db")) as outbox:
        changes = Changes()
        miner = Miner(outbox, changes, clock=SYSTEM)
        known, log, events = WorkerLimits(**{"batch": 60.0} | limits), structlog.get_logger(), Events(SYSTEM)
        pool = Pool([load], miner, known, cache=folder, changes=changes, clock=SYSTEM, log=log, events=events)
        yield pool, miner


@contextlib.asynccontextmanager
async def supervised(
    folder: Path, load: Load = LOAD, round_: Round = ROUND, **limits: float
) -> AsyncIterator[tuple[Pool, Miner]]:
    """Workers that run, over a miner with one round."""
    with prepared(folder, load, **limits) as (pool, miner):
        await miner.set_round(Work(round_, NODE))
        task = asyncio.create_task(pool.run())
        try:
            yield pool, miner
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def run_to_its_end(folder: Path, load: Load) -> None:
    with prepared(folder, load) as (pool, _):
        async with asyncio.timeout(PATIENCE):
            await pool.run()


def pid_of(pool: Pool) -> int:
    (pid,) = pool.workers[0].pids
    return pid


def checked(miner: Miner) -> int:
    assert miner.mining is not None
    return miner.mining.checked


async def test_a_worker_that_stands_still_is_killed_and_replaced(tmp_path: Path) -> None:
    async with supervised(tmp_path, heartbeat=5.0, exit=0.2) as (pool, miner):
        await until(lambda: checked(miner) > 16 and pool.workers[0].pids)
        pid, restarts = pid_of(pool), pool.restarts  # one, where the machine is as slow as that
        os.kill(at_work(pid), signal.SIGSTOP)
        await until(lambda: pool.restarts > restarts)
        assert pool.last_error == "worker gave no sign of life for 5 s, killed"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        before = checked(miner)
        await until(lambda: checked(miner) > before + 16)
        assert miner.mining is not None
        assert miner.mining.expected_valid_rate == pytest.approx(0.5, abs=0.01)
        await miner.close(PATIENCE)
        done = checked(miner)
    # What the killed worker had in hand was checked by the next one: no gap is left.
    with contextlib.closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        found = await outbox(Outbox.begin_round, Work(ROUND, NODE), 0.0)
    assert found.progress == Progress(done)


async def test_a_worker_that_finishes_no_batch_in_time_is_killed(tmp_path: Path) -> None:
    async with supervised(tmp_path, batch=1e-9) as (pool, miner):
        await until(lambda: pool.restarts)
        assert pool.last_error == "worker finished no batch within 0 s, killed"
        # What it did finish counts, and nothing else.
        assert checked(miner) % LOAD.batch_size == 0


async def test_a_replaced_round_is_left_at_once_and_its_leases_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Message] = []
    encode = frames.encode

    def encode_and_note(message: Message) -> bytes:
        sent.append(message)
        return encode(message)

    monkeypatch.setattr(frames, "encode", encode_and_note)
    async with supervised(tmp_path) as (pool, miner):
        await until(lambda: checked(miner) > 16)
        old = miner.mining
        assert old is not None
        worker = at_work(pid_of(pool))
        os.kill(worker, signal.SIGSTOP)  # so that leases stay in its hands
        await miner.set_round(None)
        await until(lambda: isinstance(sent[-1], Cancel))
        cancelled = sent[-1]
        assert isinstance(cancelled, Cancel)
        assert max(cancelled.ids) == max(message.id for message in sent if isinstance(message, Compute))
        os.kill(worker, signal.SIGCONT)
        await miner.close(PATIENCE)  # returns when no lease is out
        following = old.ledger.take(1000)
        assert following is not None
        assert following.start == old.checked, "the next free position is the first that was not checked"


def test_a_worker_leaves_out_what_was_cancelled_before_it_began() -> None:
    from pocd.worker.process import Inbox

    inbox = Inbox()
    for message in (compute(1, 0, 8), compute(2, 8, 8), Cancel([1, 2]), compute(3, 16, 8)):
        inbox.put(message)
    reported: list[Cancelled] = []
    assert inbox.get(reported.append).id == 3
    assert reported == [Cancelled(1), Cancelled(2)]


async def test_a_model_that_gives_nan_never_becomes_ready(tmp_path: Path) -> None:
    model = tmp_path / "broken"
    model.mkdir()
    (model / "config.json").write_bytes((BUNDLED / "tiny-llama" / "config.json").read_bytes())
    weights = load_file(BUNDLED / "tiny-llama" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    load = Load(str(model), "float32", ("cpu",), "poc2", 16, 8)
    with pytest.raises(WorkerRefusedError, match="NaN or infinity") as refused:
        await run_to_its_end(tmp_path, load)
    assert refused.value.cause is Cause.CONFIGURATION


def overflowing(folder: Path) -> tuple[Load, Round]:
    """A model that overflows in float16 on one input in five: tiny-llama with larger MLPs in its second layer."""
    folder.mkdir()
    (folder / "config.json").write_bytes((BUNDLED / "tiny-llama" / "config.json").read_bytes())
    weights = load_file(BUNDLED / "tiny-llama" / "model.safetensors")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    weights["model.layers.1.mlp.up_proj.weight"] *= 10_500
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load = Load(str(folder), "float16", ("cpu",), "poc2", 2, 1)
    # Of this round the first three nonces overflow (by five per cent and more), and of the next 90 no three in a row.
    return load, Round("overflow 19", 1, "test-key", 2.0, "poc2", load.model, load.seq_len)


async def test_batches_with_nan_are_refused_counted_and_logged_and_three_in_a_row_restart_the_worker(
    tmp_path: Path,
) -> None:
    load, round_ = overflowing(tmp_path / "model")
    with structlog.testing.capture_logs() as logs:
        async with supervised(tmp_path, load, round_) as (pool, miner):
            await until(lambda: pool.restarts)
            assert pool.last_error is not None
            assert pool.last_error.startswith("worker gave no result for 3 batches in a row, killed: model ")
            # The same three again, from the new worker, and then only single ones.
            await until(lambda: checked(miner) > 40)
            assert pool.restarts == 2
            assert miner.refused_batches > 6
            assert miner.mining is not None
            assert miner.mining.valid == miner.mining.checked, "at r_target 2 every distance is valid; NaN is none"
            refused = [entry for entry in logs if entry["action"] == "batch_refused"]
            assert len(refused) == miner.refused_batches
            assert refused[0]["log_level"] == "error"
            for part in ("float16", "'poc2'", "layer 1, in its branch"):
                assert part in refused[0]["event"]
            assert pool.workers[0].last_refusal is not None
            await miner.close(PATIENCE)
    with contextlib.closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        found = await outbox(Outbox.begin_round, Work(round_, NODE), 0.0)
    gaps = found.progress.gaps()
    assert sum(map(len, gaps)) > 0, "what has no distance is not stored as checked"
    assert found.checked == found.progress.end - sum(map(len, gaps))


# A worker's part that finds a batch size, in a process that may take so many MiB for it; tells the size, or its error.
LIMITED = """
import re, resource, sys, orjson, torch
torch.set_num_threads(1)
from pocd.process import importing
with importing():
    from pocd.compute.model import load_model
    from pocd.protocol.errors import ComputeError
    from pocd.worker import batch_size
    from pocd.worker.messages import Load
    from pocd.worker.self_test import fit
batch_size.LONGEST_SECONDS = float('inf')  # memory alone decides
_, most = resource.getrlimit(resource.RLIMIT_AS)
for mebibytes, given in orjson.loads(sys.argv[1]):
    load = Load(**given)
    model = load_model(load.model, dtype=load.dtype, device=load.device)
    mapped = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (mapped + mebibytes * 2**20, most))
    try:
        print(fit(model, load)[1])
    except ComputeError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
"""


def test_a_batch_size_that_does_not_fit_is_halved_until_it_does_or_an_error_that_names_the_key() -> None:
    auto = dataclasses.replace(LOAD, seq_len=1024, batch_size=1024, is_auto=True)  # 512 MiB of embeddings
    configured = dataclasses.replace(LOAD, seq_len=4096, batch_size=4096)
    asked = orjson.dumps([(100, auto), (400, configured)]).decode()
    forked = os.environ | {"FORKED": "yes"}
    program = [sys.executable, "-c", LIMITED, asked]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=forked)
    assert done.returncode == 0, done.stderr
    found, error = done.stdout.splitlines()
    assert found in {"2", "4", "8", "16"}
    assert error == (
        "a batch of 4096 × 4096 positions does not fit into the memory of cpu; a smaller one may: "
        "lower worker.batch_size, or set it to 'auto'"
    )


async def test_a_worker_that_had_to_shrink_its_batches_says_so_and_it_is_remembered(tmp_path: Path) -> None:
    load = dataclasses.replace(LOAD, batch_size=64, is_auto=True)
    with structlog.testing.capture_logs() as logs, prepared(tmp_path, load) as (pool, _):
        message = BatchShrunk(32, "a batch of 64 × 16 positions does not fit")
        take_batch_size(message, pool.workers[0], structlog.get_logger())
    assert pool.batch_size == 32
    assert [entry["action"] for entry in logs] == ["batch_size"]
    assert pool._supervisors[0].load.batch_size == 32, "the next life begins with it"


@contextlib.contextmanager
def ready_worker(*program: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket, BinaryIO]]:
    """A worker process that has loaded, the daemon's side of its socket, and a stream of what it says."""
    ours, theirs = socket.socketpair()
    worker = subprocess.Popen(
        [sys.executable, *(program or ("-m", "pocd.worker")), str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        env=os.environ | {"FORKED": "yes"},
    )
    theirs.close()
    try:
        with ours, ours.makefile("rb") as stream:
            ours.settimeout(PATIENCE)
            ours.sendall(frames.encode(LOAD))
            while not isinstance(message := frames.read(stream), Ready):
                assert message is not None, "it is gone"
            yield worker, ours, stream
    finally:
        worker.kill()
        worker.wait()


def test_a_recomputation_waits_for_one_batch_and_a_worker_ends_with_its_daemon_though_messages_are_unread() -> None:
    other = dataclasses.replace(ROUND, block_hash="block_beta")
    with ready_worker() as (worker, ours, stream):
        asked: list[Message] = [compute(number, 64 * number, 64) for number in range(4)]
        asked.append(Recompute(9, other, [5, 3, 8], last=True))
        asked.append(Recompute(10, other, [3], last=True))
        ours.sendall(b"".join(frames.encode(message) for message in asked))
        results: dict[int, list[float]] = {}
        while len(results) < 6:
            message = frames.read(stream)
            assert message is not None
            if isinstance(message, messages.Distances):
                results[message.id] = message.distances
        assert ours.recv(1, socket.MSG_PEEK)  # a heartbeat, which nobody reads: the kernel tells of a reset connection
        stream.close()
        ours.close()
        assert worker.wait(PATIENCE) == 0
    assert list(results).index(9) <= 1
    # In the order asked for; another place in a batch may round in another way.
    assert results[10] == pytest.approx([results[9][1]], abs=2e-5)
    assert min(abs(results[9][1] - other) for other in (results[9][0], results[9][2])) > 1e-4


def test_memory_that_is_short_for_two_rounds_is_left_to_the_one_that_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The self-test showed that a batch fits beside one round's head, not beside two."""
    from pocd.protocol.errors import OutOfMemoryError
    from pocd.worker import computer

    prepared: list[str] = []
    heads = 2
    sent: list[Message] = []

    class Run:
        seq_len, dimension, scheme, model = 16, 8192, SCHEMES["poc2"], DENSE

        def execution(self, _batch_size: int) -> SimpleNamespace:
            return SimpleNamespace(path="eager", reason="asked")

        def start(self, nonces: range, *, batch_size: int) -> SimpleNamespace:
            if len(prepared) > 1:
                raise OutOfMemoryError("two are too many")
            assert batch_size == 8
            return SimpleNamespace(values=lambda **_: [1.0] * len(nonces))

    @contextlib.contextmanager
    def block_run(_model: object, _scheme: object, *, block_hash: str, **_: object) -> Iterator[Run]:
        if len(prepared) == heads:
            raise torch.OutOfMemoryError("no room for a head")
        prepared.append(block_hash)
        yield Run()
        prepared.remove(block_hash)

    monkeypatch.setattr(computer, "block_run", block_run)
    computed = computer.DistanceComputer(cast("Any", None), LOAD, 8, sent.append)
    other = dataclasses.replace(ROUND, block_hash="block_beta")
    for _ in range(2):
        assert computed.start(compute(1, 0, 2))() == [1.0, 1.0]
        assert computed.start(Recompute(2, other, [5], last=False))() == [1.0]
        assert prepared == ["block_beta"]
    assert computed.start(compute(3, 0, 1))() == [1.0]
    assert computed.start(Recompute(4, other, [5], last=True))() == [1.0]
    assert not prepared
    heads = 1  # not even the second head fits
    computed.start(compute(5, 0, 1))()
    assert computed.start(Recompute(6, other, [5], last=True))() == [1.0]
    assert {type(message) for message in sent} == {messages.RoundBegun}


def test_a_recomputation_goes_before_what_is_not_begun() -> None:
    from pocd.worker.process import Inbox

    inbox = Inbox()
    for message in (compute(1, 0, 8), compute(2, 8, 8), Recompute(3, ROUND, [7], last=True)):
        inbox.put(message)
    inbox.put(Cancel([1, 2]))
    reported: list[Cancelled] = []
    assert inbox.get(reported.append).id == 3
    inbox.put(compute(4, 16, 8))
    assert inbox.get(reported.append).id == 4
    assert reported == [Cancelled(1), Cancelled(2)]


def test_a_recomputation_that_nobody_wants_any_more_is_left_out() -> None:
    from pocd.worker.process import Inbox

    inbox = Inbox()
    for message in (Recompute(1, ROUND, [7], last=False), compute(2, 0, 8), Recompute(3, ROUND, [8], last=True)):
        inbox.put(message)
    inbox.put(Cancel([3, 99]))
    reported: list[Cancelled] = []
    assert [inbox.get(reported.append).id for _ in range(2)] == [1, 2]
    inbox.put(Cancel([2]))  # it is begun
    assert inbox.get_nowait(reported.append) is None
    assert reported == [Cancelled(3)]


def test_rounds_that_draw_weights_are_never_prepared_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would draw into the same model, and only the last one would have its own weights."""
    from pocd.worker import computer

    prepared: list[str] = []

    @contextlib.contextmanager
    def block_run(_model: object, _scheme: object, *, block_hash: str, **_: object) -> Iterator[object]:
        assert not prepared
        prepared.append(block_hash)
        yield SimpleNamespace(
            seq_len=16,
            dimension=8192,
            scheme=SCHEMES["random-weights"],
            model=DENSE,
            execution=lambda _batch_size: SimpleNamespace(path="eager", reason="asked"),
            start=lambda nonces, **_: SimpleNamespace(values=lambda **_: [float(prepared[-1])] * len(nonces)),
        )
        prepared.remove(block_hash)

    monkeypatch.setattr(computer, "block_run", block_run)
    computed = computer.DistanceComputer(cast("Any", None), LOAD, 8, lambda _message: None)
    mined = dataclasses.replace(ROUND, scheme="random-weights", block_hash="1")
    other = dataclasses.replace(mined, block_hash="2")
    for last in (False, False, True):
        assert computed.start(Compute(1, mined, [0]))() == [1.0]
        assert computed.start(Recompute(2, other, [5], last=last))() == [2.0]
    assert computed.start(Compute(3, mined, [0]))() == [1.0]


@pytest.mark.parametrize("path", ["eager", "captured"])
def test_rounds_in_another_shape_find_their_own_batch_size(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Compiled code, which serves the configured shape alone, is kept."""
    from pocd.protocol.errors import MemoryShortError, OutOfMemoryError
    from pocd.worker import computer

    sizes: list[int] = []
    fitting = 2

    @contextlib.contextmanager
    def block_run(_model: object, _scheme: object, *, seq_len: int, **_: object) -> Iterator[object]:
        def start(nonces: Sequence[int], *, batch_size: int) -> SimpleNamespace:
            sizes.append(batch_size)
            if seq_len > LOAD.seq_len and batch_size > fitting:
                raise OutOfMemoryError(f"{batch_size} are too many")
            return SimpleNamespace(values=lambda **_: [1.0] * len(nonces))

        def values(nonces: Sequence[int], *, batch_size: int, **_: bool) -> list[float]:
            start(nonces, batch_size=batch_size)
            return [1.0] * len(nonces)

        taken = path if seq_len == LOAD.seq_len else "eager"
        execution = SimpleNamespace(path=taken, reason="so it is")
        yield SimpleNamespace(
            seq_len=seq_len,
            dimension=8192,
            scheme=SCHEMES["poc2"],
            execution=lambda _rows: execution,
            start=start,
            values=values,
        )

    monkeypatch.setattr(computer, "block_run", block_run)
    sent: list[Message] = []
    computed = computer.DistanceComputer(cast("Any", None), AUTO, 8, sent.append)
    longer = dataclasses.replace(ROUND, seq_len=17)  # so that seven rows have as many tokens
    for number, round_ in enumerate((longer, ROUND, dataclasses.replace(longer, block_hash="next"))):
        assert computed.start(Compute(number, round_, list(range(8))))() == [1.0] * 8
    assert sizes == [7, 3, 1, 8, 1]
    assert {type(message) for message in sent} == {messages.RoundBegun}, "the size of leases stays"
    fitting = 0
    with pytest.raises(MemoryShortError, match="not even one nonce fits"):
        computed.start(Compute(9, longer, list(range(8))))


async def test_memory_that_another_takes_from_a_worker_restarts_it(tmp_path: Path) -> None:
    """It did fit, so the configuration is not to blame."""
    async with supervised(tmp_path) as (pool, miner):
        await until(lambda: checked(miner) > 16)
        pid = at_work(pid_of(pool))
        held = int(Path(f"/proc/{pid}/statm").read_text().split()[5]) * resource.getpagesize()  # data, as in proc(5)
        resource.prlimit(pid, resource.RLIMIT_DATA, (held + 2**20, resource.RLIM_INFINITY))
        await miner.set_round(Work(dataclasses.replace(ROUND, seq_len=1024), NODE))
        await until(lambda: pool.workers[0].causes)
        assert pool.workers[0].causes == {Cause.MEMORY: 1}
        assert "does not fit into the memory of cpu" in str(pool.last_error)
        await until(lambda: checked(miner))


# The worker's process, on a device whose first batch fails as a card does that lost its memory.
FAULTY = """
import torch
from pocd.worker import process as program
from pocd.worker import computer
def fail(self, message):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\\nCompile with …")
computer.DistanceComputer.start = fail
program.main()
"""


def test_a_worker_whose_device_fails_says_so_and_ends() -> None:
    with ready_worker("-c", FAULTY) as (worker, ours, stream):
        ours.sendall(frames.encode(compute(1, 0, 8)))
        said = list(iter(lambda: frames.read(stream), None))
        assert said[-1] == messages.Failed(
            "fault", "cpu failed: AcceleratorError: CUDA error: an illegal memory access was encountered"
        )
        assert worker.wait(PATIENCE) == 1


READY = cast("Ready", object())
LEAST = dataclasses.replace(AUTO, batch_size=1)


@pytest.mark.parametrize(
    ("kind", "info", "load", "cause", "left"),
    [
        ("fault", READY, LOAD, Cause.FAULT, 8),
        ("memory", None, LOAD, Cause.CONFIGURATION, 8),
        ("memory", READY, LOAD, Cause.MEMORY, 8),
        ("memory", READY, AUTO, Cause.MEMORY, 4),
        ("memory", READY, LEAST, Cause.MEMORY, 1),
        ("memory", None, dataclasses.replace(AUTO, devices=("cpu", "cpu")), Cause.MEMORY, 4),
        ("capture", None, AUTO, Cause.FAULT, 8),
        ("device", READY, AUTO, Cause.DEVICE, 8),
        ("configuration", READY, AUTO, Cause.CONFIGURATION, 8),
    ],
)
def test_what_follows_from_a_workers_last_word(
    tmp_path: Path, kind: messages.FailureKind, info: Ready | None, load: Load, cause: Cause, left: int
) -> None:
    with prepared(tmp_path, load) as (pool, _):
        (worker,) = pool.workers
        worker.info = info
        error = pool._supervisors[0]._failure(
            FailedError(kind, "so it is"), Ended("worker process 7 exited with status 1")
        )
        assert (error.cause, worker.batch_size) == (cause, left)
        assert str(error).startswith("so it is")
        assert pool._supervisors[0].load.capture == (kind != "capture"), "the next life does not try it again"
        assert isinstance(error, WorkerRefusedError) == (cause in {Cause.DEVICE, Cause.CONFIGURATION})


def test_a_rank_that_was_killed_is_told_rather_than_what_the_others_say_of_it(tmp_path: Path) -> None:
    with prepared(tmp_path, LOAD) as (pool, _):
        ended = Ended("worker process 7, rank 1 of 2, was killed by signal 9", by_force=True)
        error = pool._supervisors[0]._failure(FailedError("fault", "connection closed by peer"), ended)
        assert (error.cause, str(error)) == (Cause.CRASH, ended.text)


async def test_a_process_that_its_driver_holds_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process here can be made so; the kernel gives a GPU's one no end while its driver hangs."""
    monkeypatch.setattr(processes, "KILL_SECONDS", 0.0)
    held = SimpleNamespace(pid=7, returncode=None, kill=lambda: None, wait=asyncio.Event().wait)
    link, output = SimpleNamespace(close=lambda: None), SimpleNamespace(close=lambda: asyncio.sleep(0))
    rank = cast("Any", SimpleNamespace(process=held, link=link, output=output))
    ended = await processes.Processes([rank], None).end(0.0)
    assert ended == Ended("worker process 7 does not end even when it is killed: its driver holds it (nvidia-smi)")


async def test_a_process_that_cannot_be_started_is_told_as_that() -> None:
    too_long = {"LONG": "x" * 2**24}  # for execve(2)
    with pytest.raises(OSError, match="Argument list too long"):
        await processes.Processes.start(LOAD, too_long, structlog.get_logger())


@pytest.mark.parametrize("turns", [1, 2, 3])
async def test_a_start_may_be_cancelled(turns: int) -> None:
    start = asyncio.create_task(processes.Processes.start(LOAD, os.environ, structlog.get_logger()))
    for _ in range(turns):  # so that it is at one await or another
        await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
