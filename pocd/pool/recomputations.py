"""What validators want computed beside what is mined."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pocd.protocol.proof import Round


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


class Recomputations:
    """The way of recomputations from whoever validates to the workers, one at a time."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Recomputation] = asyncio.Queue(maxsize=1)
        self._turn = asyncio.Lock()

    async def put(self, recomputation: Recomputation) -> None:
        """Hand one over; waits until a worker takes the one before."""
        await self._queue.put(recomputation)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[asyncio.Queue[Recomputation]]:
        """Be the worker that takes them, for as long as the context lasts.

        So one worker prepares a foreign round, not each of them, and the next validation is another one's.
        """
        async with self._turn:
            yield self._queue
