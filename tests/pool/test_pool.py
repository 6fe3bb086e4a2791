"""Several workers as real processes over one cursor; two cores stand for two cards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
import time
from typing import TYPE_CHECKING, cast

import pytest
import structlog

from pocd.clock import SYSTEM
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.observe.rates import RateWindow
from pocd.pool.causes import Cause, WorkerError, WorkerRefusedError
from pocd.pool.feeder import Feeder
from pocd.pool.limits import WorkerLimits
from pocd.pool.pool import Pool, environment
from pocd.pool.processes import RankLink
from pocd.pool.recomputations import Recomputation, Recomputations
from pocd.pool.state import Phase, WorkerState
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.store.outbox import Outbox, Work
from pocd.store.thread import OutboxThread
from pocd.tasks import LOOK_SECONDS
from pocd.worker.messages import Distances, Load, Message, Recompute
from tests.support.waiting import PATIENCE, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

LOAD = Load("bundled:tiny-llama", "float32", ("cpu",), "poc2", 16, 8)
MISSING = dataclasses.replace(LOAD, devices=("cuda:99",))
NODE = Node(1, 3)
ROUND = Round("block_alpha", 1, "node_A", 1.4142, "poc2", "bundled:tiny-llama", 16)
OTHER = dataclasses.replace(ROUND, block_hash="block_beta")


@contextlib.asynccontextmanager
async def pooled(
    folder: Path, loads: Sequence[Load], round_: Round = ROUND, **limits: float
) -> AsyncIterator[tuple[Pool, Miner]]:
    """Workers that run, over a miner with one round."""
    with contextlib.closing(OutboxThread(folder / "outbox.db")) as outbox:
        changes = Changes()
        miner = Miner(outbox, changes, clock=SYSTEM)
        known, log, events = WorkerLimits(**{"batch": 60.0} | limits), structlog.get_logger(), Events(SYSTEM)
        pool = Pool(loads, miner, known, cache=folder, changes=changes, clock=SYSTEM, log=log, events=events)
        await miner.set_round(Work(round_, NODE))
        task = asyncio.create_task(pool.run())
        try:
            yield pool, miner
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, WorkerRefusedError):
                await task
            assert {worker.phase for worker in pool.workers} == {Phase.WAITING}, "no process, not ready"


async def recompute(pool: Pool, round_: Round, nonces: tuple[int, ...], *, last: bool = True) -> list[float]:
    result = asyncio.get_running_loop().create_future()
    wanted = Recomputation(round_, nonces, last, with_reference=False, result=result)
    async with asyncio.timeout(PATIENCE):
        await pool.recomputations.put(wanted)
        answer = await wanted.result
        assert isinstance(answer, Distances)
        return answer.distances


async def test_workers_share_one_cursor_and_the_death_of_one_leaves_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: list[RankLink] = []
    send = RankLink.send

    async def send_and_note(link: RankLink, message: Message) -> None:
        if isinstance(message, Recompute):
            took.append(link)
        await send(link, message)

    monkeypatch.setattr(RankLink, "send", send_and_note)
    async with pooled(tmp_path, [LOAD, LOAD], exit=0.2) as (pool, miner):
        first, second = pool.workers
        await until(lambda: first.ready and second.ready)
        await one_worker_does_a_whole_recomputation_and_the_next_one_is_anothers(pool, took)
        assert miner.mining is not None
        both = [first.computed, second.computed]
        # Neither waits for the other: each goes on by itself.
        await until(lambda: first.computed > both[0] + 64 and second.computed > both[1] + 64)
        (pid,) = first.pids
        os.kill(pid, signal.SIGKILL)
        await until(lambda: first.causes[Cause.CRASH])
        assert pool.ready.is_set()
        assert first.last_error == f"worker process {pid} was killed by signal 9"
        alone = second.computed
        await until(lambda: second.computed > alone + 64)
        await until(lambda: first.ready)
        again = first.computed
        await until(lambda: first.computed > again + 64)
        assert not second.causes
        await miner.close(PATIENCE)
        done = miner.mining.checked
        assert done == first.computed + second.computed
    with contextlib.closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        found = await outbox(Outbox.begin_round, Work(ROUND, NODE), 0.0)
    # Each nonce once, and dense, but for what the end took back from one worker while the other was ahead of it.
    gaps = sum(map(len, found.progress.gaps()))
    assert found.checked == done == found.progress.end - gaps
    assert gaps <= 4 * LOAD.batch_size, "each worker had two batches"


async def one_worker_does_a_whole_recomputation_and_the_next_one_is_anothers(pool: Pool, took: list[RankLink]) -> None:
    """Each would prepare the foreign round anew, and hold it; `took` are the workers that were asked."""
    one, two = await recompute(pool, OTHER, (1, 2), last=False)
    assert abs(one - two) > 1e-4
    # Another place in a batch, and another process, may round in another way.
    expected = [pytest.approx(two, abs=2e-5), pytest.approx(1.4, abs=0.2)]
    assert await recompute(pool, OTHER, (2, 3), last=False) == expected
    assert await recompute(pool, OTHER, (1,)) == pytest.approx([one], abs=2e-5)
    assert await recompute(pool, OTHER, (2,)) == pytest.approx([two], abs=2e-5)
    first, second = took[0], took[3]
    assert took == [first, first, first, second]
    assert first is not second


async def test_a_card_that_is_not_there_leaves_the_others_at_work(tmp_path: Path) -> None:
    async with pooled(tmp_path, [MISSING, LOAD]) as (pool, miner):
        missing, present = pool.workers
        await until(lambda: missing.causes[Cause.DEVICE])
        assert missing.alarm is None
        await until(lambda: present.computed > 64)
        assert miner.mining is not None
        assert "cuda:99" in str(missing.last_error)
        missing.failures = 4
        await until(lambda: missing.left_out)
        assert str(missing.alarm).startswith(
            "failed 5 times in a row, left out, and tried every 30 min; the last time: device "
        )
        assert present.alarm is None
        before = present.computed
        await until(lambda: present.computed > before + 64)


async def test_when_no_worker_can_work_the_pool_ends_with_the_reason(tmp_path: Path) -> None:
    with contextlib.closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        changes = Changes()
        miner = Miner(outbox, changes, clock=SYSTEM)
        pool = Pool(
            [MISSING, MISSING],
            miner,
            WorkerLimits(batch=60.0),
            cache=tmp_path,
            changes=changes,
            clock=SYSTEM,
            log=structlog.get_logger(),
            events=Events(SYSTEM),
        )
        with pytest.raises(WorkerRefusedError, match="cuda:99") as refused:
            async with asyncio.timeout(PATIENCE):
                await pool.run()
    assert refused.value.cause is Cause.DEVICE


async def test_a_worker_on_a_full_disk_says_why_it_failed_and_does_not_blame_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    async with pooled(tmp_path, [LOAD], exit=PATIENCE) as (pool, _):
        (worker,) = pool.workers
        await until(lambda: worker.causes)
        assert worker.causes == {Cause.CRASH: 1}
        assert "worker failed: FileNotFoundError: [Errno 2] No usable temporary directory" in str(worker.last_error)


async def test_why_a_worker_could_not_even_begin_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that it imports is gone, as in the middle of an upgrade: that ends no daemon, and no other worker."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    async with pooled(tmp_path, [LOAD], exit=PATIENCE) as (pool, _):
        (worker,) = pool.workers
        await until(lambda: worker.causes[Cause.CRASH] == 2)
        assert "exited with status 1: ModuleNotFoundError: import of torch halted" in str(worker.last_error)
        assert not worker.unusable


async def test_a_paused_daemon_finds_no_worker_hung(tmp_path: Path) -> None:
    limits = WorkerLimits(batch=4 * LOOK_SECONDS)
    with contextlib.closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        miner = Miner(outbox, Changes(), clock=SYSTEM)
        state = WorkerState(0, ("cpu",), 8, RateWindow(SYSTEM))
        nobody = cast("RankLink", None)  # nothing is sent
        feeder = Feeder(nobody, state, miner, Recomputations(), limits, log=structlog.get_logger())
        feeder._busy.set()
        watching = asyncio.create_task(feeder._watch())
        asyncio.get_running_loop().call_later(LOOK_SECONDS / 2, time.sleep, 6 * LOOK_SECONDS)
        await asyncio.sleep(LOOK_SECONDS)
        await asyncio.sleep(LOOK_SECONDS)  # so that whoever takes the pause for silence has said so
        assert not watching.done()
        with pytest.raises(WorkerError, match="finished no batch within 2 s") as hung:
            await soon(watching)
        assert hung.value.cause is Cause.HUNG


def test_a_worker_sees_its_own_cards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    card = dataclasses.replace(LOAD, devices=("cuda:2",), cards=("6",))
    split = dataclasses.replace(LOAD, devices=("cuda:1", "cuda:3"), cards=("5", "7"))
    loads = [card, split, LOAD]
    assert [environment(load, loads, tmp_path)["CUDA_VISIBLE_DEVICES"] for load in loads] == ["6", "5,7", ""]
    ranks = [dataclasses.replace(split, rank=rank) for rank in (0, 1)]
    assert [(load.device, load.own_device) for load in (card, *ranks, LOAD)] == [
        ("cuda:2", "cuda:0"),
        ("cuda:1", "cuda:0"),
        ("cuda:3", "cuda:1"),
        ("cpu", "cpu"),
    ]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_how_memory_is_allocated_is_left_to_whoever_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for each in names:
        monkeypatch.delenv(each, raising=False)
    assert {environment(LOAD, [LOAD], tmp_path)[each] for each in names} == {"expandable_segments:True"}
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    found = environment(LOAD, [LOAD], tmp_path)
    assert {each: found.get(each) for each in names} == dict.fromkeys(names) | {name: "backend:cudaMallocAsync"}


# The daemon of a host that is short of files, in a process of its own: the limit is the whole process's.
SHORT_OF_FILES = """
import asyncio, os, resource, signal, sys, uvloop
from pathlib import Path
from tests.pool.test_pool import LOAD, pooled
from tests.support.waiting import until

async def main() -> None:
    async with pooled(Path(sys.argv[1]), [LOAD], exit=0.2) as (pool, _):
        (worker,) = pool.workers
        await until(lambda: worker.computed)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        (pid,) = worker.pids
        lowest = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, most))
        os.kill(pid, signal.SIGKILL)
        await until(lambda: worker.failures == 2)
        assert "could not be started: [Errno 24] Too many open files" in worker.last_error, worker.last_error
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        before = worker.computed
        await until(lambda: worker.computed > before)

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the daemon
    runner.run(main())
"""


async def test_a_worker_for_which_there_are_no_files_just_now_is_started_later(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", SHORT_OF_FILES, str(tmp_path)), stderr=asyncio.subprocess.PIPE
    )
    _, err = await soon(process.communicate())
    assert process.returncode == 0, err.decode()


def test_workers_on_the_cpu_share_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    cores = len(os.sched_getaffinity(0))
    assert "OMP_NUM_THREADS" not in environment(LOAD, [LOAD], tmp_path)
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    assert "PYTHONOPTIMIZE" not in environment(LOAD, [LOAD], tmp_path)
    two = environment(LOAD, [LOAD, dataclasses.replace(LOAD, devices=("cpu", "cpu"))], tmp_path)
    assert two["OMP_NUM_THREADS"] == str(max(1, cores // 3))
    assert two["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    set_by_hand = environment(LOAD, [LOAD, LOAD], tmp_path)
    assert (set_by_hand["OMP_NUM_THREADS"], set_by_hand["TRITON_CACHE_DIR"]) == ("7", "/elsewhere")


def test_where_no_temporary_folder_can_be_written_workers_have_one_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert environment(LOAD, [LOAD], tmp_path)["TMPDIR"] == tempfile.gettempdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/none"])
    assert environment(LOAD, [LOAD], tmp_path)["TMPDIR"] == str(tmp_path / "tmp")
    assert (tmp_path / "tmp").is_dir()
