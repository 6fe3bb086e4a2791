"""Form batches of stored proofs when they are many enough, old enough, or their round is over."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from pocd.delivery.policy import first_age
from pocd.store.batches import form_batches
from pocd.store.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pocd.clock import Clock
    from pocd.delivery.receivers import Receivers
    from pocd.mining.miner import Miner
    from pocd.observe.events import Events
    from pocd.protocol.proof import Round
    from pocd.store.thread import OutboxThread


class Batcher:
    """Forms batches for all receivers."""

    def __init__(
        self,
        miner: Miner,
        outbox: OutboxThread,
        receivers: Receivers,
        *,
        size: int,
        age: float,
        withdraw: bool,
        is_live: bool = False,
        clock: Clock,
        jitter: Callable[[], float],
        events: Events,
    ) -> None:
        self._miner = miner
        self._changes = miner.batchable
        self._outbox = outbox
        self._receivers = receivers
        self._size = size
        self._age = age
        self._next_age = age
        self._round: Round | None = None  # the one that was mined when batches were formed last
        self._withdraw = withdraw
        self._is_live = is_live
        self._clock = clock
        self._jitter = jitter
        self._events = events

    async def run(self) -> None:
        """Form batches until cancelled."""
        while True:
            seen = self._changes.count
            try:
                due = await self.form()
            except StoreUnavailableError:  # nothing was changed, and readiness shows why
                due = self._clock.wall() + self._age
            # Never longer than the age: the clock may have been set back since `due` was computed.
            wait = None if due is None else min(max(due - self._clock.wall(), 0.0), self._age)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changes.after(seen)

    def wake(self) -> None:
        """Look again whether a batch is due, as for receivers that were not there before."""
        self._changes.notify()

    async def form(self) -> float | None:
        """Form the batches that are due; returns when the next one will be, in wall time."""
        current = self._miner.current.round if self._miner.current else None
        if current != self._round:
            self._round, self._next_age = current, first_age(self._age, self._jitter())
        formed = await self._outbox(
            form_batches,
            self._receivers.names(),
            size=self._size,
            age=self._next_age,
            now=self._clock.wall(),
            current=current,
            withdraw=self._withdraw,
            is_live=self._is_live,
        )
        if any(batch.round == current for batch in formed.batches):
            self._next_age = self._age
        self._receivers.wake()
        for batch in formed.batches:
            where = {"nonces": batch.size, "height": batch.round.block_height}
            self._events.publish("batch", id=batch.id, kind=batch.kind, **where)
        return formed.due
