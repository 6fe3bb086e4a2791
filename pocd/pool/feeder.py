"""A ready worker at work: leases are sent to it, and results received from it."""

from __future__ import annotations

import asyncio
import itertools
from base64 import b64decode
from typing import TYPE_CHECKING, NoReturn

from pocd.pool.causes import Cause, WorkerError
from pocd.pool.processes import FailedError
from pocd.pool.recomputations import NoResultError, WorkerLostError
from pocd.store.proofs import Weights
from pocd.tasks import run_forever, shielded, within
from pocd.worker.messages import (
    BatchShrunk,
    Cancel,
    Cancelled,
    Compared,
    Compute,
    Distances,
    Heartbeat,
    Recompute,
    Refused,
    RoundBegun,
    Vectors,
)

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from pocd.mining.miner import Lease, Miner
    from pocd.pool.limits import WorkerLimits
    from pocd.pool.processes import RankLink
    from pocd.pool.recomputations import Recomputation, Recomputations
    from pocd.pool.state import WorkerState

# Leases at a worker: one that is computed, on a GPU one that it goes on with, and one that waits, so that the device
# never does.
IN_FLIGHT = {"cpu": 2, "cuda": 3}
MOST_UNCOMMITTED = 256  # results that wait to be committed, until no more are taken from the worker
MOST_REFUSED_IN_A_ROW = 3  # batches without a result, until the worker is restarted
MOST_REFUSED = 100  # batches without a result in one life of the worker, until it is restarted


class Feeder:
    """Gives a ready worker leases and recomputations, and takes their results, until the worker fails."""

    def __init__(
        self,
        link: RankLink,
        state: WorkerState,
        miner: Miner,
        recomputations: Recomputations,
        limits: WorkerLimits,
        *,
        log: FilteringBoundLogger,
    ) -> None:
        self._link = link
        self._state = state
        self._miner = miner
        self._recomputations = recomputations
        self._limits = limits
        self._log = log
        self._ids = itertools.count()
        self._refused_in_a_row = 0
        self._refused = 0
        self._slots = asyncio.Semaphore(IN_FLIGHT[state.devices[0].partition(":")[0]])
        self._in_flight: dict[int, Lease] = {}
        self._recomputing: dict[int, Recomputation] = {}
        self._busy = asyncio.Event()
        self._progress = asyncio.Event()
        self._commits: asyncio.Queue[asyncio.Task[None]] = asyncio.Queue(MOST_UNCOMMITTED)

    async def run(self) -> NoReturn:
        """Feed the worker; the leases and recomputations that it holds go back when this ends.

        Raises:
            WorkerError: The worker sends no heartbeat, hangs, or gives no results.
            FailedError: The worker reports that it ends, and why.
            EOFError: The worker is gone.
            OSError: The worker is gone.
        """
        name = f"worker {self._state.number}"
        try:
            await run_forever(
                {
                    f"{name}: leases": self._send(),
                    f"{name}: recomputations": self._send_recomputations(),
                    f"{name}: results": self._receive(),
                    f"{name}: commits": self._commit(),
                    f"{name}: cancelling": self._cancel_replaced(),
                    f"{name}: progress": self._watch(),
                },
                self._log,
                foreseen=(OSError, EOFError, FailedError),
            )
        finally:
            for recomputation in self._recomputing.values():
                recomputation.fail(WorkerLostError("the worker ended"))
            for lease in self._in_flight.values():
                self._miner.give_back(lease)
            self._miner.retry_refused()

    async def _send(self) -> None:
        while True:
            await self._slots.acquire()
            lease = await self._miner.lease(self._state.batch_size)
            number = next(self._ids)
            self._in_flight[number] = lease
            self._busy.set()
            await self._link.send(Compute(number, lease.mining.round, lease.nonces))

    async def _send_recomputations(self) -> None:
        """Send recomputations, one at a time, so that between two of them there is a batch of what is mined."""
        while True:
            async with self._recomputations.turn() as queue:
                while not await self._recompute(await queue.get()):
                    pass

    async def _recompute(self, recomputation: Recomputation) -> bool:
        """Have the worker do one recomputation; returns whether no other of its round follows."""
        number = next(self._ids)
        self._recomputing[number] = recomputation
        self._busy.set()
        wanted, nonces = recomputation, list(recomputation.nonces)
        await self._link.send(Recompute(number, wanted.round, nonces, wanted.last, wanted.with_reference))
        await asyncio.wait([wanted.result])
        if wanted.result.cancelled():
            await self._link.send(Cancel([number]))
        return wanted.last or wanted.result.cancelled()

    async def _watch(self) -> NoReturn:
        """End the worker's life when it has something to do, and finishes nothing while this process runs."""
        while True:
            await self._busy.wait()
            self._progress.clear()
            try:
                await within(self._limits.batch, self._progress.wait())
            except TimeoutError:
                message = f"worker finished no batch within {self._limits.batch:.0f} s, killed"
                raise WorkerError(Cause.HUNG, message) from None

    def _progressed(self) -> None:
        """Note that the worker finished something, which is no longer under way."""
        self._progress.set()
        if not self._in_flight and not self._recomputing:
            self._busy.clear()

    async def _cancel_replaced(self) -> None:
        """Take back the leases that wait at the worker for a round that is no longer mined."""
        while True:
            await self._miner.until_replaced(await self._miner.until_mining())
            stale = [number for number, lease in self._in_flight.items() if lease.mining is not self._miner.current]
            if stale:
                await self._link.send(Cancel(stale))

    async def _receive(self) -> None:
        while True:
            message = await self._link.receive(self._limits.heartbeat)
            if (
                isinstance(message, Distances | Vectors | Compared | Refused | Cancelled)
                and message.id in self._recomputing
            ):
                self._recomputed(message)
            elif isinstance(message, Distances | Vectors):
                await self._commits.put(self._completed(message))
            elif isinstance(message, Refused):
                await self._refuse(self._finished(message.id), message.reason)
            elif isinstance(message, BatchShrunk):
                take_batch_size(message, self._state, self._log)
            elif isinstance(message, Cancelled):
                self._miner.give_back(self._finished(message.id))
            elif isinstance(message, RoundBegun):
                self._round_begun(message)
            else:
                assert isinstance(message, Heartbeat), f"unexpected {message}"

    def _completed(self, message: Distances | Vectors) -> asyncio.Task[None]:
        """Hand a result to the miner, and return the task that commits it."""
        lease = self._finished(message.id)
        self._refused_in_a_row = 0
        self._state.count(len(lease.nonces))
        assert self._state.info is not None, "a worker that computes is ready"
        weights = Weights(self._state.info.fingerprint, self._state.info.dtype)
        results = message.distances if isinstance(message, Distances) else b64decode(message.vectors)
        return self._miner.complete(lease, results, weights)

    async def _commit(self) -> NoReturn:
        """Wait for the commits, so that one that fails is heard of."""
        name = f"worker {self._state.number}: what it computed"
        while True:
            # Shielded: when this task is cancelled, what was computed is committed and counted all the same.
            await shielded(name, _end_of(await self._commits.get()), self._log)

    def _round_begun(self, message: RoundBegun) -> None:
        """Record the rate that theory expects of a round, and log where the round runs in another way than usual."""
        assert self._state.info is not None, "a worker that computes is ready"
        if message.execution != self._state.info.execution:
            self._log.warning(
                f"this round runs {message.execution}: {message.execution_reason}",
                action="execution",
                round=message.round_id,
                otherwise=self._state.info.execution,
            )
        for lease in self._in_flight.values():
            if lease.mining.round.id == message.round_id:
                lease.mining.expected_valid_rate = message.expected_valid_rate

    def _recomputed(self, message: Distances | Vectors | Compared | Refused | Cancelled) -> None:
        recomputation = self._recomputing.pop(message.id)
        self._progressed()
        if isinstance(message, Refused):
            recomputation.fail(NoResultError(message.reason))
        elif not isinstance(message, Cancelled) and not recomputation.result.done():
            recomputation.result.set_result(message)

    def _finished(self, number: int) -> Lease:
        lease = self._in_flight.pop(number)
        self._slots.release()
        self._progressed()
        return lease

    async def _refuse(self, lease: Lease, reason: str) -> None:
        """Set aside a lease that has no result; too many of them end the worker's life."""
        self._log.error(f"batch refused: {reason}", action="batch_refused")
        self._state.last_refusal = reason
        self._miner.refuse(lease)
        self._refused += 1
        self._refused_in_a_row += 1
        if self._refused_in_a_row == MOST_REFUSED_IN_A_ROW:
            raise _refused(f"{MOST_REFUSED_IN_A_ROW} batches in a row", reason)
        if self._refused == MOST_REFUSED:
            raise _refused(f"{MOST_REFUSED} batches", reason)


def take_batch_size(message: BatchShrunk, state: WorkerState, log: FilteringBoundLogger) -> None:
    """Record that a worker's batches became smaller as memory was short, and log it."""
    text = f"{message.reason}; batches are of {message.size} nonces now"
    log.warning(text, action="batch_size", size=message.size)
    state.batch_size = state.most = message.size


async def _end_of(commit: asyncio.Task[None]) -> None:
    await commit


def _refused(batches: str, reason: str) -> WorkerError:
    return WorkerError(Cause.REFUSED, f"worker gave no result for {batches}, killed: {reason}")
