"""One worker of a real Ray cluster whose ranks are on two machines."""

from __future__ import annotations

import contextlib
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

import psutil
import pytest

from pocd.pool.causes import Cause
from pocd.protocol.names import BUNDLED
from pocd.store.outbox import Outbox, Work
from pocd.store.thread import OutboxThread
from tests.cluster.test_cluster import NODE, ROUND, SECRET, has_ended, pooled
from tests.pool.test_pool import recompute
from tests.support.waiting import PATIENCE, until
from tests.worker.test_ranks import NONCES, alone

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.pool.pool import Pool
    from pocd.pool.state import WorkerState
    from tests.support.ray_machines import Machines

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'pocd[ray]'")


async def at_work(pool: Pool, *names: str) -> tuple[WorkerState, list[str]]:
    """Wait until the worker computes on machines of these names; returns the machine of each rank too."""
    (worker,) = pool.workers
    await until(lambda: worker.ready and worker.place and set(worker.place.node.split("+")) == set(names))
    assert worker.place is not None
    place, before = worker.place, worker.computed
    await until(lambda: worker.computed > before)
    return worker, place.node.split("+")


async def lose_a_rank(pool: Pool, number: int) -> None:
    worker, machines = await at_work(pool, "one", "two")
    ranks = [psutil.Process(pid) for pid in worker.pids]
    crashes = worker.causes[Cause.CRASH]
    ranks[number].kill()
    await until(lambda: worker.causes[Cause.CRASH] > crashes)
    assert str(worker.last_error).startswith(f"rank {number} of 2 on {machines[number]} (")
    assert str(worker.last_error).endswith(f"): worker process {ranks[number].pid} was killed by signal 9")
    await until(lambda: all(map(has_ended, ranks)))


async def lose_a_rank_that_stands_still(pool: Pool) -> None:
    worker, _ = await at_work(pool, "one", "two")
    ranks, lives = [psutil.Process(pid) for pid in worker.pids], sum(worker.causes.values())
    ranks[1].suspend()
    ranks[0].kill()
    await until(lambda: sum(worker.causes.values()) > lives)
    await until(lambda: all(map(has_ended, ranks)))


async def lose_a_machine(pool: Pool, machines: Machines) -> None:
    worker, _ = await at_work(pool, "one", "two")
    ranks, lives = [psutil.Process(pid) for pid in worker.pids], sum(worker.causes.values())
    machines.kill_raylet("two")
    await until(lambda: sum(worker.causes.values()) > lives)
    print(worker.causes, worker.last_error)
    await until(lambda: all(map(has_ended, ranks)))
    assert pool.cluster is not None
    cluster = pool.cluster
    await until(lambda: "room for 0 of 1 workers of 2 ranks, and for 1 ranks in all" in str(cluster.problem))
    assert not pool.ready.is_set()
    machines.kill("two")
    await machines.start("two")
    await at_work(pool, "one", "two")


async def test_a_workers_ranks_on_two_machines(tmp_path: Path, machines: Machines) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-llama", model)
    await machines.start("one")
    await machines.start("two")
    async with pooled(tmp_path, model, machines.address, ranks=2) as (pool, miner):
        worker, _ = await at_work(pool, "one", "two")
        assert worker.info is not None
        assert (worker.info.device, worker.info.decoder, worker.info.execution) == ("cpu+cpu", "layers", "eager")
        for pid in worker.pids:
            assert SECRET not in psutil.Process(pid).environ().values(), "what the daemon's environment has"
        found = await recompute(pool, ROUND, NONCES)
        assert found == pytest.approx(alone(str(model), "poc2", ROUND.block_hash), abs=2e-5)
        await lose_a_rank(pool, 0)
        await lose_a_rank(pool, 1)
        await lose_a_rank_that_stands_still(pool)
        await lose_a_machine(pool, machines)
        await miner.close(PATIENCE)
        assert miner.mining is not None
        done = miner.mining.checked
        assert done == worker.computed
    with contextlib.closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        found = await outbox(Outbox.begin_round, Work(ROUND, NODE), 0.0)
    gaps = sum(map(len, found.progress.gaps()))
    assert found.checked == done == found.progress.end - gaps, "each once"
