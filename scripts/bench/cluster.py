"""What workers of a Ray cluster cost beside local ones: `python -m scripts.bench.cluster --address HOST:PORT`.

The cluster is one that runs already on this machine, and takes as many workers as asked for, such as of
`RAY_worker_niceness=0 ray start --head --num-cpus=3`. Local workers and those of the cluster compute by turns, one
thread each, in batches of one size: a smaller one has more messages for the same work. Rates per second mean something
where each worker has a core and nothing else runs, rates per CPU second elsewhere too: those of W workers over one are
the share of W-fold throughput that W cores would give, as far as it is decided here and not by the machines' memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass, replace
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

LOAD = Load("bundled:tiny-llama", "float32", ("cpu",), "poc2", 64, 64)
SETTLING_SECONDS = 5.0  # after the last worker is ready


@dataclass(frozen=True, slots=True)
class Sample:
    """What some workers did in a while.

    Attributes:
        rate: Nonces per second.
        per_cpu: Nonces per CPU second of the workers' processes.
        with_path: Nonces per CPU second of the workers' processes, the bridge and the actors.
        path: CPU seconds of the bridge and the actors, as a share of the workers'.
        bridge_cpu: Share of a core that the bridge took.
        bridge_mb: Memory of the bridge that is its own, in MB.
    """

    rate: float
    per_cpu: float
    with_path: float
    path: float
    bridge_cpu: float
    bridge_mb: float


def _used(processes: Iterable[psutil.Process]) -> float:
    return sum(cpu_seconds(each.pid) for each in processes)


async def measure(workers: int, address: str | None, seconds: float, load: Load) -> Sample:
    """Have workers compute for a while.

    Args:
        workers: How many.
        address: The cluster's head; None for local workers.
        seconds: How long.
        load: What each of them loads.
    """
    changes, log = Changes(), structlog.get_logger()
    cluster = None
    if address:
        settings = RaySettings(address=address, workers=workers)
        cluster = Cluster(settings, gpus=0, environment=os.environ, changed=changes.notify, log=log)
    with tempfile.TemporaryDirectory() as name, contextlib.closing(OutboxThread(Path(name) / "outbox.db")) as outbox:
        miner = Miner(outbox, changes, clock=SYSTEM)
        pool = Pool(
            [load] * workers,
            miner,
            WorkerLimits(batch=300.0),
            cache=Path(name),
            changes=changes,
            clock=SYSTEM,
            log=log,
            events=Events(SYSTEM),
            cluster=cluster,
        )
        await miner.set_round(Work(Round("a block", 1, "a key", 1.4142, "poc2", load.model, load.seq_len), Node(0, 1)))
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
        computed / sum(used),
        (used[1] + used[2]) / used[0],
        used[1] / passed,
        sum(each.memory_full_info().uss / 1e6 for each in bridge),
    )


async def run(address: str, workers: list[int], rounds: int, seconds: float, load: Load) -> None:
    """Measure one worker and several, local and of the cluster, by turns, and print the ratios."""
    kinds = {_kind(count, at): (count, at) for count in (1, *workers) for at in (None, address)}
    found: dict[str, list[Sample]] = {name: [] for name in kinds}
    for turn in range(rounds):
        for name, (count, at) in list(kinds.items())[:: -1 if turn % 2 else 1]:
            found[name].append(await measure(count, at, seconds, load))
    table = new_table("workers", "workers", "nonces/s", "per CPU second", "path's CPU", "bridge's CPU", "bridge's MB")
    for name, samples in found.items():
        middle = sorted(samples, key=lambda each: each.per_cpu)[len(samples) // 2]
        shares = (f"{100 * middle.path:.2f} %", f"{100 * middle.bridge_cpu:.2f} %", f"{middle.bridge_mb:.0f}")
        table.add_row(name, f"{middle.rate:.1f}", f"{middle.per_cpu:.1f}", *shares)
    show(table)
    ratios = new_table("ratios", "of", "median", "range")
    units = {"rate": "a second", "per_cpu": "a CPU second", "with_path": "a CPU second, bridge and actors with them"}
    for what, unit in units.items():
        of = {name: [getattr(each, what) for each in samples] for name, samples in found.items()}
        for count in (1, *workers):
            ours = _kind(count, address)
            if count > 1:
                ratios.add_row(f"{ours} to 1, nonces {unit}", *ratio(of[ours], of[_kind(1, address)]))
            ratios.add_row(f"{ours} to {count} local, nonces {unit}", *ratio(of[ours], of[_kind(count, None)]))
    show(ratios)


def _kind(count: int, address: str | None) -> str:
    return f"{count} {'of the cluster' if address else 'local'}"


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, help="the cluster's head, HOST:PORT")
    parser.add_argument("--workers", type=int, nargs="*", default=[2], help="how many beside one")
    parser.add_argument("--batch", type=int, default=LOAD.batch_size, help="nonces of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0)
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    os.environ["OMP_NUM_THREADS"] = "1"  # of local workers, as Ray does for those with one core
    load = replace(LOAD, batch_size=given.batch)
    asyncio.run(run(given.address, given.workers, given.rounds, given.seconds, load))


if __name__ == "__main__":
    main()
