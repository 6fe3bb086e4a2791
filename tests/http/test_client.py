"""Calling others: each name is looked up in a thread of its own, and a session shares nothing with another."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pocd.http import client
from pocd.http.client import ThreadResolver, open_session
from pocd.http.urls import as_written, below, unusable
from pocd.process import SHORT
from tests.support.delivering import read_request, serving, talking
from tests.support.waiting import PATIENCE, soon, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pocd.http.client import Addresses

TIMEOUT = aiohttp.ClientTimeout(total=PATIENCE)


class Names:
    """The system's resolver for the names of a test: those of `hanging.*` answer when they are released."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.began = asyncio.Event()
        self.released = threading.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, host: str, port: int, **_: Any) -> client.Addresses:  # noqa: ANN401 - the system's own
        self.asked[host] += 1
        if host.startswith("hanging."):
            self._loop.call_soon_threadsafe(self.began.set)
            assert self.released.wait(PATIENCE)
        if host.startswith("unknown."):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)


@contextmanager
def names() -> Iterator[Names]:
    found = Names()
    try:
        yield found
    finally:
        found.released.set()


async def test_a_name_that_hangs_delays_no_other_and_is_looked_up_once() -> None:
    with names() as system:
        resolver = ThreadResolver(system)
        hanging = [asyncio.create_task(resolver.resolve("hanging.test", 80)) for _ in range(20)]
        await soon(system.began.wait())
        hanging.append(asyncio.create_task(resolver.resolve("hanging.test", 80)))
        for number in range(20):
            (found,) = await soon(resolver.resolve(f"well-{number}.test", 80))
            assert (found["host"], found["hostname"], found["port"]) == ("127.0.0.1", f"well-{number}.test", 80)
        assert system.asked["hanging.test"] == 1
        assert not any(task.done() for task in hanging)
        system.released.set()
        answers = await soon(asyncio.gather(*hanging))
        assert [found["host"] for (found,) in answers] == ["127.0.0.1"] * 21


async def test_who_gives_up_on_a_name_does_not_stop_the_lookup_for_the_next_one() -> None:
    with names() as system:
        resolver = ThreadResolver(system)
        first = asyncio.create_task(resolver.resolve("hanging.test", 80))
        await soon(system.began.wait())
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(resolver.resolve("hanging.test", 80))
        await asyncio.sleep(0)
        system.released.set()
        assert await soon(second)
        assert system.asked["hanging.test"] == 1


async def test_a_name_is_looked_up_anew_when_it_was_answered() -> None:
    """Nothing is remembered here: what the system's resolver caches, it knows for how long."""
    with names() as system:
        resolver = ThreadResolver(system)
        for _ in range(2):
            await soon(resolver.resolve("well.test", 80))
            with pytest.raises(OSError, match="not known"):
                await soon(resolver.resolve("unknown.test", 80))
        assert system.asked == {"well.test": 2, "unknown.test": 4}  # the latter for addresses of either kind too


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".test", "\udcff"])
async def test_what_is_no_name_is_an_error_like_a_name_that_nobody_knows(host: str) -> None:
    with pytest.raises(OSError, match="is not a host name"):
        await soon(ThreadResolver().resolve(host, 80))


async def test_no_thread_to_look_a_name_up_is_an_error_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolver = ThreadResolver()
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OSError, match="cannot be looked up: can't start new thread") as caught:
        await soon(resolver.resolve("localhost", 80))
    assert caught.value.errno in SHORT
    monkeypatch.undo()
    assert await soon(resolver.resolve("localhost", 80))


async def test_every_address_of_a_name_is_given() -> None:
    def system(*_: Any, **__: Any) -> client.Addresses:  # noqa: ANN401 - the system's own
        kind = socket.SOCK_STREAM
        return [
            (socket.AF_INET6, kind, 6, "", ("::1", 80, 0, 0)),
            (socket.AF_INET, kind, 6, "", ("127.0.0.1", 80)),
        ]

    found = await soon(ThreadResolver(system).resolve("both.test", 80, socket.AF_UNSPEC))
    assert [(each["host"], each["family"]) for each in found] == [
        ("::1", socket.AF_INET6),
        ("127.0.0.1", socket.AF_INET),
    ]


def test_a_lookup_that_hangs_does_not_keep_the_process_from_ending() -> None:
    code = (
        "import asyncio, threading, sys\n"
        "from pocd.http.client import ThreadResolver\n"
        "began = threading.Event()\n"
        "def hang(*_, **__):\n"
        "    began.set()\n"
        "    threading.Event().wait()\n"
        "async def main():\n"
        "    task = asyncio.create_task(ThreadResolver(hang).resolve('hanging.test', 80))\n"
        "    await asyncio.to_thread(began.wait)\n"
        "    task.cancel()\n"
        "asyncio.run(main())\n"
        "print('ended')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_a_lookup_that_ends_after_its_loop_is_closed_disturbs_nobody() -> None:
    released, ended = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def slow(*_: Any, **__: Any) -> client.Addresses:  # noqa: ANN401 - the system's own
        threads.append(threading.current_thread())
        ended.set()
        assert released.wait(PATIENCE)
        return []

    async def main() -> None:
        task = asyncio.create_task(ThreadResolver(slow).resolve("slow.test", 80))
        await asyncio.to_thread(ended.wait)
        task.cancel()

    asyncio.run(main())
    released.set()
    threads[0].join(PATIENCE)  # what it raised would be a warning, and fail this test
    assert not threads[0].is_alive()


# Sessions


async def test_a_session_keeps_no_cookies_and_asks_no_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_cookie() -> web.Response:
        response = web.Response()
        response.set_cookie("followed", "you")
        return response

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with serving() as server, open_session(TIMEOUT) as session:
        server.answers.append(with_cookie)
        url = server.url.replace("127.0.0.1", "localhost")
        for _ in range(2):
            async with session.post(url, data=b"{}") as response:
                assert response.status == 200
        requests = await server.take(2)
    assert all("cookie" not in request.headers for request in requests)


async def test_a_session_takes_no_credentials_from_a_netrc_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login someone password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with serving() as server, open_session(TIMEOUT) as session:
        async with session.post(server.url, data=b"{}"):
            pass
        (request,) = await server.take(1)
    assert "authorization" not in request.headers


async def test_a_session_asks_for_nothing_compressed_and_unpacks_nothing() -> None:
    packed = gzip.compress(b"0" * 2**20)
    async with serving() as server, open_session(TIMEOUT) as session:
        server.answers.append(partial(web.Response, body=packed, headers={"Content-Encoding": "gzip"}))
        async with session.post(server.url, data=b"{}") as response:
            assert await response.read() == packed
        (request,) = await server.take(1)
    assert request.headers["accept-encoding"] == "identity"


FULL = b"HTTP/1.1 503 Full\r\nContent-Length: 0\r\n\r\n"
TAKEN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
STRAYS = {
    "a whole one in the same segment": (TAKEN + TAKEN, b""),
    "its beginning in the same segment": (TAKEN + TAKEN[:9], TAKEN[9:]),
    "a byte in the same segment": (TAKEN + b"\n", b""),
    "a whole one later": (TAKEN, TAKEN),
    "none, and the connection closed at the next request": (TAKEN, None),
}


@pytest.mark.parametrize(("first", "later"), STRAYS.values(), ids=STRAYS)
async def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next_one(first: bytes, later: bytes | None) -> None:
    """A proxy that answers twice: with the answers off by one, what was refused would count as accepted."""
    answers = [first, FULL]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers.pop(0))
        if answers and later is not None:
            writer.write(later)
            await read_request(reader)
            writer.write(answers.pop(0))
        await read_request(reader)

    async with talking(talk) as url, open_session(TIMEOUT) as session:
        async with session.post(url, data=b"{}") as response:
            assert (response.status, await response.read()) == (200, b"ok")
        async with session.post(url, data=b"{}") as response:
            assert response.status == 503


async def test_an_answer_before_the_request_ends_the_connection() -> None:
    here, there = socket.socketpair()
    loop = asyncio.get_running_loop()
    with there:
        _, link = await loop.create_connection(lambda: client._Connection(loop), sock=here)
        there.sendall(TAKEN)
        await until(lambda: not link.is_connected())
        assert not link._tail


async def test_each_request_has_a_connection_of_its_own_and_says_so() -> None:
    async with serving() as server, open_session(TIMEOUT) as session:
        for _ in range(3):
            async with session.post(server.url, data=b"{}") as response:
                assert (response.status, await response.read()) == (200, b"stored")
        requests = await server.take(3)
    assert [request.headers["connection"] for request in requests] == ["close"] * 3


PATHS = [
    *(
        "/hook/a%3Db%3D",
        "/hook/(x)%28y%29",
        "/hook/u%40h",
        "/hook/a%2Bb",
        "/hook/a%2Fb",
        "/hook/a%2fb",
        "/hook/%7Etilde",
    ),
    *("/hook/a%27b", "/hook/a%25b", "/hook/a//b", "//a", "/hook/a;v=1", "/hook/./a/../b", "/a%2", "/?key=%3D&a=b+c"),
]


async def requested(url: str) -> tuple[str, str]:
    """Ask for `url` at a server on a socket; return what is asked for, and the Authorization header."""
    seen = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
        seen.append((head.split()[1], head.partition("Authorization: ")[2].partition("\r")[0]))
        writer.write(TAKEN)
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server, open_session(TIMEOUT) as session:
        port = server.sockets[0].getsockname()[1]
        async with session.get(as_written(url.replace("HOST", f"127.0.0.1:{port}"))) as response:
            assert response.status == 200
    return seen[0]


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_is_asked_for_as_it_is_written(path: str) -> None:
    assert (await requested(f"http://HOST{path}"))[0] == path


async def test_what_a_request_line_cannot_hold_is_encoded() -> None:
    assert (await requested("http://HOST/\u043f/%D0%BF a"))[0] == "/%D0%BF/%D0%BF%20a"


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ("u:p%40s%2Fs%3A", "u:p@s/s:"),
        ("u:%D0%BF%D0%B0%D1%80", "u:\u043f\u0430\u0440"),
        ("u:m\u00fcnchen", "u:m\u00fcnchen"),
        ("token:", "token:"),
        ("token", "token:"),
    ],
)
async def test_user_info_is_sent_in_utf_8(info: str, expected: str) -> None:
    _, authorization = await requested(f"http://{info}@HOST/")
    assert base64.b64decode(authorization.removeprefix("Basic ")).decode() == expected


@pytest.mark.parametrize("url", ["http://h:99999/", "http://[::1/", "http://[x]/"])
def test_what_is_no_url_is_said_to_be_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        as_written(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h", "http://h/x"),
        ("http://h/a%3D/", "http://h/a%3D/x"),
        ("http://h/cb///", "http://h/cb/x"),
        ("http://h?key=%3D", "http://h/x?key=%3D"),
        ("http://h/a?b=c/&d", "http://h/a/x?b=c/&d"),
        ("http://h/a?", "http://h/a/x"),
    ],
)
def test_what_is_below_a_url_comes_before_its_query(url: str, expected: str) -> None:
    assert unusable(url) is None
    assert str(below(url, "x")) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "LocalHost"])
async def test_hosts_in_their_forms_can_be_called(host: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(TAKEN)
        writer.close()

    local = "::1" if "1]" in host and "127" not in host else "127.0.0.1"
    async with await asyncio.start_server(talk, local, 0) as server, open_session(TIMEOUT) as session:
        url = f"http://{host}:{server.sockets[0].getsockname()[1]}"
        assert unusable(url) is None
        async with session.get(below(url, "x")) as response:
            assert response.status == 200


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        *((host, "four decimal numbers") for host in ("127.1", "0177.0.0.1", "2130706433", "0x7f.1", "256.1.1.1")),
        *((host, "four decimal numbers") for host in ("1.2.3.4.5", "127.0.0.1.", "\uff11\uff12\uff17.1")),
        *((host, "IPv6 address") for host in ("[::1%25lo]", "[fe80::1%eth0]", "[v1.a]")),
        *((host, "letters, digits") for host in ("a\\b", "%61", "a,b", "a|b")),
        *((host, "1 to 63 characters") for host in ("a..b", f"{'a' * 64}.test", ".")),
        *((host, "port of 1 to 65535") for host in ("h:0", "h:99999", "h:-1", "h:x", "[::1", "[]", "", "h b", "h\tb")),
        ("h/#key", "no fragment"),
    ],
)
def test_what_could_never_be_called_is_refused_with_the_reason(host: str, reason: str) -> None:
    assert reason in str(unusable(f"http://user:pass@{host}"))


PIECES = [*"abx01.-_:[]%@/?&=~!$ ", "\u00fc", "\uff12", "\u3002", "\u0130", "xn--", "::1"]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
def test_what_is_not_refused_can_be_asked_for(text: str) -> None:
    if unusable(f"http://{text}") is None:
        assert below(f"http://{text}", "x").host


async def test_a_name_that_only_loopback_has_is_found() -> None:
    """Where an interface has one kind of addresses, AI_ADDRCONFIG leaves out the other kind's loopback too."""

    def getaddrinfo(_host: str, port: int, *, flags: int, **_: object) -> Addresses:
        if flags & socket.AI_ADDRCONFIG:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return socket.getaddrinfo("::1", port, type=socket.SOCK_STREAM)

    found = await ThreadResolver(getaddrinfo).resolve("localhost6", 80)
    assert [each["host"] for each in found] == ["::1"]


async def test_each_session_has_its_own_connections_and_resolver() -> None:
    async with open_session(TIMEOUT) as one, open_session(TIMEOUT) as another:
        assert one.connector is not another.connector
        assert isinstance(one.connector, aiohttp.TCPConnector)
        assert isinstance(another.connector, aiohttp.TCPConnector)
        assert one.connector._resolver is not another.connector._resolver
        assert isinstance(one.connector._resolver, ThreadResolver)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux ends such connections")
async def test_a_peer_that_takes_nothing_more_costs_no_socket_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed connection waits for the peer to take what was written, which this one never does."""
    monkeypatch.setattr(client, "STUCK_SECONDS", 0.2)
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.bind(("127.0.0.1", 0))
        peer.listen()
        async with open_session(aiohttp.ClientTimeout(total=0.2)) as session:
            before = open_files()
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with session.post(f"http://127.0.0.1:{peer.getsockname()[1]}", data=io.BytesIO(b"x" * 2**24)):
                        pass
            await until(lambda: open_files() <= before)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(("window", "most"), [(16 * 1024, 2 * 16 * 1024), (None, 2**30)])
async def test_a_window_bounds_what_a_peer_may_send_before_it_is_looked_at(window: int | None, most: int) -> None:
    """The kernel counts its own overhead in, and so doubles the number."""
    async with serving() as server, open_session(TIMEOUT, window=window) as session:
        server.answers.append(partial(web.Response, body=b"x" * 2**20))  # so that the connection is still in use
        async with session.post(server.url, data=b"{}") as response:
            assert response.connection is not None
            assert response.connection.transport is not None
            opened = response.connection.transport.get_extra_info("socket")
            size = opened.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            assert len(await response.read()) == 2**20
    assert 0 < size <= most
    assert (size > 2 * 16 * 1024) == (window is None)
