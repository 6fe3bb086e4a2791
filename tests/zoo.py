"""A zoo of receivers, on real sockets: each is bad in its own way, and says what pocd has to do about it."""

from __future__ import annotations

import asyncio
import gzip
import random
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from delivering import NOW, Request, read_request, soon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from pocd.calling import Addresses

Fate = Literal["delivered", "pending", "dead", "parked"]
Talk = Callable[["Visit"], Awaitable[None]]

UNKNOWN, HANGING = "unknown.test", "hanging.test"


@dataclass(frozen=True, slots=True)
class Visit:
    """One connection to an animal."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: list[Request]

    async def request(self) -> Request:
        """Read the next request, and note it."""
        request = await read_request(self.reader)
        self.requests.append(request)
        return request

    async def say(self, answer: bytes) -> None:
        self.writer.write(answer)
        await self.writer.drain()

    async def left(self) -> None:
        """Wait until pocd hangs up."""
        while await self.reader.read(65536):
            pass

    def reset(self) -> None:
        """End the connection so that the other side finds it reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@dataclass(frozen=True)
class Animal:
    """One kind of receiver, and what has to become of a queue of three batches.

    Attributes:
        name: What it is called in tests.
        does: What it does to a request.
        talk: How it does that; None where nobody is to be talked to.
        first: What is true of the head when it was tried once.
        error: What has to be in the receiver's error, or in the dead letter's reason.
        wait: Seconds until the next attempt; None where there is none to wait for.
        fault: Whether the batch may be what it failed at.
        alarm: Whether a person is called.
        then: What is true of the head after a second attempt.
        url: Where it lives, with `{port}`.
        keeps: Nonces in a batch for it.
        hangs: Whether an attempt lasts until pocd gives up.
        tls: Whether it speaks TLS, with a certificate that nobody has signed.
    """

    name: str
    does: str
    talk: Talk | None
    first: Fate
    error: str | None = None
    wait: float | None = None
    fault: bool = False
    alarm: bool = False
    then: Fate = "pending"
    url: str = "http://127.0.0.1:{port}"
    keeps: int = 2
    hangs: bool = False
    tls: bool = False
    requests: list[Request] = field(default_factory=list)
    """What it got when it was visited; cleared at each opening."""


# What the animals say


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


OK = answer("200 OK")
PATIENTLY = 0.005  # seconds between two drops of a drip, for which the tests' timeouts are long


def saying(*answers: bytes) -> Talk:
    """Answer request by request, from the last answer on with that; a connection may carry several."""

    async def talk(visit: Visit) -> None:
        while True:
            await visit.request()
            await visit.say(answers[min(len(visit.requests), len(answers)) - 1])

    return talk


def saying_raw(said: bytes) -> Talk:
    """Say something after the request, then end the connection in order."""

    async def talk(visit: Visit) -> None:
        await visit.request()
        await visit.say(said)
        visit.writer.write_eof()
        await visit.left()

    return talk


def flooding(start: bytes, flood: bytes) -> Talk:
    """Say something, and something else for as long as it is listened to."""

    async def talk(visit: Visit) -> None:
        await visit.request()
        await visit.say(start)
        while True:
            await visit.say(flood)

    return talk


def dripping(start: bytes, drop: bytes) -> Talk:
    """As `flooding`, slowly."""

    async def talk(visit: Visit) -> None:
        await visit.request()
        await visit.say(start)
        while True:
            await visit.say(drop)
            await asyncio.sleep(PATIENTLY)

    return talk


async def stall(visit: Visit) -> None:
    await visit.request()
    await visit.left()


async def stop_reading(visit: Visit) -> None:
    await visit.reader.read(1)  # and the kernel takes what it likes
    await asyncio.get_running_loop().create_future()


async def reset_at_once(visit: Visit) -> None:
    visit.reset()


def resetting(said: bytes) -> Talk:
    """Say something, then reset the connection."""

    async def talk(visit: Visit) -> None:
        await visit.request()
        await visit.say(said)
        if said:
            await asyncio.sleep(PATIENTLY)  # what was said arrives first: a reset overtakes it
        visit.reset()

    return talk


async def close_unread(visit: Visit) -> None:
    visit.writer.close()


async def close_silently(visit: Visit) -> None:
    await visit.request()


async def answer_too_late(visit: Visit) -> None:
    """Take the first batch, and say so only when pocd has hung up; then do as it should."""
    request = await visit.request()
    if len(visit.requests) == 1:
        await visit.left()
        return
    while request:
        await visit.say(OK)
        request = await visit.request()


def refusing_the_body(said: bytes) -> Talk:
    """Answer when the head of the request has come, and take nothing of its body."""

    async def talk(visit: Visit) -> None:
        await visit.reader.readuntil(b"\r\n\r\n")
        await visit.say(said)
        visit.writer.write_eof()
        await visit.left()

    return talk


async def speak_tls_only(visit: Visit) -> None:
    """What a TLS server says to plain HTTP: an alert (unexpected message)."""
    await visit.reader.read(1)
    await visit.say(bytes.fromhex("1503010002020a"))
    visit.writer.write_eof()
    await visit.left()


async def speak_http_only(visit: Visit) -> None:
    """What an HTTP server says to TLS."""
    await visit.reader.read(1)
    await visit.say(answer("400 Bad Request", b"not HTTP"))
    visit.writer.write_eof()
    await visit.left()


def flapping(seed: int) -> Talk:
    """Do something else at each request, as often well as ill."""
    chance = random.Random(seed)
    ills = [answer(status) for status in ("429 Slow", "503 Down", "404 Lost", "302 Away", "500 Broken", "408 Late")]

    async def talk(visit: Visit) -> None:
        while True:
            await visit.request()
            if chance.random() < 0.5:
                await visit.say(OK)
            elif chance.random() < 0.3:
                visit.reset()
                return
            else:
                await visit.say(chance.choice(ills))

    return talk


BOMB = gzip.compress(bytes(50 * 2**20))
CHUNKED = "Transfer-Encoding: chunked"


def later(seconds: float) -> str:
    return formatdate(NOW + seconds, usegmt=True)


def asking_for(retry_after: str, wait: float, name: str, status: int = 429, remark: str = "") -> Animal:
    shown = retry_after if len(retry_after) < 40 else f"{retry_after[:8]}…"
    return Animal(
        f"Retry-After {name}",
        f"answers {status} with `Retry-After: {shown}`, later 200",
        saying(answer(f"{status} Later", b"", f"Retry-After: {retry_after}"), OK),
        "pending",
        error=f"HTTP {status}{remark}",
        wait=wait,
        fault=status >= 500,
        then="delivered",
    )


ANIMALS = [
    # Nobody there
    Animal("refuses", "refuses connections", None, "pending", error="Cannot connect to host", wait=1),
    Animal(
        "unknown name",
        "has a name that nobody knows",
        None,
        "pending",
        error="Name or service not known",
        wait=1,
        url=f"http://{UNKNOWN}:{{port}}",
    ),
    Animal(
        "hanging name",
        "has a name whose lookup never ends",
        None,
        "pending",
        error="no connection within",
        wait=1,
        url=f"http://{HANGING}:{{port}}",
        hangs=True,
    ),
    # Silence
    Animal("stalls", "takes the batch and never answers", stall, "pending", "no answer within", 1, True, hangs=True),
    Animal(
        "stops reading",
        "takes a part of a large batch and no more",
        stop_reading,
        "pending",
        "no answer within",
        1,
        True,
        keeps=100_000,
        hangs=True,
    ),
    Animal(
        "drips in the head",
        "sends its headers byte by byte",
        dripping(b"HTTP/1.1 200 OK\r\nX-Drip: ", b"x"),
        "pending",
        "no answer within",
        1,
        True,
        hangs=True,
    ),
    Animal(
        "drips in the body of a 200",
        "answers 200 and sends the body byte by byte",
        dripping(answer("200 OK").replace(b" 0\r", b" 99999999\r"), b"x"),
        "delivered",
        then="delivered",
    ),
    Animal(
        "drips in the body of a 500",
        "answers 500 and sends the body byte by byte",
        dripping(answer("500 Broken").replace(b" 0\r", b" 99999999\r"), b"x"),
        "pending",
        "HTTP 500: x",
        1,
        True,
    ),
    Animal(
        "answers too late",
        "has the batch, but answers after the timeout",
        answer_too_late,
        "pending",
        "no answer within",
        1,
        True,
        then="delivered",
        hangs=True,
    ),
    # Floods
    Animal(
        "endless body of a 200",
        "answers 200 with a body without end",
        flooding(answer("200 OK").replace(b" 0\r", b" 999999999999\r"), b"x" * 65536),
        "delivered",
        then="delivered",
    ),
    Animal(
        "endless body of a 503",
        "answers 503 with a body without end",
        flooding(f"HTTP/1.1 503 Down\r\n{CHUNKED}\r\n\r\n".encode(), b"10000\r\n" + b"x" * 65536 + b"\r\n"),
        "pending",
        "HTTP 503: " + "x" * 200 + "…",
        1,
        True,
    ),
    Animal(
        "endless header",
        "sends a header without end",
        flooding(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 65536),
        "pending",
        "no HTTP: ",
        1,
        True,
    ),
    Animal(
        "endless headers",
        "sends headers without end",
        flooding(b"HTTP/1.1 200 OK\r\n", b"X-Another: header\r\n" * 1000),
        "pending",
        "no HTTP: ",
        1,
        True,
    ),
    Animal(
        "endless 100 Continue",
        "says `100 Continue` without end",
        flooding(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "pending",
        "no answer within",
        1,
        True,
        hangs=True,
    ),
    Animal(
        "gzip bomb in a 200",
        "answers 200 with 50 MiB in 50 kB of gzip",
        saying(answer("200 OK", BOMB, "Content-Encoding: gzip")),
        "delivered",
        then="delivered",
    ),
    Animal(
        "gzip bomb in a 500",
        "answers 500 with 50 MiB in 50 kB of gzip",
        saying(answer("500 Broken", BOMB, "Content-Encoding: gzip")),
        "pending",
        "HTTP 500: \ufffd",
        1,
        True,
    ),
    # Breaks
    Animal("resets at once", "resets the connection before the batch", reset_at_once, "pending", "reset", 1, True),
    Animal("resets unanswered", "takes the batch, then resets", resetting(b""), "pending", "reset", 1, True),
    Animal(
        "resets in its head",
        "resets the connection in the middle of its headers",
        resetting(b"HTTP/1.1 200 OK\r\nContent-"),
        "pending",
        "reset",
        1,
        True,
    ),
    Animal(
        "resets in the body of a 200",
        "answers 200, then resets in the middle of the body",
        resetting(answer("200 OK").replace(b" 0\r", b" 1000\r") + b"sto"),
        "delivered",
        then="delivered",
    ),
    Animal(
        "resets in the body of a 500",
        "answers 500, then resets in the middle of the body",
        resetting(answer("500 Broken").replace(b" 0\r", b" 1000\r") + b"out of"),
        "pending",
        "HTTP 500: out of",
        1,
        True,
    ),
    Animal(
        "closes at once",
        "closes the connection before it has read the batch",
        close_unread,
        "pending",
        "",
        1,
        True,
    ),
    Animal(
        "closes silently", "takes the batch and hangs up", close_silently, "pending", "Server disconnected", 1, True
    ),
    # No HTTP
    Animal("speaks ssh", "speaks SSH", saying_raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "pending", "no HTTP: ", 1, True),
    Animal("speaks noise", "sends noise", saying_raw(bytes(range(256)) * 100), "pending", "no HTTP: ", 1, True),
    Animal(
        "odd status",
        "answers with status 99999",
        saying_raw(b"HTTP/1.1 99999 Odd\r\n\r\n"),
        "pending",
        "no HTTP: ",
        1,
        True,
    ),
    Animal(
        "negative length",
        "announces a body of -5 bytes",
        saying_raw(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"),
        "pending",
        "no HTTP: ",
        1,
        True,
    ),
    Animal(
        "204 with a body",
        "answers 204, and sends the body that a 204 cannot have",
        saying_raw(answer("204 Stored", b"stored")),
        "pending",
        "no HTTP: ",
        1,
        True,
    ),
    Animal(
        "switches protocols",
        "answers 101, to speak something else",
        saying_raw(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n\x81\x05Hello"
        ),
        "pending",
        "HTTP 101",
        1,
    ),
    Animal(
        "speaks HTTP/2",
        "speaks HTTP/2 unasked",
        saying_raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        "pending",
        "no HTTP: ",
        1,
        True,
    ),
    Animal(
        "speaks TLS on the port of http",
        "is a TLS server, and its URL says http",
        speak_tls_only,
        "pending",
        "no HTTP: ",
        1,
        True,
    ),
    Animal(
        "speaks HTTP on the port of https",
        "is an HTTP server, and its URL says https",
        speak_http_only,
        "pending",
        "[SSL: ",
        1,
        url="https://127.0.0.1:{port}",
    ),
    Animal(
        "untrusted certificate",
        "has a certificate that nobody trusts",
        saying(OK),
        "pending",
        "certificate verify failed",
        1,
        url="https://localhost:{port}",
        tls=True,
    ),
    # Answers
    Animal(
        "redirects",
        "redirects to another address",
        saying(answer("307 Elsewhere", b"", "Location: http://169.254.169.254/latest/meta-data/")),
        "pending",
        "HTTP 307",
        1,
        alarm=True,
    ),
    Animal(
        "says no",
        "answers 401, later 200",
        saying(answer("401 Who Are You", b"unknown key"), OK),
        "pending",
        "HTTP 401: unknown key",
        1,
        alarm=True,
        then="delivered",
    ),
    Animal(
        "500 then 200",
        "answers 500, then 200",
        saying(answer("500 Broken", b"out of disk"), OK),
        "pending",
        "HTTP 500: out of disk",
        1,
        True,
        then="delivered",
    ),
    asking_for("7", 7, "in seconds"),
    asking_for(later(30), 30, "as a date"),
    asking_for("Tuesday, 14-Nov-23 22:14:00 GMT", 40, "as an RFC 850 date"),
    asking_for("Tue Nov 14 22:14:10 2023", 50, "as an asctime date"),
    asking_for(later(-3600), 1, "in the past"),
    asking_for("0", 1, "of nothing"),
    asking_for("soon", 1, "that is nonsense", remark=" (Retry-After makes no sense: soon)"),
    asking_for("9" * 400, 600, "that is absurd"),
    asking_for("20", 20, "with a 503", 503),
    Animal(
        "413 before the body",
        "answers 413 to the head of a large batch, and takes no body",
        refusing_the_body(answer("413 Too Large", b"at most 1 kB", "Connection: close")),
        "dead",
        "refused: HTTP 413: at most 1 kB",
        keeps=100_000,
        then="dead",
    ),
    Animal(
        "422",
        "finds the batch wrong",
        saying(answer("422 Odd", b"dist is not a number"), OK),
        "dead",
        "refused: HTTP 422: dist is not a number",
        then="dead",
    ),
    Animal("410", "wants nothing any more", saying(answer("410 Gone")), "parked", "HTTP 410", then="parked"),
    Animal(
        "says too much",
        "answers 200 twice to one batch",
        saying(OK + OK),
        "delivered",
        then="delivered",
    ),
]


# Their houses


class System:
    """The system's resolver, for which some names of the zoo hang, or are unknown."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def __call__(self, host: str, port: int, **known: Any) -> Addresses:  # noqa: ANN401 - the system's own
        if host == HANGING:
            self.released.wait()
        if host in (HANGING, UNKNOWN):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return socket.getaddrinfo(host, port, **known)


def certificate(folder: Path) -> ssl.SSLContext | None:
    """Make a certificate for localhost that nobody trusts; None where there is no openssl."""
    program = shutil.which("openssl")
    if program is None:
        return None
    subprocess.run(
        [
            *(program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"),
            *("-keyout", folder / "key.pem", "-out", folder / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@asynccontextmanager
async def opened(animal: Animal, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Let an animal live for as long as the context; yields its URL. Ends when pocd has left it alone."""
    animal.requests.clear()
    if animal.talk is None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))  # a port that nobody listens on, and nobody else can take
            yield animal.url.format(port=nobody.getsockname()[1])
        return

    numbers = count(1)
    visits: set[asyncio.Task[None]] = set()
    talk = animal.talk

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        visits.add(task)
        try:
            await talk(Visit(next(numbers), reader, writer, animal.requests))
        except (ConnectionError, EOFError, asyncio.CancelledError):
            pass  # pocd hung up, or the test ends
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls if animal.tls else None)
    try:
        yield animal.url.format(port=server.sockets[0].getsockname()[1])
    finally:
        server.close()
        if animal.talk is stop_reading:
            for visit in visits:  # it would not notice
                visit.cancel()
        await soon(asyncio.gather(*visits, return_exceptions=True))
        await server.wait_closed()
