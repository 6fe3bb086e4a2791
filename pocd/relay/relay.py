"""A relay at work: callbacks are stored, each nonce once, and delivered in order until the round's window ends."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pocd.delivery.dispatcher import Dispatcher
from pocd.delivery.posting import Receiver
from pocd.observe.events import Events
from pocd.relay.callbacks import KINDS, read_callback, relayed
from pocd.store import upkeep
from pocd.store.batches import queue_batch, register_receivers
from pocd.store.bodies import unpack_body
from pocd.store.errors import StoreUnavailableError
from pocd.store.outbox import Outbox, Queue
from pocd.tasks import first_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import SteadyClock
    from pocd.relay.callbacks import Callback, Kind
    from pocd.store.thread import OutboxThread

LOOK_SECONDS = 5.0
LONGEST_WAIT = 5.0  # seconds between two attempts, also where more is asked for: a window is minutes
KEPT_SECONDS = 86_400.0  # that a delivered callback is kept; what it holds is not passed on again
MOST_QUEUES = 64
MOST_REMEMBERED = 4_000_000  # nonces of the callbacks that are kept
RESTORED = 64  # stored callbacks that are read at a time


class FullError(Exception):
    """The relay has no room for another queue, or for more nonces; the message says which."""


def restore(outbox: Outbox, after: int) -> list[tuple[int, str, bytes]]:
    """Return number, queue and body of stored callbacks after the number `after`, at most `RESTORED`, oldest first."""
    rows = outbox.db.execute(
        "SELECT number, receiver, body FROM batches JOIN deliveries ON batch = number WHERE number > ?"
        " ORDER BY number LIMIT ?",
        (after, RESTORED),
    )
    return [(number, queue, unpack_body(body)) for number, queue, body in rows]


def keep(outbox: Outbox, queue: str, callback: Callback, now: float) -> None:
    """Store a callback and queue it, in one transaction."""
    with outbox.transaction():
        register_receivers(outbox, [queue])
        queue_batch(outbox, relayed(callback), [queue], round_number=None, now=now)


def _parts(queue: str) -> tuple[Kind, str]:
    """Return kind and path of a queue's name."""
    name, _, prefix = queue.partition(" ")
    (kind,) = (each for each in KINDS if each == name)
    return kind, prefix


@dataclass(slots=True)
class _Passed:
    """What was passed on of a round."""

    numbers: set[int | str]
    at: float


class Relay:
    """Takes callbacks, and delivers them to the orchestrator at `to`, a queue for each kind and path.

    Args:
        to: Address of the orchestrator, to which the path of a callback is appended as it was written.
        outbox: Store of the callbacks.
        windows: Seconds for which a callback of each kind is of use.
        clock: Clock of the queues.
        log: Receives what is delivered, and what is not.
    """

    def __init__(
        self,
        to: str,
        outbox: OutboxThread,
        *,
        windows: Mapping[Kind, float],
        clock: SteadyClock,
        log: FilteringBoundLogger,
    ) -> None:
        self._to = to.rstrip("/")
        self._outbox = outbox
        self._windows = windows
        self._clock = clock
        self._log = log
        self._events = Events(clock)
        self._taking = asyncio.Lock()
        self._passed: dict[str, _Passed] = {}
        self._remembered = 0
        self._queues: dict[str, Dispatcher] = {}
        self._group: asyncio.TaskGroup | None = None
        self.repeated = 0

    async def restore(self) -> None:
        """Find out from the store what was passed on before, and what is left to deliver."""
        after = 0
        while rows := await self._outbox(restore, after):
            for number, name, body in rows:
                kind, prefix = _parts(name)
                self._queue(name)
                self._remember(read_callback(kind, prefix, body), self._clock.wall())
                after = number

    async def run(self) -> None:
        """Deliver until cancelled, after `restore`."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for name, dispatcher in self._queues.items():
                    group.create_task(dispatcher.run(), name=name)
                group.create_task(self._look_for_ever(), name="upkeep")
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None

    async def take(self, kind: Kind, prefix: str, raw: bytes) -> int:
        """Store what is new in a callback; returns how many of its artifacts or verdicts that are.

        Raises:
            CallbackError: The body is no such callback.
            FullError: There are too many queues, or nonces.
            StoreUnavailableError: Nothing can be stored now.
        """
        came = read_callback(kind, prefix, raw)
        name = f"{kind} {prefix}"
        async with self._taking:  # what two callbacks have in common is passed on by one of them
            passed = self._passed.get(came.round)
            left = came.without(passed.numbers) if passed else came
            self.repeated += len(came.numbers) - (len(left.numbers) if left else 0)
            if left is None:
                return 0
            if self._remembered + len(left.numbers) > MOST_REMEMBERED:
                raise FullError(f"the relay remembers {MOST_REMEMBERED} nonces and verdicts; older ones go in time")
            queue = self._queue(name)
            await self._outbox(keep, name, left, self._clock.wall())
            self._remember(left, self._clock.wall())
        queue.wake()
        return len(left.numbers)

    def status(self) -> dict[str, Any]:
        """Return each queue's counts and health, and what was left out as repeated."""
        view = self._outbox.view
        return {
            "to": self._to,
            "repeated": self.repeated,
            "queues": [
                {
                    "name": name,
                    **{field: getattr(view.queues.get(name, Queue()), field) for field in Queue.__slots__},
                    "last_error": dispatcher.state.error,
                    "alarm": dispatcher.alarm,
                }
                for name, dispatcher in self._queues.items()
            ],
        }

    def _remember(self, callback: Callback, now: float) -> None:
        passed = self._passed.setdefault(callback.round, _Passed(set(), now))
        passed.numbers.update(callback.numbers)
        passed.at = now
        self._remembered += len(callback.numbers)

    def _queue(self, name: str) -> Dispatcher:
        if name in self._queues:
            return self._queues[name]
        if len(self._queues) >= MOST_QUEUES:
            raise FullError(f"the relay has {MOST_QUEUES} queues, one for each path and kind")
        kind, prefix = _parts(name)
        self._queues[name] = Dispatcher(
            Receiver(name, f"{self._to}{prefix}", None),
            self._outbox,
            expire_after=self._windows[kind],
            longest_wait=LONGEST_WAIT,
            clock=self._clock,
            jitter=partial(random.uniform, -1, 1),
            log=self._log,
            events=self._events,
        )
        if self._group is not None:
            self._group.create_task(self._queues[name].run(), name=name)
        return self._queues[name]

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look()
            except StoreUnavailableError as error:
                self._log.error("the store cannot be used now", action="store_unavailable", cause=str(error))

    async def _look(self) -> None:
        """Delete what was delivered long ago, and forget what was passed on then."""
        await self._outbox(Outbox.keep_place)
        jump = self._clock.follow()
        if jump:
            await self._outbox.persistently(upkeep.shift_times, jump)
        before = self._clock.wall() - KEPT_SECONDS
        while await self._outbox(upkeep.prune_delivered, before):
            pass  # in pieces, so that others get their turn
        for round_ in [name for name, passed in self._passed.items() if passed.at < before]:
            self._remembered -= len(self._passed.pop(round_).numbers)
