"""What workers of a Ray cluster cost beside local ones: `python -m scripts.bench.cluster --address HOST:PORT`.

The cluster is one that runs already on this machine, with a core for each worker, such as of
`RAY_worker_niceness=0 ray start --head --num-cpus=2`. Local workers and those of the cluster compute by turns, one
thread each. Rates per second mean something where nothing else runs, rates per CPU second of the workers elsewhere too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import structlog

from pocd.clock import SYSTEM
from pocd.config.ray import RaySettings
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.pool.cluster import Cluster
from pocd.pool.limits import WorkerLimits
from pocd.pool.pool import Pool
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.store.outbox import Work
from pocd.store.thread import OutboxThread
from pocd.worker.messages import Load
from scripts.bench.measuring import cpu_seconds, new_table, ratio, show

if TYPE_CHECKING:
    from collections.abc import Iterable

LOAD = Load("bundled:tiny-llama", "float32", ("cpu",), "poc2", 64, 1024, is_auto=True)
SETTLING_SECONDS = 5.0  # after the last worker is ready


@dataclass(frozen=True, slots=True)
class Sample:
    """What some workers did in a while.

    Attributes:
        rate: Nonces per second.
        per_cpu: Nonces per CPU second of the workers' processes.
        path: CPU seconds of the bridge and the actors, as a share of the workers'.
        bridge_cpu: Share of a core that the bridge took.
        bridge_mb: Memory of the bridge that is its own, in MB.
    """

    rate: float
    per_cpu: float
    path: float
    bridge_cpu: float
    bridge_mb: float


def _used(processes: Iterable[psutil.Process]) -> float:
    return sum(cpu_seconds(each.pid) for each in processes)


async def measure(workers: int, address: str | None, seconds: float) -> Sample:
    """Have workers compute for a while.

    Args:
        workers: How many.
        address: The cluster's head; None for local workers.
        seconds: How long.
    """
    changes, log = Changes(), structlog.get_logger()
    cluster = None
    if address:
        settings = RaySettings(address=address, workers=workers)
        cluster = Cluster(settings, gpus=0, environment=os.environ, changed=changes.notify, log=log)
    with tempfile.TemporaryDirectory() as name, contextlib.closing(OutboxThread(Path(name) / "outbox.db")) as outbox:
        miner = Miner(outbox, changes, clock=SYSTEM)
        pool = Pool(
            [LOAD] * workers,
            miner,
            WorkerLimits(batch=300.0),
            cache=Path(name),
            changes=changes,
            clock=SYSTEM,
            log=log,
            events=Events(SYSTEM),
            cluster=cluster,
        )
        await miner.set_round(Work(Round("a block", 1, "a key", 1.4142, "poc2", LOAD.model, 64), Node(0, 1)))
        running = asyncio.create_task(pool.run())
        try:
            while not all(each.ready for each in pool.workers):
                assert not running.done(), running
                await asyncio.sleep(0.2)
            await asyncio.sleep(SETTLING_SECONDS)
            return await _sample(pool, seconds)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


async def _sample(pool: Pool, seconds: float) -> Sample:
    processes = [psutil.Process(each.pids[0]) for each in pool.workers]
    bridge: list[psutil.Process] = []
    actors: list[psutil.Process] = []
    if pool.cluster:
        bridge = [psutil.Process(pool.cluster.pid)]
        actors = [parent for each in processes if (parent := each.parent())]
    groups = (processes, bridge, actors)
    before, done, began = (
        [_used(group) for group in groups],
        sum(each.computed for each in pool.workers),
        SYSTEM.monotonic(),
    )
    await asyncio.sleep(seconds)
    used = [_used(group) - was for group, was in zip(groups, before, strict=True)]
    passed, computed = SYSTEM.monotonic() - began, sum(each.computed for each in pool.workers) - done
    return Sample(
        computed / passed,
        computed / used[0],
        (used[1] + used[2]) / used[0],
        used[1] / passed,
        sum(each.memory_full_info().uss / 1e6 for each in bridge),
    )


async def run(address: str, workers: int, rounds: int, seconds: float) -> None:
    """Measure one worker and several, local and of the cluster, by turns, and print the ratios."""
    kinds = {
        f"{count} {'of the cluster' if at else 'local'}": (count, at)
        for count in (1, workers)
        for at in (None, address)
    }
    found: dict[str, list[Sample]] = {name: [] for name in kinds}
    for turn in range(rounds):
        for name, (count, at) in list(kinds.items())[:: -1 if turn % 2 else 1]:
            found[name].append(await measure(count, at, seconds))
    table = new_table("workers", "workers", "nonces/s", "per CPU second", "path's CPU", "bridge's CPU", "bridge's MB")
    for name, samples in found.items():
        middle = sorted(samples, key=lambda each: each.per_cpu)[len(samples) // 2]
        shares = (f"{100 * middle.path:.2f} %", f"{100 * middle.bridge_cpu:.2f} %", f"{middle.bridge_mb:.0f}")
        table.add_row(name, f"{middle.rate:.1f}", f"{middle.per_cpu:.1f}", *shares)
    show(table)
    several, one = (f"{count} of the cluster" for count in (workers, 1))
    ratios = new_table("ratios", "of", "median", "range")
    for what in ("rate", "per_cpu"):
        of = {name: [getattr(each, what) for each in samples] for name, samples in found.items()}
        unit = "a second" if what == "rate" else "a CPU second"
        ratios.add_row(f"{several} to {one}, nonces {unit}", *ratio(of[several], of[one]))
        ratios.add_row(f"{several} to {workers} local, nonces {unit}", *ratio(of[several], of[f"{workers} local"]))
    show(ratios)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, help="the cluster's head, HOST:PORT")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0)
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(run(given.address, given.workers, given.rounds, given.seconds))


if __name__ == "__main__":
    main()
