"""Workers from a real Ray cluster: three raylets of this machine are its machines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

import psutil
import pytest
import structlog

from pocd.check.cluster import check_cluster
from pocd.clock import SYSTEM
from pocd.config.ray import RaySettings
from pocd.config.settings import Settings
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.pool.causes import Cause
from pocd.pool.cluster import Cluster
from pocd.pool.limits import WorkerLimits
from pocd.pool.pool import Pool
from pocd.protocol.names import BUNDLED
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.store.outbox import Outbox, Work
from pocd.store.thread import OutboxThread
from pocd.worker.messages import Load
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from pocd.mining.miner import Lease
    from pocd.pool.state import WorkerState
    from tests.support.ray_machines import Machines

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'pocd[ray]'")

NODE = Node(1, 3)
ROUND = Round("block_alpha", 1, "node_A", 1.4142, "poc2", "a model", 16)
PATIENT = WorkerLimits(batch=PATIENCE, heartbeat=PATIENCE)  # so that who is slow is not lost
MOST_IN_FLIGHT = 3 * 2 * 8  # nonces: workers, leases at each, nonces of a lease
SECRET = "whsec_c2VjcmV0"  # of no use to anybody


class Unhurried(Miner):
    """Lends each worker a few leases a second: they show as much, and leave the cores to others."""

    async def lease(self, count: int) -> Lease:
        await asyncio.sleep(0.2)
        return await super().lease(count)


@contextlib.asynccontextmanager
async def pooled(
    folder: Path,
    model: Path,
    address: str,
    *,
    ranks: int = 1,
    limits: WorkerLimits = PATIENT,
    variables: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[Pool, Miner]]:
    """The workers of a cluster, over a miner with one round."""
    log, events, changes = structlog.get_logger(), Events(SYSTEM), Changes()
    environment = os.environ | {"POCD_ADMIN__TOKEN_FILE": SECRET, "HF_TOKEN": SECRET} | dict(variables or {})
    settings = RaySettings(address=address)
    cluster = Cluster(settings, ranks=ranks, gpus=0, environment=environment, changed=changes.notify, log=log)
    load = Load(str(model), "float32", ("cpu",) * ranks, "poc2", 16, 8)
    with contextlib.closing(OutboxThread(folder / "outbox.db")) as outbox:
        miner = Unhurried(outbox, changes, clock=SYSTEM)
        pool = Pool(
            [load] * 64,
            miner,
            limits,
            cache=folder,
            changes=changes,
            clock=SYSTEM,
            log=log,
            events=events,
            cluster=cluster,
        )
        await miner.set_round(Work(ROUND, NODE))
        task = asyncio.create_task(pool.run())
        try:
            yield pool, miner
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def at(pool: Pool, name: str) -> WorkerState | None:
    """The worker that is ready on a machine."""
    found = [each for each in pool.workers if each.ready and each.place and each.place.node == name]
    return found[0] if found else None


async def at_work(pool: Pool, *names: str) -> list[WorkerState]:
    """Wait until a worker on each of the machines computes."""
    await until(lambda: all(at(pool, name) for name in names))
    workers = [worker for name in names if (worker := at(pool, name))]
    before = [worker.computed for worker in workers]
    await until(lambda: all(worker.computed > was for worker, was in zip(workers, before, strict=True)))
    return workers


def process(worker: WorkerState) -> psutil.Process:
    """The process of a worker, which runs on this machine too."""
    (pid,) = worker.pids
    return psutil.Process(pid)


def has_ended(each: psutil.Process) -> bool:
    return bool(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE)


async def lose_a_process_and_an_actor(pool: Pool) -> None:
    one, two = await at_work(pool, "one", "two")
    killed, orphan = process(one), process(two)
    actor = orphan.parent()
    assert actor is not None
    killed.kill()
    actor.kill()
    await until(lambda: one.causes[Cause.CRASH] and two.causes[Cause.CLUSTER])
    assert one.last_error == f"worker process {killed.pid} was killed by signal 9"
    assert str(two.last_error).startswith("Ray lost the worker's actor: ")
    await until(lambda: has_ended(orphan))


async def lose_the_bridge(pool: Pool, cluster: Cluster) -> None:
    workers = await at_work(pool, "one", "two")
    lost = [worker.causes[Cause.CLUSTER] for worker in workers]
    orphans = [process(worker) for worker in workers]
    assert cluster.pid is not None
    psutil.Process(cluster.pid).kill()
    await until(lambda: all(each.causes[Cause.CLUSTER] > was for each, was in zip(workers, lost, strict=True)))
    assert workers[0].last_error == "the bridge to the cluster ended"
    await until(lambda: cluster.problem == "the bridge to the cluster was killed by signal 9")
    await until(lambda: all(map(has_ended, orphans)))
    await at_work(pool, "one", "two")
    assert cluster.problem is None


async def come_with_another_model(pool: Pool, machines: Machines, model: Path) -> None:
    aside = model.with_name("aside")
    model.rename(aside)
    shutil.copytree(BUNDLED / "tiny-qwen3", model)
    await machines.start("three")
    await until(lambda: len(pool.workers) == 3 and pool.workers[2].causes[Cause.CONFIGURATION])
    assert "give all machines the same model" in str(pool.workers[2].last_error)
    await at_work(pool, "one", "two")
    shutil.rmtree(model)
    aside.rename(model)


async def wait_for_nobody(pool: Pool) -> None:
    one, two = await at_work(pool, "one", "two")
    slow, lives = process(two), sum(two.causes.values())
    slow.suspend()
    await at_work(pool, "one")
    before = one.computed
    await until(lambda: one.computed >= before + MOST_IN_FLIGHT)
    held = two.computed
    slow.resume()
    await until(lambda: two.computed > held)
    assert (process(two), sum(two.causes.values())) == (slow, lives), "it was slow, and is the same"


async def cut_a_machine_off(pool: Pool, cluster: Cluster, machines: Machines) -> None:
    *_, three = await at_work(pool, "one", "two", "three")
    orphan, lost = process(three), three.causes[Cause.CLUSTER]
    machines.cut("three")
    await until(lambda: three.causes[Cause.CLUSTER] > lost)
    await until(lambda: "room for 2 of 3 workers" in str(cluster.problem))
    await at_work(pool, "one", "two")
    machines.heal("three")
    await until(lambda: has_ended(orphan))  # Ray ends a machine that it has given up


async def be_looked_at(machines: Machines) -> None:
    settings = Settings.model_validate(
        {
            "node": {"public_key": "k"},
            "chain": {"urls": ["http://127.0.0.1:1"]},
            "model": {"device": "cpu", "parallel": 2},
            "worker": {"engine": "ray"},
            "ray": {"address": machines.address},
        }
    )
    room, *each = await check_cluster(settings)
    assert room.level == "green"
    assert "2 machines at" in room.text
    assert "room for 1 worker of 2 ranks, each of 1 core, 1 of them on several machines" in room.text
    assert sorted((found.name, found.level) for found in each) == [("machine one", "green"), ("machine two", "green")]


async def lose_a_machine(pool: Pool, cluster: Cluster, machines: Machines) -> None:
    _, two = await at_work(pool, "one", "two")
    orphan, lost = process(two), two.causes[Cause.CLUSTER]
    machines.kill_raylet("two")
    await until(lambda: two.causes[Cause.CLUSTER] > lost)
    await until(lambda: has_ended(orphan))
    await until(lambda: "room for 1 of 3 workers" in str(cluster.problem))
    await at_work(pool, "one")


async def lose_the_head(pool: Pool, cluster: Cluster, machines: Machines) -> None:
    for name in ("three", "two", "one"):
        machines.kill(name)
    await until(lambda: not pool.ready.is_set() and "cannot be reached" in str(cluster.problem))
    await machines.start("anew")


async def test_machines_come_and_go_and_every_nonce_is_checked_once(tmp_path: Path, machines: Machines) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-llama", model)
    await machines.start("one")
    await machines.start("two")
    async with pooled(tmp_path, model, machines.address, variables=machines.variables) as (pool, miner):
        cluster = pool.cluster
        assert cluster is not None
        workers = await at_work(pool, "one", "two")
        assert cluster.pid is not None
        for each in (psutil.Process(cluster.pid), *map(process, workers)):
            assert SECRET not in each.environ().values(), "what the daemon's environment has"
        await be_looked_at(machines)
        await lose_a_process_and_an_actor(pool)
        await wait_for_nobody(pool)
        await lose_the_bridge(pool, cluster)
        await come_with_another_model(pool, machines, model)
        if machines.network:
            await cut_a_machine_off(pool, cluster, machines)
        await lose_a_machine(pool, cluster, machines)
        await lose_the_head(pool, cluster, machines)
        (last,) = await at_work(pool, "anew")
        await miner.close(PATIENCE)
        assert miner.mining is not None
        done = miner.mining.checked
        assert done == sum(worker.computed for worker in pool.workers)
        left = process(last)
    await until(lambda: has_ended(left))
    with contextlib.closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        found = await outbox(Outbox.begin_round, Work(ROUND, NODE), 0.0)
    gaps = sum(map(len, found.progress.gaps()))
    assert found.checked == done == found.progress.end - gaps, "each once"
    assert gaps <= MOST_IN_FLIGHT, "what the end took back, and no more"
    if not machines.network:
        pytest.skip("all passed, but no machine could be cut off: network namespaces need root and the command ip")
