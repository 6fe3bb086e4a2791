"""One worker of a real Ray cluster whose ranks are on two machines."""

from __future__ import annotations

import contextlib
import re
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

    from pocd.pool.cluster import Cluster
    from pocd.pool.pool import Pool
    from pocd.pool.state import WorkerState
    from tests.support.ray_machines import Machines

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'pocd[ray]'")


async def at_work(pool: Pool, name: str) -> WorkerState:
    """Wait until the worker computes on machines of these names."""
    (worker,) = pool.workers
    await until(lambda: worker.ready and worker.place and worker.place.node == name)
    before = worker.computed
    await until(lambda: worker.computed > before)
    return worker


def ranks_of(worker: WorkerState) -> list[psutil.Process]:
    """The processes of a worker's ranks, which all run on this machine."""
    return [psutil.Process(pid) for pid in worker.pids]


async def lose_a_rank(pool: Pool) -> None:
    worker = await at_work(pool, "one+two")
    leader, other = ranks_of(worker)
    leader.suspend()  # it could not end by itself
    other.kill()
    await until(lambda: worker.causes[Cause.CRASH])
    text = rf"rank 1 of 2 on (one|two) \([0-9.]+\): worker process {other.pid} was killed by signal 9"
    assert re.fullmatch(text, str(worker.last_error))
    await until(lambda: all(map(has_ended, [leader, other])))


async def lose_a_machine(pool: Pool, cluster: Cluster, machines: Machines) -> None:
    worker = await at_work(pool, "one+two")
    ranks, lives = ranks_of(worker), sum(worker.causes.values())
    machines.kill_raylet("two")
    await until(lambda: sum(worker.causes.values()) > lives)
    assert re.match(r"rank [01] of 2 on (one|two) \(", str(worker.last_error)), "whichever noticed first"
    await until(lambda: all(map(has_ended, ranks)))
    await until(lambda: "room for 0 of 1 workers of 2 ranks, and for 1 ranks in all" in str(cluster.problem))
    assert not pool.ready.is_set()
    machines.kill("two")
    await machines.start("two", cpus=2)
    await at_work(pool, "two")
    assert cluster.problem is None


async def test_a_workers_ranks_on_two_machines(tmp_path: Path, machines: Machines) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-llama", model)
    await machines.start("one")
    await machines.start("two")
    variables = machines.variables
    async with pooled(tmp_path, model, machines.address, ranks=2, variables=variables) as (pool, miner):
        cluster = pool.cluster
        assert cluster is not None
        worker = await at_work(pool, "one+two")
        assert worker.info is not None
        assert (worker.info.device, worker.info.decoder, worker.info.execution) == ("cpu+cpu", "layers", "eager")
        for pid in worker.pids:
            assert SECRET not in psutil.Process(pid).environ().values(), "what the daemon's environment has"
        distances = await recompute(pool, ROUND, NONCES)
        assert distances == pytest.approx(alone(str(model), "poc2", ROUND.block_hash), abs=2e-5)
        await lose_a_rank(pool)
        await lose_a_machine(pool, cluster, machines)
        await miner.close(PATIENCE)
        assert miner.mining is not None
        done = miner.mining.checked
        assert done == worker.computed
    with contextlib.closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        found = await outbox(Outbox.begin_round, Work(ROUND, NODE), 0.0)
    gaps = sum(map(len, found.progress.gaps()))
    assert found.checked == done == found.progress.end - gaps, "each once"
