"""One life of a worker after another: starts its processes, has it fed, watches it, and ends it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pocd.observe.rates import RateWindow
from pocd.pool.causes import Cause, WorkerError, WorkerRefusedError
from pocd.pool.feeder import Feeding
from pocd.pool.processes import FailedError, Processes
from pocd.tasks import start
from pocd.worker.messages import BatchSize, Card, Heartbeat, Ready, Stage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from structlog.typing import FilteringBoundLogger

    from pocd.mining.miner import Miner
    from pocd.observe.events import Events
    from pocd.pool.processes import Ended, Link
    from pocd.pool.recomputations import Recomputations
    from pocd.worker.messages import Load, RoundBegun


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the worker may be silent, in seconds.

    Attributes:
        start: From its start to its first sign of life (it imports torch).
        load: From there to the loaded model (a hub model may have to be downloaded).
        heartbeat: Between two signs of life.
        batch: For one lease; longer means a hung device.
        exit: From the end of its work to the end of its process.
    """

    batch: float
    start: float = 300.0
    load: float = 3600.0
    heartbeat: float = 30.0
    exit: float = 3.0


class Supervisor:
    """Looks after one worker. Its public attributes are what status shows.

    Attributes:
        number: Counts the daemon's workers from 0.
        devices: One for each rank.
        ready: Whether it has a model ready.
        info: What it said when it was ready last.
        stage: What it does until it is ready.
        cards: Those of its devices that are GPUs, once they have told.
        pids: Of its processes, the leading rank's first.
        causes: Why it ended, and how often.
        last_error: Why it ended last.
        last_refusal: Why the last batch that has no result has none.
        recomputations: What is wanted beside what is mined.
        computed: Distances that it computed for what is mined.
        computed_rate: Of these.
    """

    def __init__(
        self,
        number: int,
        load: Load,
        miner: Miner,
        limits: Limits,
        recomputations: Recomputations,
        *,
        environment: Mapping[str, str],
        changed: Callable[[], Awaitable[None]],
        clock: Callable[[], float],
        log: FilteringBoundLogger,
        events: Events,
    ) -> None:
        self.number = number
        self.devices = load.devices
        self.recomputations = recomputations
        self._load = load
        self._miner = miner
        self._limits = limits
        self._environment = environment
        self._changed = changed
        self._clock = clock
        self._log = log
        self._events = events
        self._lease_ids = itertools.count()
        self.ready = False
        self.info: Ready | None = None
        self.stage: str | None = None
        self.cards: dict[str, Card] = {}
        self.pids: list[int] = []
        self.causes: Counter[Cause] = Counter()
        self.last_error: str | None = None
        self.last_refusal: str | None = None
        self.computed = 0
        self.computed_rate = RateWindow(clock)

    @property
    def device(self) -> str:
        """Its devices in one word."""
        return "+".join(self.devices)

    @property
    def batch_size(self) -> int:
        """Nonces per batch; where the worker had to shrink it, that is remembered across its restarts."""
        return self._load.batch_size

    async def live(self) -> None:
        """Start the worker, and feed it until it fails.

        Raises:
            WorkerError: Always, unless it is cancelled; `ready` still tells whether it got that far.
        """
        self.stage = "starting"
        try:
            await self._live()
        except WorkerError as error:
            self.stage = None
            self.causes[error.cause] += 1
            self.last_error = str(error)
            raise

    async def _live(self) -> None:
        try:
            processes = await Processes.start(self._load, self._environment)
        except OSError as error:
            raise WorkerError(Cause.CRASH, f"worker could not be started: {error}") from error
        self.pids = processes.pids
        self._log.info("worker started", action="worker_start", pids=self.pids, model=self._load.model)
        try:
            await self._watch(processes)
        except (OSError, EOFError) as error:
            raise WorkerError(Cause.CRASH, (await processes.end(self._limits.exit)).text) from error
        except FailedError as error:
            raise self._failure(error, await processes.end(self._limits.exit)) from error
        finally:
            self.pids = []
            await processes.end(self._limits.exit)

    async def _watch(self, processes: Processes) -> None:
        """Feed the leading rank, and hear the others' signs of life, until one of them fails."""
        leader, *others = processes.links
        try:
            async with asyncio.TaskGroup() as group:
                begin = partial(start, group, log=self._log, foreseen=(OSError, EOFError, FailedError))
                for rank, link in enumerate(others, start=1):
                    begin(f"worker {self.number}: rank {rank}", self._hear(link, rank))
                begin(f"worker {self.number}: feeding", self._feed(leader))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first one is the cause; the group cancelled the others

    async def _feed(self, leader: Link) -> None:
        try:
            async with asyncio.timeout(self._limits.load):
                self.info = await self._hear(leader, rank=0)
        except TimeoutError:
            message = f"worker did not load {self._load.model!r} within {self._limits.load:.0f} s, killed"
            raise WorkerError(Cause.LOADING, message) from None
        self.take_batch_size(self.info.batch_size)
        self.stage = None
        self.ready = True
        await self._changed()
        self._log.info("worker ready", action="worker_ready", pids=self.pids, **dataclasses.asdict(self.info))
        self._events.publish("worker", what="ready", worker=self.number)
        feeding = Feeding(leader, self, self._miner, self._limits, self._lease_ids, clock=self._clock, log=self._log)
        await feeding.run()

    async def _hear(self, link: Link, rank: int) -> Ready:
        """Hear a rank's signs of life until it is ready, which no other than the leading one will be."""
        limit = self._limits.start
        while True:
            message = await link.receive(limit)
            if isinstance(message, Ready):
                return message
            if isinstance(message, Stage):
                if rank == 0:
                    self.stage = message.text
                    await self._changed()
                    self._log.info(f"worker: {message.text}", action="worker_stage")
            elif isinstance(message, Card):
                self.cards[self.devices[rank]] = message
            else:
                assert isinstance(message, Heartbeat), f"unexpected {message}"
            limit = self._limits.heartbeat

    def _failure(self, error: FailedError, ended: Ended) -> WorkerError:
        """Say what follows from a worker's last word, and from how its processes ended."""
        if error.kind == "fault":  # a rank that was killed is why the others say so
            return WorkerError(Cause.CRASH, ended.text) if ended.by_signal else WorkerError(Cause.FAULT, str(error))
        if error.kind != "memory":
            return WorkerRefusedError(Cause(error.kind), str(error))
        if self._load.shrink and self.batch_size > 1 and (self._load.is_split or self.info is not None):
            # One rank cannot halve alone, nor can compiled code; so the next life begins with half.
            self.memory_became_short(BatchSize(self.batch_size // 2, str(error)))
            return WorkerError(Cause.MEMORY, str(error))
        if self.info is not None:  # it did fit, so whatever took the memory may give it back
            return WorkerError(Cause.MEMORY, str(error))
        return WorkerRefusedError(Cause.CONFIGURATION, str(error))

    def count(self, distances: int) -> None:
        """Count what it computed for what is mined."""
        self.computed += distances
        self.computed_rate.add(distances)

    def take_batch_size(self, batch_size: int) -> None:
        """Take over the batch size that the worker found to fit."""
        self._load = dataclasses.replace(self._load, batch_size=batch_size)

    def memory_became_short(self, message: BatchSize) -> None:
        """Take over the worker's new batch size, and say so."""
        self._log.warning(
            f"{message.reason}; batches are of {message.size} nonces now", action="batch_size", size=message.size
        )
        self.take_batch_size(message.size)

    def round_begun(self, message: RoundBegun) -> None:
        """Say so where a round is run in another way than the worker said."""
        assert self.info is not None, "a worker that computes is ready"
        if message.execution != self.info.execution:
            self._log.warning(
                f"this round runs {message.execution}: {message.execution_reason}",
                action="execution",
                round=message.round_id,
                otherwise=self.info.execution,
            )

    def batch_refused(self, reason: str) -> None:
        """Say that a batch has no result, and why."""
        self._log.error(f"batch refused: {reason}", action="batch_refused")
        self.last_refusal = reason
