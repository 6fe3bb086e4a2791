"""All workers of the daemon: keeps each alive, leaves out what fails again and again, ends when none can work."""

from __future__ import annotations

import asyncio
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pocd.observe.rates import RateWindow
from pocd.pool.causes import Cause, WorkerError, WorkerRefusedError
from pocd.pool.processes import Processes
from pocd.pool.recomputations import Recomputations
from pocd.pool.state import WorkerState
from pocd.pool.supervisor import Supervisor
from pocd.tasks import run_forever
from pocd.worker.environment import environment as worker_environment

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.config.settings import Settings
    from pocd.mining.miner import Miner
    from pocd.observe.changes import Changes
    from pocd.observe.events import Events
    from pocd.pool.cluster import Cluster
    from pocd.pool.limits import WorkerLimits
    from pocd.worker.messages import Load, Ready


class Pool:
    """Runs the workers. A round's nonces go to whichever is idle, by the miner's one cursor.

    Attributes:
        cluster: The cluster that the workers come from; None where they are processes of this machine.
        ready: Set while at least one worker has a model ready.
        last_error: Why the last life of any worker ended.
        recomputations: Recomputations that whoever validates wants of the workers.
    """

    def __init__(
        self,
        loads: Sequence[Load],
        miner: Miner,
        limits: WorkerLimits,
        *,
        cache: Path,
        changes: Changes,
        clock: Clock,
        log: FilteringBoundLogger,
        events: Events,
        cluster: Cluster | None = None,
    ) -> None:
        assert loads, "there is at least one worker"
        self.cluster = cluster
        self._changes = changes
        self._clock = clock
        self._log = log
        self._events = events
        self.recomputations = Recomputations()
        self.ready = asyncio.Event()
        self.last_error: str | None = None
        self._states = [
            WorkerState(number, load.devices, load.batch_size, RateWindow(clock), is_compiling=load.compile != "never")
            for number, load in enumerate(loads)
        ]
        self._supervisors = [
            Supervisor(
                worker,
                load,
                miner,
                limits,
                self.recomputations,
                start=cluster.start if cluster else _starting(partial(environment, load, loads, cache)),
                accept=self._check_weights,
                changed=self._changed,
                log=log.bind(worker=worker.number) if len(loads) > 1 else log,
                events=events,
            )
            for worker, load in zip(self._states, loads, strict=True)
        ]

    @property
    def workers(self) -> list[WorkerState]:
        """The state of each worker, in the order of their numbers; in a cluster those that ever had room there."""
        return self._states[: max(1, self.cluster.most)] if self.cluster else self._states

    @property
    def info(self) -> Ready | None:
        """What the first worker that was ever ready reported; all workers run the same model."""
        return next((worker.info for worker in self.workers if worker.info), None)

    def card_uuids(self) -> set[str]:
        """Return the identities of this machine's cards that workers use, as far as workers have reported them."""
        if self.cluster:
            return set()
        return {card.uuid for worker in self.workers for card in list(worker.cards.values())}

    @property
    def batch_size(self) -> int:
        """Nonces per batch that each of the workers can take."""
        return min(worker.batch_size for worker in self.workers)

    @property
    def restarts(self) -> int:
        """How often workers ended and were started again."""
        return sum(sum(worker.causes.values()) for worker in self.workers)

    async def run(self) -> NoReturn:
        """Keep the workers running until cancelled.

        Raises:
            WorkerRefusedError: The last life of each worker ended because it cannot work, and no machine may come that
                can.
        """
        keepers = {f"worker {each.state.number}": self._keep(each) for each in self._supervisors}
        if self.cluster:
            keepers["cluster"] = self.cluster.run()
        await run_forever(keepers, self._log)

    async def _keep(self, supervisor: Supervisor) -> NoReturn:
        """Give a worker one life after another."""
        worker = supervisor.state
        while True:
            async with self.cluster.room(worker.number) if self.cluster else nullcontext():
                began = self._clock.monotonic()
                try:
                    await supervisor.live()
                except WorkerError as error:
                    lived = self._clock.monotonic() - began
                    delay = worker.fail(error, lived=lived, others_work=any(other.ready for other in self.workers))
                    if all(each.unusable for each in self.workers) and not self.cluster:
                        raise
                    self._report(worker, error, delay)
            await asyncio.sleep(delay)

    def _report(self, worker: WorkerState, error: WorkerError, delay: float) -> None:
        """Log and publish that a life of a worker ended, and when the next one begins."""
        self.last_error = str(error)
        text = "worker left out, as it fails again and again" if worker.left_out else "worker ended, restarting"
        what = "left_out" if worker.left_out else "restarting"
        why = {"cause": error.cause, "reason": str(error)}
        self._log.error(text, action="worker_restart", device=worker.device, after_s=delay, **why)
        self._events.publish("worker", what=what, worker=worker.number, **why)
        self._changed()

    def _check_weights(self, info: Ready) -> None:
        """Check that a worker on another machine has the weights that all others have.

        Raises:
            WorkerRefusedError: The worker has other weights.
        """
        if not self.cluster or not self.info:
            return
        expected, found = [f"{each.fingerprint} in {each.dtype}" for each in (self.info, info)]
        if found != expected:
            raise WorkerRefusedError(
                Cause.CONFIGURATION,
                f"its model {info.model} has the weights {found}, and those of the first worker that was ready are "
                f"{expected}: give all machines the same model (a hub's by model.revision), and restart pocd",
            )

    def _changed(self) -> None:
        """Set or clear `ready` after a worker changed its phase, and notify who waits for changes."""
        if any(worker.ready for worker in self.workers):
            self.ready.set()
        else:
            self.ready.clear()
        self._changes.notify()


def _starting(
    environment: Callable[[], dict[str, str]],
) -> Callable[[Load, FilteringBoundLogger], Awaitable[Processes]]:
    """Return what starts the processes of a worker of this machine."""
    return lambda load, log: Processes.start(load, environment(), log)


def environment(load: Load, loads: Sequence[Load], cache: Path) -> dict[str, str]:
    """Return the environment of the processes of a worker of this machine.

    Args:
        load: What the worker loads.
        loads: What each of the workers loads.
        cache: The folder for what compilers make, which outlives the workers.

    Raises:
        OSError: The system has no folder for temporary files, and none can be made in the cache.
    """
    on_cpu = sum(each.devices.count("cpu") for each in loads)
    # Workers on the CPU share the cores, and each would start a thread for every core.
    threads = max(1, len(os.sched_getaffinity(0)) // on_cpu) if on_cpu > 1 else None
    # No library is to take a GPU that is not the worker's.
    cards = load.cards if load.cards or "cpu" in load.devices else None
    return worker_environment(os.environ, cards=cards, cache=cache, threads=threads)


def cache_folder(settings: Settings) -> Path:
    """Return the folder for compiled code: as configured, systemd's CacheDirectory=, or beside the store."""
    if settings.worker.cache is not None:
        return settings.worker.cache
    given = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else settings.store.path.parent / "cache"
