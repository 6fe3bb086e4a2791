"""A ready worker at work: leases go out, distances come back."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from pocd.pool.causes import Cause, WorkerError
from pocd.pool.processes import FailedError
from pocd.pool.recomputations import NoResultError, WorkerLostError
from pocd.store.outbox import Weights
from pocd.tasks import start
from pocd.worker.messages import (
    BatchSize,
    Cancel,
    Cancelled,
    Compute,
    Distances,
    Heartbeat,
    Recompute,
    Refused,
    RoundBegun,
)

if TYPE_CHECKING:
    import itertools
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from pocd.mining.miner import Lease, Miner
    from pocd.pool.processes import Link
    from pocd.pool.recomputations import Recomputation
    from pocd.pool.supervisor import Limits, Supervisor

# Leases at a worker: one that is computed, on a GPU one that it goes on with, and one that waits, so that the device
# never does.
IN_FLIGHT = {"cpu": 2, "cuda": 3}
MOST_REFUSED_IN_A_ROW = 3  # batches without a result, until the worker is restarted
MOST_REFUSED = 100  # likewise, in one life of the worker and altogether


class Feeding:
    """Feeds one worker until it fails, or is to be ended: its `run` ends only by an exception."""

    def __init__(
        self,
        link: Link,
        supervisor: Supervisor,
        miner: Miner,
        limits: Limits,
        lease_ids: itertools.count[int],
        *,
        clock: Callable[[], float],
        log: FilteringBoundLogger,
    ) -> None:
        self._link = link
        self._supervisor = supervisor
        self._miner = miner
        self._limits = limits
        self._lease_ids = lease_ids
        self._clock = clock
        self._log = log
        self._refused_in_a_row = 0
        self._refused = 0
        self._slots = asyncio.Semaphore(IN_FLIGHT[supervisor.devices[0].partition(":")[0]])
        self._in_flight: dict[int, Lease] = {}
        self._recomputing: dict[int, Recomputation] = {}
        self._progress_at = clock()

    async def run(self) -> None:
        """Feed it; what it had in hand goes back when this ends.

        Raises:
            WorkerError: It is silent, hangs, or gives no results.
            FailedError: It says that it ends, and why.
            EOFError: It is gone.
            OSError: Likewise.
        """
        try:
            async with asyncio.TaskGroup() as group:
                begin = partial(start, group, log=self._log, foreseen=(OSError, EOFError, FailedError))
                name = f"worker {self._supervisor.number}"
                begin(f"{name}: leases", self._send())
                begin(f"{name}: recomputations", self._send_recomputations())
                begin(f"{name}: results", self._receive())
                begin(f"{name}: cancelling", self._cancel_replaced())
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
            async with self._supervisor.recomputations.turn() as queue:
                while not await self._recompute(await queue.get()):
                    pass

    async def _recompute(self, recomputation: Recomputation) -> bool:
        """Have one recomputation done; returns whether no more of its round are wanted."""
        number = self._begin()
        self._recomputing[number] = recomputation
        nonces = list(recomputation.nonces)
        await self._link.send(Recompute(number, recomputation.round, nonces, recomputation.last))
        await asyncio.wait([recomputation.distances])
        return recomputation.last

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
            message = await self._link.receive(self._limits.heartbeat)
            if isinstance(message, Distances | Refused) and message.id in self._recomputing:
                self._recomputed(message)
            elif isinstance(message, Distances):
                lease = self._finished(message.id)
                self._refused_in_a_row = 0
                self._supervisor.count(len(message.distances))
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
                raise WorkerError(Cause.HUNG, f"worker finished no batch within {self._limits.batch:.0f} s, killed")

    def _round_begun(self, message: RoundBegun) -> None:
        self._supervisor.round_begun(message)
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
            raise _refused(f"{MOST_REFUSED_IN_A_ROW} batches in a row", reason)
        if self._refused == MOST_REFUSED:
            raise _refused(f"{MOST_REFUSED} batches", reason)


def _refused(batches: str, reason: str) -> WorkerError:
    return WorkerError(Cause.REFUSED, f"worker gave no result for {batches}, killed: {reason}")
