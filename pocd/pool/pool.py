"""All workers of the daemon: keeps each alive, leaves out what fails again and again, ends when none can work."""

from __future__ import annotations

import asyncio
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pocd.observe.rates import RateWindow
from pocd.pool.causes import WorkerError
from pocd.pool.recomputations import Recomputations
from pocd.pool.state import WorkerState
from pocd.pool.supervisor import Supervisor
from pocd.process import WAITING
from pocd.tasks import run_forever

if TYPE_CHECKING:
    from collections.abc import Sequence

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.config.settings import Settings
    from pocd.mining.miner import Miner
    from pocd.observe.changes import Changes
    from pocd.observe.events import Events
    from pocd.pool.limits import WorkerLimits
    from pocd.worker.messages import Load, Ready


ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # the second one before torch 2.9


class Pool:
    """Runs the workers. A round's nonces go to whichever is idle, by the miner's one cursor.

    Attributes:
        workers: The state of each worker, in the order of their numbers.
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
    ) -> None:
        assert loads, "there is at least one worker"
        self._changes = changes
        self._clock = clock
        self._log = log
        self._events = events
        self.recomputations = Recomputations()
        self.ready = asyncio.Event()
        self.last_error: str | None = None
        self.workers = [
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
                environment=partial(environment, load, loads, cache),
                changed=self._changed,
                clock=clock,
                log=log.bind(worker=worker.number) if len(loads) > 1 else log,
                events=events,
            )
            for worker, load in zip(self.workers, loads, strict=True)
        ]

    @property
    def info(self) -> Ready | None:
        """What the first worker that was ever ready reported; all workers run the same model."""
        return next((worker.info for worker in self.workers if worker.info), None)

    def card_uuids(self) -> set[str]:
        """Return the identities of the cards that workers use, as far as workers have reported them."""
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
            WorkerRefusedError: The last life of each worker ended because it cannot work.
        """
        await run_forever({f"worker {each.state.number}": self._keep(each) for each in self._supervisors}, self._log)

    async def _keep(self, supervisor: Supervisor) -> NoReturn:
        """Give a worker one life after another."""
        worker = supervisor.state
        while True:
            began = self._clock.monotonic()
            try:
                await supervisor.live()
            except WorkerError as error:
                lived = self._clock.monotonic() - began
                delay = worker.fail(error, lived=lived, others_work=any(other.ready for other in self.workers))
                if all(each.unusable for each in self.workers):
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

    def _changed(self) -> None:
        """Set or clear `ready` after a worker changed its phase, and notify who waits for changes."""
        if any(worker.ready for worker in self.workers):
            self.ready.set()
        else:
            self.ready.clear()
        self._changes.notify()


def environment(load: Load, loads: Sequence[Load], cache: Path) -> dict[str, str]:
    """Return the environment of a worker's processes. What the daemon's own environment sets stays, but for its cards.

    All but PYTHONOPTIMIZE: transformers reads its own docstrings, which Python leaves out with -OO.

    Args:
        load: What the worker loads.
        loads: What each of the workers loads.
        cache: The folder for what compilers make, which outlives the workers.

    Raises:
        OSError: The system has no folder for temporary files, and none can be made in the cache.
    """
    variables = {
        **WAITING,
        "TMPDIR": str(_temporary_folder(cache / "tmp")),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "GLOO_SOCKET_IFNAME": "lo",  # ranks of one host need no network
        "NCCL_SOCKET_IFNAME": "lo",
    }
    if not ALLOCATOR & os.environ.keys():
        # Else blocks that batches of several shapes leave behind do not serve one another.
        variables |= dict.fromkeys(ALLOCATOR, "expandable_segments:True")
    on_cpu = sum(each.devices.count("cpu") for each in loads)
    if on_cpu > 1:  # they share the cores, and each would start a thread for every core
        variables["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // on_cpu))
    dropped = {"TMPDIR", "PYTHONOPTIMIZE"}
    variables |= {name: value for name, value in os.environ.items() if name not in dropped}
    if load.cards or "cpu" in load.devices:  # no library is to take a GPU that is not the worker's
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(load.cards)
    return variables


def _temporary_folder(otherwise: Path) -> Path:
    """Return the folder for temporary files: the system's, or where that has none that can be written, another one."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        otherwise.mkdir(parents=True, exist_ok=True)
        return otherwise


def cache_folder(settings: Settings) -> Path:
    """Return the folder for compiled code: as configured, systemd's CacheDirectory=, or beside the store."""
    if settings.worker.cache is not None:
        return settings.worker.cache
    given = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else settings.store.path.parent / "cache"
