"""What slow, silent and greedy clients can do to an HTTP server of ours, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
import uvloop
from aiohttp import web

from pocd.http import unix_socket
from pocd.http.server import Bounds, RefusalError, errors_as_json, json_answer, listening, listening_at
from tests.support.waiting import PATIENCE, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

PATIENT = Bounds(first_head=PATIENCE, next_head=PATIENCE, body=PATIENCE, answer=PATIENCE)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
GET_HELD = b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"
HALF_A_POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf"
LARGE = b"x" * 2**24  # more than the kernel takes for a client that does not read


class Server:
    """An app whose requests to /held wait until they are released, and what came to it."""

    def __init__(self) -> None:
        self.began = asyncio.Queue[None]()
        self.release = asyncio.Event()
        self.port = 0
        self._clients = contextlib.ExitStack()

    async def _answer(self, request: web.Request) -> web.Response:
        return json_answer(len(await request.read()))

    async def _held(self, _request: web.Request) -> web.Response:
        self.began.put_nowait(None)
        await self.release.wait()
        return json_answer("released")

    async def _large(self, _request: web.Request) -> web.Response:
        self.began.put_nowait(None)
        return web.Response(body=LARGE)

    async def _broken(self, _request: web.Request) -> web.Response:
        raise RuntimeError("hunter2")

    async def _refused(self, _request: web.Request) -> web.Response:
        raise RefusalError(429, "too_many", "later", headers={"Retry-After": "7"})

    @contextlib.asynccontextmanager
    async def served(self, bounds: Bounds = PATIENT) -> AsyncIterator[Server]:
        app = web.Application(middlewares=[errors_as_json], client_max_size=1000)
        app.router.add_route("*", "/", self._answer)
        app.router.add_get("/held", self._held)
        app.router.add_get("/large", self._large)
        app.router.add_get("/broken", self._broken)
        app.router.add_get("/refused", self._refused)
        with self._clients:
            async with listening(app, "127.0.0.1", 0, shutdown_timeout=0.1, bounds=bounds) as url:
                self.port = int(url.rpartition(":")[2])
                yield self

    async def connect(self, *, buffer: int | None = None) -> Client:
        """Connect; with a `buffer`, hardly any more than that is taken without being read."""
        opened = self._clients.enter_context(socket.socket())
        if buffer is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        opened.setblocking(False)
        await soon(asyncio.get_running_loop().sock_connect(opened, ("127.0.0.1", self.port)))
        return Client(opened)


class Client:
    """A connection of which the test says every byte."""

    def __init__(self, opened: socket.socket) -> None:
        self.opened = opened
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        """Send; that the server has hung up is for `receive` to tell."""
        with contextlib.suppress(ConnectionError):
            await soon(self._loop.sock_sendall(self.opened, data))

    async def receive(self) -> bytes:
        """What has come, at least one byte of it; nothing at the end."""
        try:
            data: bytes = await soon(self._loop.sock_recv(self.opened, 2**16))
        except ConnectionResetError:
            return b""
        return data

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        found = b""
        while data := await self.receive():
            found += data
        return found

    async def answer(self) -> tuple[int, Any]:
        """One answer with a JSON body that comes in one piece."""
        head, _, body = (await self.receive()).partition(b"\r\n\r\n")
        return int(head.split()[1]), orjson.loads(body)


# How many.


async def test_a_thousand_connections_that_say_nothing_keep_nobody_out() -> None:
    async with Server().served() as server:
        silent = [await server.connect() for _ in range(1000)]
        client = await server.connect()
        for _ in range(3):
            await client.send(GET)
            assert await client.answer() == (200, 0)
        ended = [each for each in silent if is_closed(each)]
        assert ended == silent[: 1001 - 256]  # the eldest, and no more than had to go


def is_closed(client: Client) -> bool:
    try:
        return client.opened.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


async def test_who_idles_longest_goes_first_and_who_is_answered_stays() -> None:
    async with Server().served(replace(PATIENT, connections=3)) as server:
        busy, first, second = [await server.connect() for _ in range(3)]
        await busy.send(GET_HELD)
        await soon(server.began.get())
        await first.send(GET)  # so that the second idles longer, though it came later
        assert await first.answer() == (200, 0)
        third = await server.connect()
        await third.send(GET)
        assert await third.answer() == (200, 0)
        assert await second.rest() == b""
        await first.send(GET)
        assert await first.answer() == (200, 0)
        server.release.set()
        assert await busy.answer() == (200, "released")


async def test_where_all_are_answered_a_new_one_is_told_to_come_again() -> None:
    async with Server().served(replace(PATIENT, connections=2)) as server:
        busy = [await server.connect() for _ in range(2)]
        for each in busy:
            await each.send(GET_HELD)
            await soon(server.began.get())
        refused = await server.connect()
        head, _, body = (await refused.rest()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1\r\n" in head
        assert orjson.loads(body)["error"]["code"] == "too_many_connections"
        server.release.set()
        for each in busy:
            assert await each.answer() == (200, "released")
        again = await server.connect()  # in place of one that idles now
        await again.send(GET)
        assert await again.answer() == (200, 0)


async def test_a_client_that_sends_many_requests_at_once_has_one_answered_at_each_turn() -> None:
    order: list[str] = []
    every = asyncio.Event()

    async def note(request: web.Request) -> web.Response:
        order.append(request.query["who"])
        if len(order) == 303:
            every.set()
        return json_answer(0)

    app = web.Application()
    app.router.add_get("/", note)
    async with listening(app, "127.0.0.1", 0, shutdown_timeout=0.1, bounds=PATIENT) as url:
        where = ("127.0.0.1", int(url.rpartition(":")[2]))
        opened = [await asyncio.open_connection(*where) for _ in range(4)]
        # All of it is there before the server looks, of the greedy one first.
        opened[0][1].write(b"GET /?who=greedy HTTP/1.1\r\nHost: x\r\n\r\n" * 300)
        for _, writer in opened[1:]:
            writer.write(b"GET /?who=other HTTP/1.1\r\nHost: x\r\n\r\n")
        await soon(every.wait())
        for _, writer in opened:
            writer.close()
    assert order.count("greedy") == 300
    assert max(at for at, who in enumerate(order) if who == "other") < 30


async def test_bodies_that_do_not_come_keep_nobody_out() -> None:
    """A token or not: while we wait for a client, its place is another's."""
    async with Server().served(replace(PATIENT, connections=2)) as server:
        stalled = [await server.connect() for _ in range(4)]
        for each in stalled:
            await each.send(HALF_A_POST)
        client = await server.connect()
        await client.send(GET)
        assert await client.answer() == (200, 0)


async def test_large_bodies_are_bounded_in_all_and_one_that_does_not_come_makes_room() -> None:
    began, release = asyncio.Queue[None](), asyncio.Event()

    async def take(request: web.Request) -> web.Response:
        began.put_nowait(None)
        await release.wait()
        return json_answer(len(await request.read()))

    app = web.Application(middlewares=[errors_as_json], client_max_size=200_000)
    app.router.add_post("/", take)
    body = b"x" * 100_000
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    server = Server()
    bounds = replace(PATIENT, bodies=250_000, body_grace=0.0)
    with server._clients:
        async with listening(app, "127.0.0.1", 0, shutdown_timeout=0.1, bounds=bounds) as url:
            server.port = int(url.rpartition(":")[2])
            stalled, busy, second, small, refused = [await server.connect() for _ in range(5)]
            await stalled.send(head + b"half")
            for each in (busy, second):
                await each.send(head + body)
                await soon(began.get())
            await small.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            await soon(began.get())  # small ones are not counted
            await refused.send(head)
            status, answer = await refused.answer()
            assert (status, answer["error"]["code"]) == (503, "too_many_bodies")
            release.set()
            for each, size in ((busy, 100_000), (second, 100_000), (small, 2)):
                assert await each.answer() == (200, size)
            assert await stalled.rest() == b""  # it made room for the second
            again = await server.connect()
            await again.send(head + body)
            assert await again.answer() == (200, 100_000)


async def test_a_client_that_goes_before_it_is_told_to_continue_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with Server().served() as server:
        for _ in range(30):
            client = await server.connect()
            await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
            client.opened.shutdown(socket.SHUT_WR)
            await client.rest()
    assert [record.getMessage() for record in caplog.records] == []


# How long.


@pytest.mark.parametrize("begun", [b"", b"GET / HT", GET[:-2]])
async def test_a_head_has_to_come_whole_in_time(begun: bytes) -> None:
    async with Server().served(replace(PATIENT, first_head=0.05)) as server:
        client = await server.connect()
        await client.send(begun)
        assert await client.rest() == b""


async def test_a_head_that_trickles_in_byte_by_byte_gains_no_time() -> None:
    async with Server().served(replace(PATIENT, first_head=0.05)) as server:
        client = await server.connect()
        await client.send(GET[:-2] + b"X-Endless: ")
        ended = asyncio.create_task(client.rest())
        while not ended.done():
            await client.send(b"x")
            await asyncio.sleep(0.005)
        assert await soon(ended) == b""


async def test_the_next_head_has_a_time_of_its_own() -> None:
    async with Server().served(replace(PATIENT, next_head=0.05)) as server:
        client = await server.connect()
        await client.send(GET)
        assert await client.answer() == (200, 0)
        await client.send(GET[:-2])
        assert await client.rest() == b""


async def under_way(server: Server) -> Client:
    """A request whose head has come in time; where the machine is too slow for that, a later one."""
    while True:
        client = await server.connect()
        await client.send(GET_HELD)
        await until(lambda: is_closed(client) or not server.began.empty())  # noqa: B023 - it ends before the next one
        if not server.began.empty():
            return client


async def test_a_request_under_way_is_not_ended_by_the_time_for_heads() -> None:
    async with Server().served(replace(PATIENT, first_head=0.05, next_head=0.05)) as server:
        busy, idle = await under_way(server), await server.connect()
        assert await idle.rest() == b""  # it came later, and its time is over
        server.release.set()
        assert await busy.answer() == (200, "released")


async def test_a_body_that_does_not_come_is_a_408() -> None:
    async with Server().served(replace(PATIENT, body=0.05)) as server:
        client = await server.connect()
        await client.send(HALF_A_POST)
        status, body = await client.answer()
        assert status == 408
        error = {"code": "too_slow", "message": "the body did not arrive within 0.05 s", "field": None}
        assert body == {"error": error}


async def test_clients_that_fail_are_no_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    async with Server().served(replace(PATIENT, connections=1)) as server:
        client = await server.connect()
        await client.send(HALF_A_POST)
        client.opened.close()
        other = await server.connect()
        await other.send(GET)
        assert await other.answer() == (200, 0)
    await test_who_does_not_take_an_answer_is_cut_off()
    assert not caplog.records


async def test_a_body_may_come_in_pieces_and_is_whole_for_its_handler() -> None:
    async with Server().served() as server:
        client = await server.connect()
        await client.send(HALF_A_POST)
        await client.send(b"second")
        assert await client.answer() == (200, 10)


@pytest.mark.parametrize("announced", [b"Content-Length: 1001", b"Transfer-Encoding: chunked"])
async def test_a_body_that_is_too_large_is_a_413(announced: bytes) -> None:
    async with Server().served() as server:
        client = await server.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\n" + announced + b"\r\n\r\n")
        await client.send(b"3e9\r\n" + b"x" * 1001 if b"chunked" in announced else b"x" * 1001)
        status, body = await client.answer()
        assert (status, body["error"]["code"]) == (413, "request_entity_too_large")


@pytest.mark.parametrize("length", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
async def test_a_compressed_body_is_a_415_before_it_has_come(length: bytes) -> None:
    async with Server().served() as server:
        client = await server.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: GZip\r\n" + length + b"\r\n\r\n")
        status, body = await client.answer()
        assert (status, body["error"]["code"], body["error"]["field"]) == (415, "compressed_body", "Content-Encoding")


async def test_a_body_that_says_it_is_as_it_is_is_taken() -> None:
    async with Server().served() as server:
        client = await server.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: identity\r\nContent-Length: 2\r\n\r\nok")
        assert await client.answer() == (200, 2)


async def test_who_does_not_take_an_answer_is_cut_off() -> None:
    async with Server().served(replace(PATIENT, answer=0.05, connections=1)) as server:
        client = await server.connect(buffer=4096)
        await client.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await soon(server.began.get())
        while True:  # until the place is free: nobody is refused any more
            other = await server.connect()
            await other.send(GET)
            status, _ = await other.answer()
            if status == 200:
                break
            assert status == 503
        assert 0 < len(await client.rest()) < len(LARGE)


async def test_who_takes_an_answer_slowly_gets_all_of_it() -> None:
    async with Server().served() as server:
        client = await server.connect(buffer=2**17)
        await client.send(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await client.rest()).endswith(LARGE)


async def test_a_server_ends_though_clients_are_silent_stall_or_do_not_read() -> None:
    async with Server().served() as server:
        _silent, stalls, deaf = await server.connect(), await server.connect(), await server.connect(buffer=4096)
        await stalls.send(HALF_A_POST)
        await deaf.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await soon(server.began.get())


async def test_pipelined_requests_are_answered_in_turn() -> None:
    async with Server().served() as server:
        client = await server.connect()
        await client.send(GET * 20)
        found = b""
        while found.count(b"HTTP/1.1 200 OK") < 20:
            found += await client.receive()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "Received HTTPS traffic on an HTTP port"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nno header\r\n\r\n", "Invalid header token:"),
        (b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 10_000 + b"\r\n\r\n", "Got more than 8190 bytes when reading"),
        (b"GET / HTTP/1.1\r\n" + b"X-Many: x\r\n" * 200 + b"\r\n", "Too many headers"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", "Duplicate 'Host' header found."),
    ],
)
async def test_what_is_no_http_is_an_error_like_any_other_and_is_not_logged(
    caplog: pytest.LogCaptureFixture, sent: bytes, said: str
) -> None:
    async with Server().served() as server:
        client = await server.connect()
        await client.send(sent)
        status, body = await client.answer()
        assert (status, body["error"]["code"]) == (400, "malformed_request")
        assert said in body["error"]["message"]
        assert await client.rest() == b""
    assert not caplog.records


async def test_a_failure_of_ours_is_logged_and_answered_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async with Server().served() as server:
        client = await server.connect()
        await client.send(b"GET /broken HTTP/1.1\r\nHost: x\r\n\r\n")
        status, body = await client.answer()
        assert (status, body["error"]["code"]) == (500, "internal_error")
        assert "hunter2" not in str(body)
    assert "hunter2" in caplog.text


async def test_refusals_and_the_library_s_errors_keep_their_headers() -> None:
    async with Server().served() as server:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
            async with session.get("/refused") as response:
                assert (response.status, response.headers["Retry-After"]) == (429, "7")
                assert (await response.json())["error"]["code"] == "too_many"
            async with session.post("/held") as response:
                assert (response.status, response.headers["Allow"]) == (405, "GET,HEAD")
                assert (await response.json())["error"]["code"] == "method_not_allowed"


ON_THE_DAEMON_S_LOOP = (
    test_a_thousand_connections_that_say_nothing_keep_nobody_out,
    test_who_idles_longest_goes_first_and_who_is_answered_stays,
    test_where_all_are_answered_a_new_one_is_told_to_come_again,
    test_a_head_that_trickles_in_byte_by_byte_gains_no_time,
    test_who_does_not_take_an_answer_is_cut_off,
    test_a_server_ends_though_clients_are_silent_stall_or_do_not_read,
)


@pytest.mark.parametrize("test", ON_THE_DAEMON_S_LOOP)
def test_it_is_the_same_on_uvloop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())


# Unix sockets.


def app() -> web.Application:
    async def answer(_request: web.Request) -> web.Response:
        return json_answer("well")

    made = web.Application()
    made.router.add_get("/", answer)
    return made


async def ask(path: Path) -> object:
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
        async with session.get("http://localhost/") as response:
            return await response.json()


async def test_a_unix_socket_is_for_owner_and_group_and_goes_with_its_server(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    before = os.umask(0)
    try:
        async with listening_at(app(), path, shutdown_timeout=1) as url:
            assert url == f"unix://{path}"
            assert stat.S_IMODE(path.lstat().st_mode) == 0o660
            assert await ask(path) == "well"
    finally:
        os.umask(before)
    assert not path.exists()


async def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    assert path.is_socket()
    async with listening_at(app(), path, shutdown_timeout=1):
        assert await ask(path) == "well"


async def test_a_socket_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    async with listening_at(app(), path, shutdown_timeout=1):
        with pytest.raises(OSError, match="another program listens there"):
            async with listening_at(app(), path, shutdown_timeout=1):
                pass
        assert await ask(path) == "well"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(Path.touch, "something else than a socket is there", id="file"),
        pytest.param(Path.mkdir, "something else than a socket is there", id="folder"),
        pytest.param(lambda path: path.symlink_to("elsewhere"), "something else than a socket is there", id="link"),
    ],
)
async def test_what_is_no_socket_is_left_alone(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    path = tmp_path / "api.sock"
    make(path)
    with pytest.raises(OSError, match=reason):
        async with listening_at(app(), path, shutdown_timeout=1):
            pass
    assert path.lstat()


async def test_a_socket_that_another_one_made_meanwhile_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    async with listening_at(app(), path, shutdown_timeout=1):
        path.unlink()
        path.touch()
    assert path.exists()


async def test_a_socket_that_somebody_removes_is_put_back_and_another_ones_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unix_socket, "LOOK_SECONDS", 0.01)
    path, told = tmp_path / "api.sock", list[str]()
    async with listening_at(app(), path, shutdown_timeout=1, told=told.append):
        path.unlink()
        await until(lambda: told)
        assert told == [f"the socket {path} was removed by somebody, and is there again"]
        assert stat.S_IMODE(path.lstat().st_mode) == 0o660
        assert await ask(path) == "well"
        path.unlink()
        path.touch()
        await until(lambda: len(told) == 2)
        assert told[1].startswith("something else is at ")
        path.unlink()
        await until(lambda: len(told) == 3)
        assert await ask(path) == "well"
    assert not path.exists()


@pytest.mark.parametrize("lacking", ["192.0.2.1", "2001:db8::1"])
async def test_of_a_names_addresses_those_are_served_that_this_host_has(
    monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """As `localhost` where IPv6 is switched off, and /etc/hosts still names ::1."""

    async def found(*_: object, **__: object) -> list[object]:
        return [(0, 0, 0, "", (address, 0)) for address in (lacking, "127.0.0.1")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)
    async with listening(web.Application(), "both", 0, shutdown_timeout=0.1) as url:
        assert url.startswith("http://127.0.0.1:")
