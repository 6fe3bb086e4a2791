"""The coroutine that starts the worker process, feeds it, watches it, kills it and starts it again."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocd.compute.threads import WAITING
from pocd.delivery.outbox import Weights
from pocd.worker import messages
from pocd.worker.messages import (
    BatchSize,
    Cancel,
    Cancelled,
    Compute,
    Distances,
    Failed,
    Heartbeat,
    Load,
    Ready,
    Recompute,
    Refused,
    RoundBegun,
)

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from pocd.miner import Lease, Miner
    from pocd.observe.events import Events
    from pocd.proof import Round

IN_FLIGHT = 2  # leases at the worker: one computed, one waiting, so that the device never does
LONGEST_BACKOFF = 60.0
MOST_REFUSED_IN_A_ROW = 3  # batches without a result, until the worker is restarted
MOST_REFUSED = 100  # likewise, in one life of the worker and altogether


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


class NoResultError(Exception):
    """A recomputation has no result, and will have none."""


class WorkerLostError(Exception):
    """The worker ended before a recomputation was done; the next one may do it."""


@dataclass(frozen=True, slots=True)
class Recomputation:
    """Nonces of any round whose distances are wanted beside what is mined, at most a batch of them.

    Attributes:
        last: No more of this round is wanted.
        distances: Gets them in the order of `nonces`, or a `NoResultError`, or a `WorkerLostError`.
    """

    round: Round
    nonces: tuple[int, ...]
    last: bool
    distances: asyncio.Future[list[float]]

    def fail(self, error: NoResultError | WorkerLostError) -> None:
        """Say that there is no result, to whoever still waits for it."""
        if not self.distances.done():
            self.distances.set_exception(error)


class WorkerError(Exception):
    """The worker ended or had to be ended; starting it again may help."""


class WorkerRefusedError(Exception):
    """The worker cannot work as configured; starting it again will not help.

    Attributes:
        kind: "device" or "configuration".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Supervisor:
    """Keeps one worker alive. Its public attributes are what status shows.

    Attributes:
        recomputations: What is wanted beside what is mined; put there by whoever validates.
        last_refusal: Why the last batch that has no result has none.
    """

    def __init__(
        self,
        load: Load,
        miner: Miner,
        limits: Limits,
        *,
        clock: Callable[[], float],
        log: FilteringBoundLogger,
        events: Events,
    ) -> None:
        self._load = load
        self._miner = miner
        self._events = events
        self.recomputations: asyncio.Queue[Recomputation] = asyncio.Queue(maxsize=1)
        self._limits = limits
        self._clock = clock
        self._log = log
        self._lease_ids = itertools.count()
        self.ready = asyncio.Event()
        self.info: Ready | None = None
        self.pid: int | None = None
        self.restarts = 0
        self.last_error: str | None = None
        self.last_refusal: str | None = None

    @property
    def batch_size(self) -> int:
        """Nonces per batch; where the worker had to shrink it, that is remembered across its restarts."""
        return self._load.batch_size

    async def run(self) -> None:
        """Keep a worker running until cancelled.

        Raises:
            WorkerRefusedError: The worker says that it cannot work as configured.
        """
        failures = 0
        while True:
            began = self._clock()
            try:
                await self._one_life()
            except WorkerError as error:
                worked = self.ready.is_set()
                self.ready.clear()
                await self._miner.announce()
                self.restarts += 1
                failures = 1 if worked and self._clock() - began > LONGEST_BACKOFF else failures + 1
                self.last_error = str(error)
                delay = min(LONGEST_BACKOFF, 2.0 ** (failures - 1))
                self._log.error("worker ended, restarting", action="worker_restart", cause=str(error), after_s=delay)
                self._events.publish("worker", what="restarting", cause=str(error))
                await asyncio.sleep(delay)

    async def _one_life(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "pocd.worker.child",
                str(theirs.fileno()),
                env=WAITING | os.environ,
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
            )
        self.pid = process.pid
        reader, writer = await asyncio.open_connection(sock=ours)
        link = _Link(reader, writer)
        self._log.info("worker started", action="worker_start", pid=process.pid, model=self._load.model)
        try:
            await link.send(self._load)
            self.info = await self._until_ready(link)
            self._shrink(self.info.batch_size)
            self.ready.set()
            await self._miner.announce()
            info = dataclasses.asdict(self.info)
            self._log.info("worker ready", action="worker_ready", pid=process.pid, **info)
            self._events.publish("worker", what="ready", pid=process.pid)
            await _Feeding(link, self, self._miner, self._limits, self._lease_ids, self._clock).run()
        except (OSError, EOFError) as error:
            code = await _end(process, writer, self._limits.exit)
            raise WorkerError(f"worker process {process.pid} {_exit_text(code)}") from error
        finally:
            self.pid = None
            await _end(process, writer, self._limits.exit)

    def _shrink(self, batch_size: int) -> None:
        """Take over the batch size that the worker found to fit."""
        self._load = dataclasses.replace(self._load, batch_size=batch_size)

    def memory_became_short(self, message: BatchSize) -> None:
        """Take over the worker's new batch size, and say so."""
        self._log.warning(
            f"{message.reason}; batches are of {message.size} nonces now", action="batch_size", size=message.size
        )
        self._shrink(message.size)

    def batch_refused(self, reason: str) -> None:
        """Say that a batch has no result, and why."""
        self._log.error(f"batch refused: {reason}", action="batch_refused")
        self.last_refusal = reason

    async def _until_ready(self, link: _Link) -> Ready:
        deadline = self._clock() + self._limits.load
        limit = self._limits.start
        while self._clock() < deadline:
            message = await link.receive(limit, "did not start")
            if isinstance(message, Ready):
                return message
            assert isinstance(message, Heartbeat), f"unexpected {message}"
            limit = self._limits.heartbeat
        raise WorkerError(f"worker did not load {self._load.model!r} within {self._limits.load:.0f} s")


class _Link:
    """Messages over the socket to one worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, message: messages.Message) -> None:
        self._writer.write(messages.encode(message))
        await self._writer.drain()

    async def receive(self, limit: float, silence: str) -> messages.Message:
        """Read one message; a worker that says it failed, or nothing for `limit` seconds, raises."""
        try:
            # Not asyncio.wait_for: before Python 3.12 it can swallow a cancellation.
            async with asyncio.timeout(limit):
                message = await messages.receive(self._reader)
        except TimeoutError:
            raise WorkerError(f"worker {silence} for {limit:.0f} s, killed") from None
        if isinstance(message, Failed):
            raise WorkerRefusedError(message.kind, message.message)
        return message


class _Feeding:
    """A ready worker at work: leases go out, distances come back. Ends only by an exception."""

    def __init__(
        self,
        link: _Link,
        supervisor: Supervisor,
        miner: Miner,
        limits: Limits,
        lease_ids: itertools.count[int],
        clock: Callable[[], float],
    ) -> None:
        self._link = link
        self._supervisor = supervisor
        self._miner = miner
        self._limits = limits
        self._lease_ids = lease_ids
        self._clock = clock
        self._refused_in_a_row = 0
        self._refused = 0
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._in_flight: dict[int, Lease] = {}
        self._recomputing: dict[int, Recomputation] = {}
        self._progress_at = clock()

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send())
                group.create_task(self._send_recomputations())
                group.create_task(self._receive())
                group.create_task(self._cancel_replaced())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first one is the cause; the group cancelled the others
        finally:
            for recomputation in self._recomputing.values():
                recomputation.fail(WorkerLostError("the worker ended"))
            for lease in self._in_flight.values():
                await self._miner.give_back(lease)
            self._miner.retry_refused()

    async def _send(self) -> None:
        while True:
            await self._slots.acquire()
            lease = await self._miner.lease(self._supervisor.batch_size)
            number = self._begin()
            self._in_flight[number] = lease
            nonces = lease.nonces
            await self._link.send(Compute(number, lease.mining.round, nonces.start, nonces.step, len(nonces)))

    async def _send_recomputations(self) -> None:
        """Pass recomputations on, one at a time, so that between two of them there is a batch of what is mined."""
        while True:
            recomputation = await self._supervisor.recomputations.get()
            number = self._begin()
            self._recomputing[number] = recomputation
            nonces = list(recomputation.nonces)
            await self._link.send(Recompute(number, recomputation.round, nonces, recomputation.last))
            await asyncio.wait([recomputation.distances])

    def _begin(self) -> int:
        """Number what is given to the worker next; where it was idle, the time for a batch begins now."""
        if not self._in_flight and not self._recomputing:
            self._progress_at = self._clock()
        return next(self._lease_ids)

    async def _cancel_replaced(self) -> None:
        """Take back what waits at the worker for a round that is no longer the one to mine."""
        while True:
            await self._miner.until_replaced(await self._miner.until_mining())
            stale = [number for number, lease in self._in_flight.items() if lease.mining is not self._miner.current]
            if stale:
                await self._link.send(Cancel(through=max(stale)))

    async def _receive(self) -> None:
        while True:
            message = await self._link.receive(self._limits.heartbeat, "gave no sign of life")
            if isinstance(message, Distances | Refused) and message.id in self._recomputing:
                self._recomputed(message)
            elif isinstance(message, Distances):
                lease = self._finished(message.id)
                self._refused_in_a_row = 0
                # Shielded: when this task is cancelled, what was computed is committed and counted all the same.
                assert self._supervisor.info is not None, "a worker that computes is ready"
                weights = Weights(self._supervisor.info.fingerprint, self._supervisor.info.dtype)
                await asyncio.shield(self._miner.complete(lease, message.distances, weights))
            elif isinstance(message, Refused):
                await self._refuse(self._finished(message.id), message.reason)
            elif isinstance(message, BatchSize):
                self._supervisor.memory_became_short(message)
            elif isinstance(message, Cancelled):
                self._slots.release()
                await self._miner.give_back(self._in_flight.pop(message.id))
            elif isinstance(message, RoundBegun):
                self._round_begun(message)
            else:
                assert isinstance(message, Heartbeat), f"unexpected {message}"
            busy = self._in_flight or self._recomputing
            if busy and self._clock() - self._progress_at > self._limits.batch:
                raise WorkerError(f"worker finished no batch within {self._limits.batch:.0f} s, killed")

    def _round_begun(self, message: RoundBegun) -> None:
        for lease in self._in_flight.values():
            if lease.mining.round.id == message.round_id:
                lease.mining.expected_valid_rate = message.expected_valid_rate

    def _recomputed(self, message: Distances | Refused) -> None:
        self._progress_at = self._clock()
        recomputation = self._recomputing.pop(message.id)
        if isinstance(message, Refused):
            recomputation.fail(NoResultError(message.reason))
        elif not recomputation.distances.done():
            recomputation.distances.set_result(message.distances)

    def _finished(self, number: int) -> Lease:
        self._progress_at = self._clock()
        self._slots.release()
        return self._in_flight.pop(number)

    async def _refuse(self, lease: Lease, reason: str) -> None:
        """Set a lease aside that has no result; too many of them end the worker."""
        self._supervisor.batch_refused(reason)
        await self._miner.refuse(lease)
        self._refused += 1
        self._refused_in_a_row += 1
        if self._refused_in_a_row == MOST_REFUSED_IN_A_ROW:
            raise WorkerError(f"worker gave no result for {MOST_REFUSED_IN_A_ROW} batches in a row, killed: {reason}")
        if self._refused == MOST_REFUSED:
            raise WorkerError(f"worker gave no result for {MOST_REFUSED} batches, killed: {reason}")


async def _end(process: Process, writer: asyncio.StreamWriter, limit: float) -> int:
    """Close the worker's socket, which ends it; kill it when it does not go. Returns its exit status."""
    writer.close()
    try:
        async with asyncio.timeout(limit):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()
    except asyncio.CancelledError:
        process.kill()
        raise


def _exit_text(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code}"
    return f"exited with status {code}"
