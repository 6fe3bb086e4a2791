"""Recomputations: results of given nonces that a validator wants computed, beside what is mined."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pocd.protocol.proof import Round
    from pocd.worker.messages import Compared, Distances, Vectors


MOST_TRIES = 3  # of one recomputation, each ended by the end of its worker


class NoResultError(Exception):
    """A recomputation has no result, and trying it again will not give one."""


class WorkerLostError(Exception):
    """A worker ended before it had done a recomputation; another worker may do it."""


@dataclass(frozen=True, slots=True)
class Recomputation:
    """A request for the results of some nonces of any round, at most a batch of them.

    Attributes:
        last: Whether this is the last recomputation of its round.
        with_reference: Whether the reference in float32 arithmetic is wanted too.
        result: The worker's answer, in the order of `nonces`; or a `NoResultError`, or a `WorkerLostError`. Who no
            longer wants it cancels it.
    """

    round: Round
    nonces: tuple[int, ...]
    last: bool
    with_reference: bool
    result: asyncio.Future[Distances | Vectors | Compared]

    def fail(self, error: NoResultError | WorkerLostError) -> None:
        """End the wait for the result with an error, unless it came or nobody waits any more."""
        if not self.result.done():
            self.result.set_exception(error)


class Recomputations:
    """Hands recomputations from the validator to the workers, one at a time."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Recomputation] = asyncio.Queue(maxsize=1)
        self._turn = asyncio.Lock()

    async def put(self, recomputation: Recomputation) -> None:
        """Hand a recomputation over; waits until a worker has taken the one before."""
        await self._queue.put(recomputation)

    async def answer(
        self, round_: Round, nonces: tuple[int, ...], *, last: bool, with_reference: bool = False
    ) -> Distances | Vectors | Compared:
        """Have nonces recomputed, by another worker where one ends meanwhile, and return the worker's answer.

        Raises:
            NoResultError: The model gives no result, or the worker ended each time.
        """
        for _ in range(MOST_TRIES):
            wanted = Recomputation(round_, nonces, last, with_reference, asyncio.get_running_loop().create_future())
            await self.put(wanted)
            with suppress(WorkerLostError):
                return await wanted.result
        raise NoResultError(f"the worker ended {MOST_TRIES} times in a row over the same nonces")

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[asyncio.Queue[Recomputation]]:
        """Hold the exclusive right to take recomputations from the queue while the context lasts.

        A worker holds it for all recomputations of one round, so that only that worker prepares the round.
        """
        async with self._turn:
            yield self._queue
