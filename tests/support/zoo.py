"""A zoo of receivers, on real sockets: what an animal is, how it behaves, and where it lives (animals.py has them)."""

from __future__ import annotations

import asyncio
import fcntl
import random
import shutil
import socket
import ssl
import struct
import subprocess
import termios
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from tests.support.delivering import Request, read_request
from tests.support.waiting import soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from pocd.http.client import Addresses

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

    async def heard(self) -> None:
        """Wait until pocd has read what was said, which a reset would overtake."""
        sock = self.writer.get_extra_info("socket")
        await until(lambda: fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)) == bytes(4))  # tcp(7): nothing is on its way
        for _turn in range(20):  # pocd is on this loop too
            await asyncio.sleep(0)

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
        trickles: Whether the answer to a batch lasts until pocd has heard enough of it.
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
    trickles: bool = False
    tls: bool = False
    requests: list[Request] = field(default_factory=list)
    """What it got when it was visited; cleared at each opening."""


# What the animals say


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


OK = answer("200 OK")
DRIP_SECONDS = 0.005  # between two drops


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
        await visit.say(start + drop)
        while True:
            await asyncio.sleep(DRIP_SECONDS)
            await visit.say(drop)

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
        await visit.heard()
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


def refusing_the_body(said: bytes, most: int = 0) -> Talk:
    """Answer when the head of the request has come, and take no body of more than `most` bytes."""

    async def talk(visit: Visit) -> None:
        head = await visit.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        if length <= most:
            await visit.reader.readexactly(length)
            await visit.say(OK)
            return
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
