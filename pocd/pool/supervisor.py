"""One life of a worker: its processes are started, fed, watched and ended."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NoReturn

from pocd.pool.causes import Cause, WorkerError, WorkerRefusedError
from pocd.pool.feeder import Feeder, take_batch_size
from pocd.pool.processes import FailedError
from pocd.tasks import run_forever, within
from pocd.worker.messages import BatchShrunk, CardIdentity, Heartbeat, Ready, Stage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from structlog.typing import FilteringBoundLogger

    from pocd.mining.miner import Miner
    from pocd.observe.events import Events
    from pocd.pool.limits import WorkerLimits
    from pocd.pool.processes import Ended, RankLink, Running
    from pocd.pool.recomputations import Recomputations
    from pocd.pool.state import WorkerState
    from pocd.worker.messages import Load


class Supervisor:
    """Gives one worker its lives, and records in its state what happens in them."""

    def __init__(
        self,
        state: WorkerState,
        load: Load,
        miner: Miner,
        limits: WorkerLimits,
        recomputations: Recomputations,
        *,
        start: Callable[[Load, FilteringBoundLogger], Awaitable[Running]],
        accept: Callable[[Ready], None],
        changed: Callable[[], None],
        log: FilteringBoundLogger,
        events: Events,
    ) -> None:
        self.state = state
        self._load = load
        self._miner = miner
        self._limits = limits
        self._recomputations = recomputations
        self._start = start
        self._accept = accept
        self._changed = changed
        self._log = log
        self._events = events

    @property
    def load(self) -> Load:
        """What the worker's next life is to load: as in the first one, but for what did not fit or failed since."""
        return dataclasses.replace(self._load, batch_size=self.state.most, capture=self.state.capture)

    async def live(self) -> NoReturn:
        """Start the worker's processes, have them fed until one fails, and end them.

        Raises:
            WorkerError: The life ended.
        """
        self.state.start()
        try:
            await self._live()
        finally:
            self.state.end()

    async def _live(self) -> NoReturn:
        try:
            processes = await self._start(self.load, self._log)
        except OSError as error:
            raise WorkerError(Cause.CRASH, f"worker could not be started: {error}") from error
        self.state.pids, self.state.place = processes.pids, processes.place
        where = {"node": processes.place.node, "address": processes.place.address} if processes.place else {}
        self._log.info("worker started", action="worker_start", pids=processes.pids, model=self._load.model, **where)
        try:
            await self._watch(processes)
        except (OSError, EOFError) as error:
            ended = await processes.end(self._limits.exit)
            raise WorkerError(ended.cause, ended.text) from error
        except FailedError as error:
            raise self._failure(error, await processes.end(self._limits.exit)) from error
        finally:
            self.state.pids, self.state.place = [], None
            await processes.end(self._limits.exit)

    async def _watch(self, processes: Running) -> NoReturn:
        """Feed the leading rank, and receive the other ranks' heartbeats, until one of them fails."""
        leader, *others = processes.links
        name = f"worker {self.state.number}"
        followers = {f"{name}: rank {rank}": self._until_ready(link, rank) for rank, link in enumerate(others, start=1)}
        await run_forever(
            {f"{name}: feeding": self._feed(leader), **followers},
            self._log,
            foreseen=(OSError, EOFError, FailedError),
        )

    async def _feed(self, leader: RankLink) -> NoReturn:
        try:
            info = await within(self._limits.load, self._until_ready(leader, rank=0))
        except TimeoutError:
            message = f"worker did not load {self._load.model!r} within {self._limits.load:.0f} s, killed"
            raise WorkerError(Cause.LOADING, message) from None
        self._accept(info)
        self.state.become_ready(info)
        self._changed()
        self._log.info("worker ready", action="worker_ready", pids=self.state.pids, **dataclasses.asdict(info))
        if self.state.rounding_alarm:
            self._log.warning(self.state.rounding_alarm, action="rounding")
        if self.state.alarm:
            self._log.warning(self.state.alarm, action="execution")
        self._events.publish("worker", what="ready", worker=self.state.number)
        await Feeder(leader, self.state, self._miner, self._recomputations, self._limits, log=self._log).run()

    async def _until_ready(self, link: RankLink, rank: int) -> Ready:
        """Receive a rank's messages until it reports that it is ready, which only the leading one ever does."""
        limit = self._limits.start
        while True:
            message = await link.receive(limit)
            if isinstance(message, Ready):
                return message
            if isinstance(message, Stage):
                if rank == 0:
                    self.state.load(message.text)
                    self._changed()
                    self._log.info(f"worker: {message.text}", action="worker_stage")
            elif isinstance(message, CardIdentity):
                self.state.cards[self.state.devices[rank]] = message
            else:
                assert isinstance(message, Heartbeat), f"unexpected {message}"
            limit = self._limits.heartbeat

    def _failure(self, error: FailedError, ended: Ended) -> WorkerError:
        """Return what follows from the failure that a worker reported, and from how its processes ended."""
        if error.kind in {"fault", "crash"}:  # a rank that was killed is why the others report one
            return (
                WorkerError(ended.cause, ended.text) if ended.by_force else WorkerError(Cause(error.kind), str(error))
            )
        if error.kind == "capture":
            self.state.capture = False
            return WorkerError(Cause.FAULT, f"{error}; from now on batches are compiled, and not captured")
        if error.kind != "memory":
            return WorkerRefusedError(Cause(error.kind), str(error))
        state = self.state
        if self._load.is_auto and state.batch_size > 1 and (self._load.is_split or state.info is not None):
            # Ranks that went out of step cannot go on, nor can compiled code; so the next life takes half at most.
            take_batch_size(BatchShrunk(state.batch_size // 2, str(error)), state, self._log)
            return WorkerError(Cause.MEMORY, str(error))
        if state.info is not None:  # it did fit, so whatever took the memory may give it back
            return WorkerError(Cause.MEMORY, str(error))
        return WorkerRefusedError(Cause.CONFIGURATION, str(error))
