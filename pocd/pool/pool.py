"""All workers of the daemon: keeps each alive, leaves out what fails again and again, ends when none can work."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocd.pool.causes import WorkerError, WorkerRefusedError
from pocd.pool.recomputations import Recomputations
from pocd.pool.supervisor import Supervisor
from pocd.process import WAITING
from pocd.tasks import start

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from pocd.mining.miner import Miner
    from pocd.observe.events import Events
    from pocd.pool.supervisor import Limits
    from pocd.worker.messages import Load, Ready

LONGEST_BACKOFF = 60.0
MOST_FAILURES = 5  # in a row, until a worker is left out, as long as another one works
LEFT_OUT_SECONDS = 1800.0  # until one that is left out is tried again


@dataclass(slots=True)
class Standing:
    """How a worker has done lately.

    Attributes:
        failures: In a row.
        left_out: Whether it is tried only now and then.
        refusal: Its last failure, where it said that it cannot work.
    """

    failures: int = 0
    left_out: bool = False
    refusal: WorkerRefusedError | None = None

    def fail(self, error: WorkerError, *, worked: bool, others_work: bool) -> float:
        """Take note of a failure; returns the seconds until the worker is started again.

        Args:
            error: Why it failed.
            worked: Whether it was ready for longer than the longest wait.
            others_work: Whether another worker is ready.
        """
        self.refusal = error if isinstance(error, WorkerRefusedError) else None
        self.failures = 1 if worked else self.failures + 1
        self.left_out = self.failures >= MOST_FAILURES and others_work
        return LEFT_OUT_SECONDS if self.left_out else min(LONGEST_BACKOFF, 2.0 ** (self.failures - 1))


class Pool:
    """Runs the workers. A round's nonces go to whichever is idle, by the miner's one cursor.

    Attributes:
        workers: In the order of their numbers.
        standings: How each has done lately.
        ready: Set while at least one has a model ready.
        last_error: Why one of them ended last.
        recomputations: What is wanted beside what is mined; put there by whoever validates.
    """

    def __init__(
        self,
        loads: Sequence[Load],
        miner: Miner,
        limits: Limits,
        *,
        cache: Path,
        clock: Callable[[], float],
        log: FilteringBoundLogger,
        events: Events,
    ) -> None:
        assert loads, "there is at least one worker"
        self._miner = miner
        self._clock = clock
        self._log = log
        self._events = events
        self.recomputations = Recomputations()
        self.ready = asyncio.Event()
        self.last_error: str | None = None
        variables = environment(loads, cache)
        self.workers = [
            Supervisor(
                number,
                load,
                miner,
                limits,
                self.recomputations,
                environment=variables,
                changed=self._changed,
                clock=clock,
                log=log.bind(worker=number) if len(loads) > 1 else log,
                events=events,
            )
            for number, load in enumerate(loads)
        ]
        self.standings = [Standing() for _ in loads]

    @property
    def info(self) -> Ready | None:
        """What the first worker that was ever ready said; they all run the same model."""
        return next((worker.info for worker in self.workers if worker.info), None)

    def card_uuids(self) -> set[str]:
        """The identities of the cards that workers use, as far as they have told."""
        return {card.uuid for worker in self.workers for card in list(worker.cards.values())}

    @property
    def batch_size(self) -> int:
        """Nonces per batch that each of the workers can take."""
        return min(worker.batch_size for worker in self.workers)

    @property
    def restarts(self) -> int:
        """How often workers ended and were started again."""
        return sum(sum(worker.causes.values()) for worker in self.workers)

    def alarm(self, worker: Supervisor) -> str | None:
        """Say that a worker fails again and again; None while it does not."""
        standing = self.standings[worker.number]
        if worker.ready or standing.failures < MOST_FAILURES:
            return None
        tried = f"left out, and tried every {LEFT_OUT_SECONDS / 60:.0f} min" if standing.left_out else "still tried"
        return f"failed {standing.failures} times in a row, {tried}; the last time: {worker.last_error}"

    async def run(self) -> None:
        """Keep the workers running until cancelled.

        Raises:
            WorkerRefusedError: All of them say that they cannot work.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for worker in self.workers:
                    start(group, f"worker {worker.number}", self._keep(worker), self._log)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first one is the cause; the group cancelled the others

    async def _keep(self, worker: Supervisor) -> None:
        standing = self.standings[worker.number]
        while True:
            began = self._clock()
            try:
                await worker.live()
            except WorkerError as error:
                worked = worker.ready and self._clock() - began > LONGEST_BACKOFF
                worker.ready = False
                delay = standing.fail(error, worked=worked, others_work=any(other.ready for other in self.workers))
                if all(each.refusal for each in self.standings):
                    raise
                await self._tell(worker, error, delay)
                await asyncio.sleep(delay)

    async def _tell(self, worker: Supervisor, error: WorkerError, delay: float) -> None:
        self.last_error = str(error)
        left_out = self.standings[worker.number].left_out
        text = "worker left out, as it fails again and again" if left_out else "worker ended, restarting"
        why = {"cause": error.cause, "reason": str(error)}
        self._log.error(text, action="worker_restart", device=worker.device, after_s=delay, **why)
        self._events.publish("worker", what="left_out" if left_out else "restarting", worker=worker.number, **why)
        await self._changed()

    async def _changed(self) -> None:
        """Heed that a worker became ready, or no longer is."""
        if any(worker.ready for worker in self.workers):
            self.ready.set()
        else:
            self.ready.clear()
        await self._miner.announce()


def environment(loads: Sequence[Load], cache: Path) -> dict[str, str]:
    """Return the environment of the workers' processes. What the daemon's own environment sets stays.

    Args:
        loads: One for each worker.
        cache: The folder for what compilers make, which outlives the workers.
    """
    variables = {
        **WAITING,
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "GLOO_SOCKET_IFNAME": "lo",  # ranks of one host need no network
        "NCCL_SOCKET_IFNAME": "lo",
    }
    on_cpu = sum(load.devices.count("cpu") for load in loads)
    if on_cpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # no library is to take a GPU that is not asked for
    if on_cpu > 1:  # they share the cores; each would start a thread for each of these
        variables["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // on_cpu))
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES" or not on_cpu}
    return variables | kept
