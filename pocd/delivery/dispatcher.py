"""Deliver stored batches: one task per receiver, in order, until each is accepted (docs/protocol.md section 6)."""

from __future__ import annotations

import asyncio
import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from pocd.delivery import policy, signing
from pocd.delivery.outbox import Outbox, OutboxThread, PendingDelivery
from pocd.delivery.policy import Outcome
from pocd.observe.mask import excerpt

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from pocd.miner import Miner

TIMEOUT = aiohttp.ClientTimeout(total=15, connect=3)


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where proofs go.

    Attributes:
        name: Its queue's name in the store; the URL may change, the queue stays.
        url: Callback URL; batches are POSTed to `{url}/generated`.
        keys: What signs the batches; None for unsigned ones.
    """

    name: str
    url: str
    keys: signing.WebhookKeys | None


def open_session() -> aiohttp.ClientSession:
    """Return a client that keeps no cookies and heeds no proxy of the environment."""
    return aiohttp.ClientSession(timeout=TIMEOUT, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


class Dispatcher:
    """Delivers to one receiver. Its public attributes are what status shows."""

    def __init__(
        self,
        receiver: Receiver,
        outbox: OutboxThread,
        session: aiohttp.ClientSession,
        *,
        wall: Callable[[], float],
        jitter: Callable[[], float],
        log: FilteringBoundLogger,
    ) -> None:
        self.receiver = receiver
        self._outbox = outbox
        self._session = session
        self._wall = wall
        self._jitter = jitter
        self._log = log.bind(receiver=receiver.name)
        self._stored = asyncio.Event()
        self.settled = asyncio.Event()  # set while nothing can be sent now: the queue is empty, or waits to retry
        self.last_error: str | None = None

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            self._stored.clear()
            head = await self._outbox(Outbox.head, self.receiver.name)
            wait = policy.remaining_wait(head.next_at, self._wall()) if head else None
            if head is not None and wait == 0:
                await self._deliver(head)
                continue
            self.settled.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._stored.wait()
            self.settled.clear()

    def wake(self) -> None:
        """Look at the queue again: something may have been stored."""
        self.settled.clear()
        self._stored.set()

    async def _deliver(self, head: PendingDelivery) -> None:
        outcome = await self._attempt(head)
        if outcome.accepted:
            await asyncio.shield(self._outbox(Outbox.record_delivered, self.receiver.name, head.batch, self._wall()))
            if self.last_error is not None:
                self._log.info("receiver accepts again", action="receiver_restored", attempts=head.attempts + 1)
            self.last_error = None
            return
        delay = policy.backoff(head.attempts + 1, self._jitter())
        await self._outbox(Outbox.record_failed, self.receiver.name, head.batch, outcome.detail, self._wall() + delay)
        self.last_error = outcome.detail
        self._log.warning(
            "delivery failed, will retry",
            action="delivery_retry",
            batch=head.id,
            attempts=head.attempts + 1,
            cause=outcome.detail,
            after_s=round(delay, 1),
        )

    async def _attempt(self, head: PendingDelivery) -> Outcome:
        timestamp = int(self._wall())
        keys = self.receiver.keys
        signed = keys.headers(head.id, timestamp, head.body) if keys else signing.unsigned_headers(head.id, timestamp)
        headers = {"Content-Type": "application/json", **signed}
        url = f"{self.receiver.url.rstrip('/')}/{head.kind}"
        try:
            async with self._session.post(
                url, data=io.BytesIO(head.body), headers=headers, allow_redirects=False
            ) as response:
                # The status says it all. The body is not read: it may be broken, endless or never come.
                return Outcome(response.status, f"HTTP {response.status}")
        except TimeoutError:
            return Outcome(None, f"no answer within {TIMEOUT.total} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # An error's text that names the URL may show its credentials.
            name = type(error).__name__
            return Outcome(None, name if "://" in str(error) else f"{name}: {excerpt(str(error), 200)}")


class Batcher:
    """Forms batches of stored proofs when they are many enough, old enough, or their round is over."""

    def __init__(
        self,
        miner: Miner,
        outbox: OutboxThread,
        dispatchers: list[Dispatcher],
        *,
        size: int,
        age: float,
        wall: Callable[[], float],
    ) -> None:
        self._miner = miner
        self._outbox = outbox
        self._dispatchers = dispatchers
        self._size = size
        self._age = age
        self._wall = wall

    async def run(self) -> None:
        """Form batches until cancelled."""
        while True:
            self._miner.proofs_stored.clear()
            due = await self.form()
            # Never longer than the age: the clock may have been set back since `due` was told.
            wait = None if due is None else min(max(due - self._wall(), 0.0), self._age)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._miner.proofs_stored.wait()

    async def form(self) -> float | None:
        """Form the batches that are due; returns when the next one will be, in wall time."""
        mining = self._miner.current
        names = [dispatcher.receiver.name for dispatcher in self._dispatchers]
        due = await self._outbox(
            Outbox.form_batches,
            names,
            size=self._size,
            age=self._age,
            now=self._wall(),
            current=mining.round if mining else None,
        )
        for dispatcher in self._dispatchers:
            dispatcher.wake()
        return due
