"""Delivery over real sockets from a real store; only the wall clock and the jitter are the test's."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import aiohttp
import orjson
import pytest
import structlog
from aiohttp import web

from pocd.delivery import dispatcher as module
from pocd.delivery import policy
from pocd.delivery.dispatcher import Batcher, Dispatcher, Receiver, open_session
from pocd.delivery.outbox import Outbox, OutboxThread, PendingDelivery, Queue
from pocd.delivery.signing import SignatureError, WebhookKeys
from pocd.miner import Miner
from pocd.nonces import Node, Span
from pocd.proof import Proof, Round

T = TypeVar("T")

NOW = 1_700_000_000.0
NODE = Node(0, 1)
ROUND = Round("AB", 10, "miner", 1.4, "poc2", "tiny", 16)
NEXT = Round("CD", 20, "miner", 1.4, "poc2", "tiny", 16)
OLD_KEY, NEW_KEY = (WebhookKeys.parse("whsec_" + base64.b64encode(bytes([n]) * 32).decode()) for n in (1, 2))


class Wall:
    """The wall clock: stands still until the test sets it, or goes on by `tick` at each look."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now = NOW
        self.tick = tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


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


class Server:
    """A receiver that notes each request and answers it from a script, then with 200."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[Callable[[], web.Response]] = []
        self.requests: asyncio.Queue[Request] = asyncio.Queue()

    def then(self, *statuses: int) -> None:
        """Answer the next requests with these."""
        for status in statuses:
            self.answers.append(partial(web.Response, status=status))

    async def handle(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.put_nowait(Request(request.path, headers, await request.read()))
        return self.answers.pop(0)() if self.answers else web.Response(text="stored")

    async def take(self, count: int) -> list[Request]:
        """Wait for the next `count` requests."""
        return [await soon(self.requests.get()) for _ in range(count)]


async def soon(awaitable: Awaitable[T]) -> T:
    """Wait for what has to happen; the limit is only there so that a failing test ends."""
    return await asyncio.wait_for(awaitable, 30)


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def talking(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """Serve one `talk` a connection, after the request's head and body; yields the URL."""
    talks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
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


@asynccontextmanager
async def running(*parts: Dispatcher | Batcher) -> AsyncIterator[None]:
    """Run the parts while the context lasts; what ends one of them ends the test."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part.run()) for part in parts]
        yield
        for task in tasks:
            task.cancel()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as one:
        yield one


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_session() as one:
        yield one


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[OutboxThread]:
    with closing(OutboxThread(path)) as thread:
        yield thread


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without waiting."""
    monkeypatch.setattr(policy, "BACKOFF_SECONDS", (0.0,))


@dataclass(frozen=True, slots=True)
class Bench:
    """Makes dispatchers from the fixtures."""

    outbox: OutboxThread
    session: aiohttp.ClientSession
    wall: Wall

    def dispatcher(self, url: str, name: str = "a", keys: WebhookKeys | None = None) -> Dispatcher:
        return Dispatcher(
            Receiver(name, url, keys),
            self.outbox,
            self.session,
            wall=self.wall,
            jitter=lambda: 0.0,
            log=structlog.get_logger(),
        )


@pytest.fixture
def bench(outbox: OutboxThread, session: aiohttp.ClientSession, wall: Wall) -> Bench:
    return Bench(outbox, session, wall)


async def store(
    outbox: OutboxThread, batches: int, *receivers: str, size: int = 2, start: int = 0
) -> list[PendingDelivery]:
    """Store `batches` batches of `size` proofs for `receivers` and return them as they are to be sent."""

    def write(store: Outbox) -> list[PendingDelivery]:
        store.begin_round(ROUND, NODE, NOW)
        span = Span(start * size, (start + batches) * size)
        proofs = [Proof(nonce, 1 + nonce / 2**20) for nonce in NODE.nonces(span)]
        store.commit_span(ROUND, NODE, span, proofs, "f00d", NOW)
        store.form_batches(receivers, size=size, age=0.0, now=NOW, current=ROUND)
        rows = store.db.execute("SELECT number, id, kind, body, 0, created_at FROM batches ORDER BY number")
        return [PendingDelivery(*row) for row in rows][-batches:]

    return await outbox(write)


async def head(outbox: OutboxThread, receiver: str = "a") -> PendingDelivery | None:
    return await outbox(Outbox.head, receiver)


async def pending(outbox: OutboxThread, receiver: str = "a") -> PendingDelivery:
    found = await head(outbox, receiver)
    assert found is not None
    return found


def sent(requests: list[Request]) -> list[tuple[str, bytes]]:
    return [(request.id, request.body) for request in requests]


def expected(batches: list[PendingDelivery]) -> list[tuple[str, bytes]]:
    return [(batch.id, batch.body) for batch in batches]


# What is sent


async def test_batches_arrive_in_order_as_they_were_stored(bench: Bench, server: Server) -> None:
    batches = await store(bench.outbox, 5, "a")
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        requests = await server.take(5)
        await soon(dispatcher.settled.wait())
    assert sent(requests) == expected(batches)
    assert await head(bench.outbox) is None
    assert server.requests.empty()
    assert dispatcher.last_error is None
    assert bench.outbox.outbox.totals.delivered == 10


@pytest.mark.parametrize("ending", ["", "/"])
async def test_a_batch_is_posted_as_json_to_generated_below_the_url(bench: Bench, server: Server, ending: str) -> None:
    (batch,) = await store(bench.outbox, 1, "a")
    async with running(bench.dispatcher(f"{server.url}/base{ending}")):
        (request,) = await server.take(1)
    assert request.path == "/base/generated"
    assert request.headers["content-type"] == "application/json"
    assert request.timestamp == int(NOW)
    assert orjson.loads(request.body)["batch_id"] == request.id == batch.id


@pytest.mark.usefixtures("at_once")
async def test_every_attempt_is_signed_with_every_key(bench: Bench, server: Server) -> None:
    keys = WebhookKeys(OLD_KEY.keys + NEW_KEY.keys)
    await store(bench.outbox, 1, "a")
    server.then(500)
    async with running(bench.dispatcher(server.url, keys=keys)):
        requests = await server.take(2)
    for request in requests:
        for key in (OLD_KEY, NEW_KEY):
            key.verify(request.headers, request.body, NOW)
        with pytest.raises(SignatureError):
            OLD_KEY.verify(request.headers, request.body + b" ", NOW)


async def test_without_keys_nothing_is_signed(bench: Bench, server: Server) -> None:
    await store(bench.outbox, 1, "a")
    async with running(bench.dispatcher(server.url)):
        (request,) = await server.take(1)
    assert "webhook-signature" not in request.headers


async def test_a_batch_of_the_largest_size_that_can_be_configured_is_delivered(bench: Bench, server: Server) -> None:
    batches = await store(bench.outbox, 1, "a", size=100_000)
    async with running(bench.dispatcher(server.url)):
        assert sent(await server.take(1)) == expected(batches)


async def test_neither_cookies_nor_proxies_of_the_environment_are_used(
    bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_cookie() -> web.Response:
        response = web.Response()
        response.set_cookie("followed", "you")
        return response

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server.answers.append(with_cookie)
    await store(bench.outbox, 2, "a")
    async with running(bench.dispatcher(server.url.replace("127.0.0.1", "localhost"))):
        requests = await server.take(2)
    assert all("cookie" not in request.headers for request in requests)


async def test_what_is_stored_later_goes_out_when_woken(bench: Bench, server: Server) -> None:
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await soon(dispatcher.settled.wait())
        batches = await store(bench.outbox, 2, "a")
        dispatcher.wake()
        assert not dispatcher.settled.is_set()
        assert sent(await server.take(2)) == expected(batches)
        await soon(dispatcher.settled.wait())
    assert await head(bench.outbox) is None


# What comes of it


async def test_a_retry_is_the_same_message_with_a_time_of_its_own(bench: Bench, server: Server) -> None:
    batches = await store(bench.outbox, 2, "a")
    server.then(500)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        (first,) = await server.take(1)
        await soon(dispatcher.settled.wait())
        assert dispatcher.last_error == "HTTP 500"
        failed = await pending(bench.outbox)
        assert (failed.attempts, failed.next_at) == (1, NOW + 1)

        bench.wall.now += 1.5
        dispatcher.wake()
        second, third = await server.take(2)
        await soon(dispatcher.settled.wait())
    assert sent([first, second, third]) == expected([batches[0], batches[0], batches[1]])
    assert (first.timestamp, second.timestamp) == (int(NOW), int(NOW) + 1)
    assert dispatcher.last_error is None


async def test_nothing_is_sent_before_its_time(bench: Bench, server: Server) -> None:
    await store(bench.outbox, 2, "a")
    server.then(500)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await server.take(1)
        await soon(dispatcher.settled.wait())
        bench.wall.now += 0.75
        for _ in range(3):
            dispatcher.wake()
            await soon(dispatcher.settled.wait())
    assert server.requests.empty()
    assert (await pending(bench.outbox)).attempts == 1


async def test_a_retry_needs_nobody_to_wake_it(bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "BACKOFF_SECONDS", (0.01,))
    bench.wall.tick = 0.001
    batches = await store(bench.outbox, 1, "a")
    server.then(500, 503, 429)
    async with running(bench.dispatcher(server.url)):
        assert sent(await server.take(4)) == expected(batches * 4)


async def test_while_an_attempt_is_under_way_nothing_is_settled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stops the daemon waits for `settled`, so that a delivery under way may end."""
    first, second = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not first.is_set():
            first.set()
            writer.write(b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            second.set()
            await reader.read()

    monkeypatch.setattr(policy, "BACKOFF_SECONDS", (0.01,))
    bench.wall.tick = 0.001
    await store(bench.outbox, 1, "a")
    async with talking(talk) as url:
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            await soon(second.wait())
            assert not dispatcher.settled.is_set()


async def test_failures_in_a_row_wait_longer_and_longer(bench: Bench, server: Server) -> None:
    await store(bench.outbox, 1, "a")
    server.then(*[500] * 9)
    dispatcher = bench.dispatcher(server.url)
    waits = []
    async with running(dispatcher):
        for _ in range(9):
            await server.take(1)
            await soon(dispatcher.settled.wait())
            waits.append((await pending(bench.outbox)).next_at - bench.wall.now)
            bench.wall.now += waits[-1]
            dispatcher.wake()
        await server.take(1)
    assert waits == [1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]


@pytest.mark.parametrize("set_back", [3600.0, 10.0**9])
async def test_a_clock_that_was_set_back_does_not_hold_up_a_retry(
    bench: Bench, server: Server, set_back: float
) -> None:
    batches = await store(bench.outbox, 1, "a")
    server.then(500)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await server.take(1)
        await soon(dispatcher.settled.wait())
        bench.wall.now -= set_back
        dispatcher.wake()
        assert sent(await server.take(1)) == expected(batches)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_never_followed_but_tried_again(bench: Bench, server: Server, status: int) -> None:
    batches = await store(bench.outbox, 1, "a")
    async with serving() as elsewhere:
        location = {"Location": f"{elsewhere.url}/generated"}
        server.answers.append(partial(web.Response, status=status, headers=location))
        async with running(bench.dispatcher(server.url)):
            assert sent(await server.take(2)) == expected(batches * 2)
        assert elsewhere.requests.empty()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("status", [304, 400, 401, 404, 409, 410, 413, 500, 503])
async def test_any_answer_but_2xx_is_tried_again(bench: Bench, server: Server, status: int) -> None:
    batches = await store(bench.outbox, 1, "a")
    server.then(status)
    async with running(bench.dispatcher(server.url)):
        assert sent(await server.take(2)) == expected(batches * 2)


@pytest.mark.parametrize("status", [200, 201, 202, 204])
async def test_any_2xx_is_acceptance(bench: Bench, server: Server, status: int) -> None:
    await store(bench.outbox, 1, "a")
    server.then(status)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await server.take(1)
        await soon(dispatcher.settled.wait())
    assert await head(bench.outbox) is None


GARBAGE = {
    "nothing": b"",
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "binary": bytes(range(256)) * 100,
    "status": b"HTTP/1.1 99999 Odd\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "header": b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    "endless header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000,
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls": bytes.fromhex("15030100020228"),
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE)
async def test_an_answer_that_is_not_http_is_a_failure_like_any_other(bench: Bench, answer: bytes) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    await store(bench.outbox, 1, "a")
    async with talking(talk) as url:
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert dispatcher.last_error
    assert (await pending(bench.outbox)).attempts == 1


async def test_a_connection_reset_is_a_failure_like_any_other(bench: Bench) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    await store(bench.outbox, 1, "a")
    async with talking(talk) as url:
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert dispatcher.last_error
    assert (await pending(bench.outbox)).attempts == 1


async def test_a_receiver_that_never_answers_is_given_up_after_the_timeout(
    outbox: OutboxThread, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client hangs up

    monkeypatch.setattr(module, "TIMEOUT", aiohttp.ClientTimeout(total=0.05))
    await store(outbox, 1, "a")
    async with talking(talk) as url, open_session() as session:
        dispatcher = Bench(outbox, session, wall).dispatcher(url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert dispatcher.last_error == "no answer within 0.05 s"
    assert (await pending(outbox)).attempts == 1


ACCEPTED = b"HTTP/1.1 200 OK\r\n"
BROKEN_BODIES = {
    "cut short": (ACCEPTED + b"Content-Length: 100\r\n\r\n", b""),
    "not chunks": (ACCEPTED + b"Transfer-Encoding: chunked\r\n\r\n", b"ZZZ\r\nhello\r\n"),
    "cut chunks": (ACCEPTED + b"Transfer-Encoding: chunked\r\n\r\n", b""),
    "not gzip": (ACCEPTED + b"Content-Encoding: gzip\r\nContent-Length: 10\r\n\r\n", b"0123456789"),
}


@pytest.mark.parametrize(("answer", "body"), BROKEN_BODIES.values(), ids=BROKEN_BODIES)
async def test_a_2xx_is_acceptance_whatever_its_body(
    outbox: OutboxThread, wall: Wall, answer: bytes, body: bytes
) -> None:
    answered = asyncio.Event()

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await answered.wait()
        writer.write(body)

    async def on_answer(*_: object) -> None:
        answered.set()

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(on_answer)
    timeout = aiohttp.ClientTimeout(total=2)
    await store(outbox, 1, "a")
    async with talking(talk) as url, aiohttp.ClientSession(timeout=timeout, trace_configs=[trace]) as session:
        dispatcher = Bench(outbox, session, wall).dispatcher(url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert dispatcher.last_error is None
    assert await head(outbox) is None


async def test_a_2xx_is_acceptance_though_its_body_never_comes(
    outbox: OutboxThread, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED + b"Transfer-Encoding: chunked\r\n\r\n")
        await reader.read()  # until the client hangs up

    monkeypatch.setattr(module, "TIMEOUT", aiohttp.ClientTimeout(total=0.5))
    await store(outbox, 1, "a")
    async with talking(talk) as url, open_session() as session:
        dispatcher = Bench(outbox, session, wall).dispatcher(url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert dispatcher.last_error is None
    assert await head(outbox) is None


@pytest.mark.parametrize(("status", "accepted"), [(b"200 OK", True), (b"500 Broken", False)])
async def test_the_end_of_an_endless_answer_is_not_waited_for(bench: Bench, status: bytes, accepted: bool) -> None:  # noqa: FBT001 - a parameter of the cases
    hung_up = asyncio.Event()

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 1000000000000\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        finally:
            hung_up.set()

    await store(bench.outbox, 1, "a")
    async with talking(talk) as url:
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
            await soon(hung_up.wait())
    assert (await head(bench.outbox) is None) == accepted


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@127.0.0.1:1", "http://user:hunter2@[::bad", "http://a..b/hunter2"]
)
async def test_an_url_that_cannot_be_reached_fails_without_telling_its_credentials(bench: Bench, url: str) -> None:
    await store(bench.outbox, 1, "a")
    dispatcher = bench.dispatcher(url)
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert dispatcher.last_error
    assert "hunter2" not in dispatcher.last_error + repr(logs)
    assert (await pending(bench.outbox)).attempts == 1


# Several receivers, several lives


async def test_a_dead_receiver_does_not_delay_another(bench: Bench, server: Server) -> None:
    asked = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()

    batches = await store(bench.outbox, 5, "dead", "alive")
    async with talking(talk) as url:
        dead, alive = bench.dispatcher(url, "dead"), bench.dispatcher(server.url, "alive")
        async with running(dead):
            await soon(asked.wait())
            async with running(alive):
                assert sent(await server.take(5)) == expected(batches)
                await soon(alive.settled.wait())
            assert not dead.settled.is_set()
    queues = bench.outbox.outbox.queues
    assert queues == {"alive": Queue(0, 0, 5, 10), "dead": Queue(5, 10, 0, 0)}
    assert bench.outbox.outbox.totals.delivered == 0


async def test_a_retry_goes_on_after_a_restart_where_it_stood(
    path: Path, session: aiohttp.ClientSession, server: Server, wall: Wall
) -> None:
    server.then(500, 500)
    with closing(OutboxThread(path)) as outbox:
        batches = await store(outbox, 2, "a")
        dispatcher = Bench(outbox, session, wall).dispatcher(server.url)
        async with running(dispatcher):
            await server.take(1)
            await soon(dispatcher.settled.wait())
            wall.now += 1
            dispatcher.wake()
            await server.take(1)
            await soon(dispatcher.settled.wait())

    with closing(OutboxThread(path)) as outbox:
        failed = await pending(outbox)
        assert (failed.attempts, failed.next_at) == (2, NOW + 3)
        dispatcher = Bench(outbox, session, wall).dispatcher(server.url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
            assert server.requests.empty(), "its time has not come"
            wall.now += 2
            dispatcher.wake()
            assert sent(await server.take(2)) == expected(batches)


async def test_an_attempt_that_was_cut_off_is_made_again(bench: Bench, server: Server) -> None:
    asked = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()

    batches = await store(bench.outbox, 1, "a")
    async with talking(talk) as url, running(bench.dispatcher(url)):
        await soon(asked.wait())
    async with running(bench.dispatcher(server.url)):
        assert sent(await server.take(1)) == expected(batches)


# The batcher


@dataclass(frozen=True, slots=True)
class Mine:
    """A miner, and the batcher between it and one receiver."""

    miner: Miner
    dispatcher: Dispatcher
    batcher: Batcher

    async def find(self, count: int) -> None:
        """Check `count` nonces, all of them valid."""
        lease = await self.miner.lease(count)
        await self.miner.complete(lease, [1.0] * len(lease.span), "f00d")


def mine(bench: Bench, url: str, *, size: int, age: float) -> Mine:
    miner = Miner(bench.outbox, NODE, paused=False, clock=lambda: 0.0, wall=bench.wall)
    dispatcher = bench.dispatcher(url)
    return Mine(miner, dispatcher, Batcher(miner, bench.outbox, [dispatcher], size=size, age=age, wall=bench.wall))


def nonces(request: Request) -> list[int]:
    found = orjson.loads(request.body)["nonces"]
    assert isinstance(found, list)
    return found


async def test_a_batch_goes_out_when_it_is_full(bench: Bench, server: Server) -> None:
    one = mine(bench, server.url, size=3, age=1e6)
    await one.miner.set_round(ROUND)
    async with running(one.dispatcher, one.batcher):
        await one.find(2)
        await one.find(5)
        assert [nonces(request) for request in await server.take(2)] == [[0, 1, 2], [3, 4, 5]]
        await soon(one.dispatcher.settled.wait())
    assert server.requests.empty()
    assert bench.outbox.outbox.totals.stored == 6


async def test_what_one_forming_leaves_is_formed_next(
    bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocd.delivery.outbox.MOST_BATCHES", 1)
    one = mine(bench, server.url, size=2, age=1e6)
    await one.miner.set_round(ROUND)
    await one.find(6)
    async with running(one.dispatcher, one.batcher):
        assert [nonces(request) for request in await server.take(3)] == [[0, 1], [2, 3], [4, 5]]


async def test_a_batch_is_formed_when_it_is_old_enough(bench: Bench) -> None:
    one = mine(bench, "http://127.0.0.1:1", size=100, age=5.0)
    await one.miner.set_round(ROUND)
    await one.find(2)
    bench.wall.now += 4.5
    assert await one.batcher.form() == NOW + 5
    assert await head(bench.outbox) is None
    bench.wall.now += 0.5
    assert await one.batcher.form() is None
    assert orjson.loads((await pending(bench.outbox)).body)["nonces"] == [0, 1]


async def test_a_batch_that_grows_old_goes_out_with_nobody_to_ask_for_it(bench: Bench, server: Server) -> None:
    bench.wall.tick = 0.001
    one = mine(bench, server.url, size=100, age=0.02)
    await one.miner.set_round(ROUND)
    async with running(one.dispatcher, one.batcher):
        await one.find(2)
        (request,) = await server.take(1)
    assert nonces(request) == [0, 1]


@pytest.mark.parametrize("following", [NEXT, None], ids=["next", "none"])
async def test_what_is_left_of_a_round_goes_out_when_it_is_over(
    bench: Bench, server: Server, following: Round | None
) -> None:
    one = mine(bench, server.url, size=100, age=1e6)
    await one.miner.set_round(ROUND)
    async with running(one.dispatcher, one.batcher):
        await one.find(2)
        await one.miner.set_round(following)
        (request,) = await server.take(1)
    assert nonces(request) == [0, 1]
    assert orjson.loads(request.body)["block_hash"] == ROUND.block_hash


async def test_a_late_result_of_a_round_that_is_over_goes_out_at_once(bench: Bench, server: Server) -> None:
    one = mine(bench, server.url, size=100, age=1e6)
    await one.miner.set_round(ROUND)
    lease = await one.miner.lease(2)
    await one.miner.set_round(NEXT)
    async with running(one.dispatcher, one.batcher):
        await soon(one.dispatcher.settled.wait())
        await one.miner.complete(lease, [1.0, 1.0], "f00d")
        (request,) = await server.take(1)
    assert nonces(request) == [0, 1]


@pytest.mark.parametrize("stop", [Miner.pause, lambda miner: miner.close(1.0)], ids=["pause", "close"])
async def test_stopping_sends_what_is_left(
    bench: Bench, server: Server, stop: Callable[[Miner], Awaitable[None]]
) -> None:
    one = mine(bench, server.url, size=100, age=1e6)
    await one.miner.set_round(ROUND)
    async with running(one.dispatcher, one.batcher):
        await one.find(2)
        await stop(one.miner)
        (request,) = await server.take(1)
    assert nonces(request) == [0, 1]
