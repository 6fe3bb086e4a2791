"""What tests of delivery share: a real store, real receivers on sockets, and a clock that the test sets."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import structlog
from aiohttp import web

from pocd.clock import SYSTEM
from pocd.delivery.dispatcher import Dispatcher
from pocd.delivery.posting import Receiver
from pocd.delivery.receivers import Receivers
from pocd.observe.events import Events
from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs
from pocd.store import deliveries, selections
from pocd.store.batches import form_batches
from pocd.store.bodies import unpack_body
from pocd.store.outbox import Work
from pocd.store.proofs import Weights
from pocd.store.thread import OutboxThread
from tests.support.clocks import ROUND, ManualClock
from tests.support.stored import commit_span
from tests.support.waiting import soon

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    from pocd.http.webhooks import WebhookKeys
    from pocd.store.deliveries import PendingDelivery
    from pocd.store.outbox import Outbox, ReceiverState
    from pocd.store.selections import Delivery

WEIGHTS = Weights("f00d", "float32")
WEEK = 7 * 86_400.0
NODE = Node(0, 1)


@dataclass(frozen=True, slots=True)
class Request:
    """What a receiver got."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def timestamp(self) -> int:
        return int(self.headers["webhook-timestamp"])

    @property
    def sequence(self) -> int:
        return int(self.headers["pocd-sequence"])


class Server:
    """A receiver that notes each request and answers it from a script, then with 200."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[Callable[[], web.Response]] = []
        self.requests: asyncio.Queue[Request] = asyncio.Queue()
        self.handle: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.answer

    def then(self, *statuses: int, **headers: str) -> None:
        """Answer the next requests with these."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for status in statuses:
            self.answers.append(partial(web.Response, status=status, headers=named))

    async def answer(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.put_nowait(Request(request.path, headers, await request.read()))
        return self.answers.pop(0)() if self.answers else web.Response(text="stored")

    async def take(self, count: int) -> list[Request]:
        """Wait for the next `count` requests."""
        return [await soon(self.requests.get()) for _ in range(count)]


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server()
    app = web.Application(client_max_size=2**26)

    async def handle(request: web.Request) -> web.StreamResponse:
        return await server.handle(request)  # looked up now: a test may have set another

    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    server.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def talking(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Serve one `talk` a connection, after the request's head and body; yields the URL."""
    talks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        try:
            await read_request(reader)
            await talk(reader, writer)
        except (ConnectionError, EOFError, asyncio.CancelledError):
            pass  # the client went away, or the test ends
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> Request:
    """Read a POST with a Content-Length."""
    start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Request(start.split()[1], headers, await reader.readexactly(int(headers["content-length"])))


class Part(Protocol):
    """What runs until it is cancelled."""

    async def run(self) -> None: ...


@asynccontextmanager
async def running(*parts: Part) -> AsyncIterator[None]:
    """Run the parts while the context lasts; what ends one of them ends the test."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part.run()) for part in parts]
        yield
        for task in tasks:
            task.cancel()


def events() -> Events:
    """Return a ring that nobody listens to."""
    return Events(SYSTEM)


def dispatchers(
    outbox: OutboxThread,
    receivers: Sequence[Receiver] = (),
    make: Callable[[Receiver], Dispatcher] | None = None,
    origins: Sequence[str] = (),
    at_work: Callable[[], Sequence[str]] = list,
) -> Receivers:
    """Return the dispatchers of `receivers`; without `make` they are plain ones."""

    def plain(receiver: Receiver) -> Dispatcher:
        return Dispatcher(
            receiver,
            outbox,
            expire_after=WEEK,
            clock=ManualClock(),
            jitter=lambda: 0.0,
            log=structlog.get_logger(),
            events=events(),
        )

    return Receivers(receivers, make or plain, outbox, origins=origins, at_work=at_work, log=structlog.get_logger())


@dataclass(frozen=True, slots=True)
class Bench:
    """A store and a clock, and dispatchers on them."""

    outbox: OutboxThread
    clock: ManualClock

    def dispatcher(
        self, url: str, name: str = "a", keys: WebhookKeys | None = None, *, expire_after: float = WEEK
    ) -> Dispatcher:
        return Dispatcher(
            Receiver(name, url, keys),
            self.outbox,
            expire_after=expire_after,
            clock=self.clock,
            jitter=lambda: 0.0,
            log=structlog.get_logger(),
            events=events(),
        )

    def dispatchers(self, *urls: str) -> Receivers:
        """Return all dispatchers, for receivers named a, b, …"""
        receivers = [Receiver(name, url, None) for name, url in zip("abc", urls, strict=False)]
        return dispatchers(self.outbox, receivers, lambda receiver: self.dispatcher(receiver.url, receiver.name))

    async def store(self, batches: int, *receivers: str, size: int = 2) -> list[PendingDelivery]:
        """Store `batches` batches of `size` proofs for `receivers`; return them as the first one is to get them."""

        def write(outbox: Outbox) -> list[PendingDelivery]:
            (last,) = outbox.db.execute("SELECT coalesce(max(number), 0) FROM batches").fetchone()
            done = outbox.begin_round(Work(ROUND, NODE), self.clock.now).progress.cursor
            span = Span(done, done + batches * size)
            proofs = Proofs.of_distances((nonce, 1 + nonce / 2**20) for nonce in NODE.nonces(span))
            commit_span(outbox, ROUND, NODE, span, proofs, WEIGHTS, self.clock.now)
            form_batches(outbox, receivers, size=size, age=0.0, now=self.clock.now, current=ROUND)
            rows = outbox.db.execute(
                "SELECT number, sequence, id, kind, body, created_at, 0, 0"
                " FROM deliveries JOIN batches ON number = batch WHERE receiver = ? AND number > ? ORDER BY number",
                (receivers[0], last),
            )
            found = [deliveries.PendingDelivery(*row) for row in rows]
            return [replace(each, body=unpack_body(each.body)) for each in found]

        return await self.outbox(write)

    async def head(self, receiver: str = "a") -> PendingDelivery | None:
        return await self.outbox(deliveries.next_pending, receiver)

    async def deliveries(self, receiver: str = "a") -> list[Delivery]:
        """Every batch of a receiver, in the order of its queue."""
        everything = selections.Selection(("pending", "delivered", "dead", "expired", "withdrawn"), receiver)
        return await self.outbox(selections.listed, everything, after=("", 0), limit=1000)

    async def states(self, receiver: str = "a") -> list[str]:
        return [delivery.state for delivery in await self.deliveries(receiver)]

    async def faults(self, receiver: str = "a") -> list[int]:
        """The faults of every batch, in the order of its queue."""
        query = "SELECT faults FROM deliveries WHERE receiver = ? ORDER BY sequence"
        rows = await self.outbox(lambda outbox: outbox.db.execute(query, (receiver,)).fetchall())
        return [faults for (faults,) in rows]

    def receiver(self, name: str = "a") -> ReceiverState:
        return self.outbox.view.receivers[name]

    async def step(self, dispatcher: Dispatcher) -> None:
        """Wake a running dispatcher at the time of its next attempt, and wait until nothing can be sent again."""
        self.clock.advance(max(0.0, dispatcher.state.next_at - self.clock.now))
        dispatcher.wake()
        await soon(dispatcher.settled.wait())


@contextmanager
def prepared(path: Path) -> Iterator[Bench]:
    with closing(OutboxThread(path)) as outbox:
        yield Bench(outbox, ManualClock())


def sent(requests: list[Request]) -> list[tuple[str, bytes]]:
    return [(request.id, request.body) for request in requests]


def expected(batches: list[PendingDelivery]) -> list[tuple[str, bytes]]:
    return [(batch.id, batch.body) for batch in batches]
