"""HTTP servers: JSON answers, one form of error, and limits so that slow or silent clients cannot fill a server.

A client costs us a connection for as long as it keeps us waiting. So every wait for one has an end, and when there
are too many connections, the one that we wait for longest goes. What is being answered is never closed for it.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import orjson
from aiohttp import web

from pocd.http.unix_socket import UnixListener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from aiohttp.typedefs import Handler

LARGE_BODY = 64 * 1024
"""Bytes; larger bodies are counted, see `Bounds`, and are parsed in a thread of their own."""

BACKLOG = 512  # connections that wait to be accepted; all at once they stay below the usual limit of 1024 files


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits on what the clients of a server may cost.

    Attributes:
        connections: Most connections at a time.
        first_head: Seconds from the connection to the end of the first request's head.
        next_head: Seconds from an answer to the end of the next request's head.
        body: Seconds for a request's body.
        answer: Seconds in which a client has to take an answer, unless its handler streams it.
        bodies: Bytes of all large bodies that are being received or worked on.
        body_grace: Seconds after which a large body that has not arrived yet makes room for another one.
    """

    connections: int = 256
    first_head: float = 10.0
    next_head: float = 75.0
    body: float = 30.0
    answer: float = 30.0
    bodies: int = 128 * 2**20
    body_grace: float = 5.0


DEFAULT_BOUNDS = Bounds()


class RefusalError(Exception):
    """A refused request: the HTTP status, a short name for programs, and the field at fault, if it is one.

    Attributes:
        headers: Further headers of the answer, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        field: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field
        self.headers = headers or {}

    def body(self) -> dict[str, object]:
        """Return the body of the error answer (docs/protocol.md section 7)."""
        return {"error": {"code": self.code, "message": str(self), "field": self.field}}


def json_answer(value: object, status: int = 200) -> web.Response:
    """Return `value` as a JSON answer that ends with a newline, for people who use curl."""
    return web.Response(
        body=orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE), status=status, content_type="application/json"
    )


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer refusals, and aiohttp's own (no such route, body too large), in the one form of error."""
    try:
        return await handler(request)
    except RefusalError as error:
        answer = json_answer(error.body(), error.status)
        answer.headers.update(error.headers)
        return answer
    except web.HTTPClientError as error:  # raised again, for its headers
        refusal = RefusalError(error.status, error.reason.lower().replace(" ", "_"), error.text or error.reason)
        error.body = orjson.dumps(refusal.body())
        error.content_type = "application/json"
        raise


@asynccontextmanager
async def listening(
    app: web.Application, host: str, port: int, *, shutdown_timeout: float, bounds: Bounds = DEFAULT_BOUNDS
) -> AsyncIterator[str]:
    """Serve `app` on a TCP port while the context lasts, and give its URL.

    Args:
        app: The application to serve; it gets two more middlewares, and can be served once.
        host: Address to bind, or a name: of its addresses those that this host has, as `localhost` without IPv6.
        port: TCP port; 0 takes a free one.
        shutdown_timeout: Seconds that requests under way have to end, when the context ends.
        bounds: Limits on what clients may cost.

    Raises:
        OSError: The address cannot be bound.
    """
    async with _protocols(app, bounds, shutdown_timeout) as protocols:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        here = [address for address in addresses if _is_here(address)]
        server = await loop.create_server(protocols, here or addresses, port, backlog=BACKLOG)
        try:
            address, bound = server.sockets[0].getsockname()[:2]
            yield f"http://[{address}]:{bound}" if ":" in address else f"http://{address}:{bound}"
        finally:
            server.close()


def _is_here(address: str) -> bool:
    """Tell whether this host has an IP address to bind."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError as error:
        return error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
    return True


@asynccontextmanager
async def listening_at(
    app: web.Application,
    path: Path,
    *,
    shutdown_timeout: float,
    bounds: Bounds = DEFAULT_BOUNDS,
    told: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[str]:
    """Serve `app` on a Unix socket while the context lasts, and give its URL: unix:// and the path.

    The socket is for its owner and group (mode 0660). One that was left behind, on which nobody listens, is replaced;
    one that somebody removes is put back.

    Args:
        app: The application to serve; it gets two more middlewares, and can be served once.
        path: Path of the socket, which is removed at the end.
        shutdown_timeout: Seconds that requests under way have to end, when the context ends.
        bounds: Limits on what clients may cost.
        told: Gets a text for the log, when the socket was put back or cannot be.

    Raises:
        OSError: Another program listens there, or the path cannot be used.
    """
    async with _protocols(app, bounds, shutdown_timeout) as protocols:
        listener = UnixListener(path, protocols, backlog=BACKLOG, told=told)
        await listener.open()
        watch = asyncio.create_task(listener.watch(), name=f"socket {path}")
        try:
            yield f"unix://{path}"
        finally:
            watch.cancel()
            listener.close()


@asynccontextmanager
async def _protocols(
    app: web.Application, bounds: Bounds, shutdown_timeout: float
) -> AsyncIterator[Callable[[], asyncio.Protocol]]:
    """Give the factory of each connection's protocol, for `app`, within `bounds`."""
    connections = _Connections(bounds)
    app.middlewares.insert(0, connections.answer)
    app.middlewares.append(connections.read_body)
    runner = web.AppRunner(app, shutdown_timeout=shutdown_timeout)
    await runner.setup()
    assert runner.server is not None
    try:
        yield partial(_Protocol, runner.server, connections)
    finally:
        await runner.cleanup()
        connections.close()


class _Protocol(web.RequestHandler):
    """Aiohttp's protocol of one connection, which reports its begin and end, and whose errors have our form."""

    def __init__(self, server: web.Server, connections: _Connections) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, access_log=None, auto_decompress=False)  # type: ignore[arg-type] # None: no log
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        if self._connections.made(self, stream):
            super().connection_made(transport)
        else:
            self.force_close()  # what comes is not looked at
            stream.write(_TOO_MANY)
            stream.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.lost(self)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer malformed HTTP, which reaches no middleware and no log, and failures on our side."""
        if isinstance(exc, ConnectionError):
            return web.Response(status=400)  # nobody gets it: the client has gone before it was told to continue
        if status < 500:
            error = RefusalError(status, "malformed_request", (message or "this is not HTTP").partition("\n")[0])
        else:
            super().handle_error(request, status, exc, message)  # logs it
            error = RefusalError(status, "internal_error", "this should not happen; the log says more")
        answer = json_answer(error.body(), status)
        answer.force_close()
        return answer


def _refuse_compressed(request: web.Request) -> None:
    """Refuse what a few bytes would fill our memory with; no limit of ours is on what they unpack to."""
    coding = request.headers.get("Content-Encoding", "identity")
    if coding.strip().lower() != "identity":
        message = "send the body as it is, without a Content-Encoding"
        raise RefusalError(415, "compressed_body", message, "Content-Encoding", headers={"Accept-Encoding": "identity"})


class _Connections:
    """All connections of a server: those that wait for their clients, each with its limit, and those at work."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._open: dict[asyncio.Protocol, asyncio.Transport] = {}
        self._waiting: dict[asyncio.Protocol, asyncio.TimerHandle | None] = {}  # the one that waits longest is first
        self._bodies: dict[asyncio.Protocol, tuple[int, float]] = {}  # bytes of large bodies, and when they began

    def made(self, http: asyncio.Protocol, transport: asyncio.Transport) -> bool:
        """Accept a new connection, if need be in place of the one that waits longest; False where none waits."""
        if len(self._open) >= self._bounds.connections:
            longest = next(iter(self._waiting), None)
            if longest is None:
                return False
            self._drop(longest)
        self._open[http] = transport
        self._wait(http, self._bounds.first_head)
        return True

    def lost(self, http: asyncio.Protocol) -> None:
        """Forget a connection that has ended."""
        self._work(http)
        self._open.pop(http, None)
        self._bodies.pop(http, None)

    def close(self) -> None:
        """End the connections that are left, whose clients do not take what was written to them."""
        for http in list(self._open):
            self._drop(http)

    @web.middleware
    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count a request as work from its head to the end of its answer; the first middleware of all."""
        http = request.protocol
        self._work(http)
        await asyncio.sleep(0)  # a client that sends many requests at once has no more than one answered at each turn
        try:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                await self._write(request, error)
                raise
            if isinstance(response, web.Response):
                await self._write(request, response)
            return response
        finally:
            self._bodies.pop(http, None)
            self._wait(http, self._bounds.next_head)

    @web.middleware
    async def read_body(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Read the whole body, which the request keeps for its handler; the last middleware of all.

        Until it is here the client keeps us waiting, and not we the client.
        """
        if request.can_read_body:
            _refuse_compressed(request)
            self._make_room(request)
            self._wait(request.protocol, None)
            try:
                async with asyncio.timeout(self._bounds.body):
                    await request.read()
            except TimeoutError:
                message = f"the body did not arrive within {self._bounds.body:g} s"
                raise RefusalError(408, "too_slow", message) from None
            except (web.RequestPayloadError, ConnectionResetError) as error:
                raise RefusalError(400, "unreadable_body", f"the body is cut short or malformed: {error}") from None
            finally:
                self._work(request.protocol)
        return await handler(request)

    def _make_room(self, request: web.Request) -> None:
        """Count a large body, if need be in place of one whose client has kept us waiting for it too long."""
        most = request.client_max_size
        size = most if request.content_length is None else min(request.content_length, most)
        if size <= LARGE_BODY:
            return
        now = asyncio.get_running_loop().time()
        while sum(each for each, _ in self._bodies.values()) + size > self._bounds.bodies:
            longest = next((http for http in self._bodies if http in self._waiting), None)  # the first began first
            if longest is None or now - self._bodies[longest][1] < self._bounds.body_grace:
                message = f"large bodies of {self._bounds.bodies} bytes in all are being worked on; try again later"
                raise RefusalError(503, "too_many_bodies", message, headers={"Retry-After": "1"})
            self._drop(longest)
        self._bodies[request.protocol] = size, now

    async def _write(self, request: web.Request, response: web.Response) -> None:
        """Write an answer, and end a connection whose client does not take it."""
        timer = asyncio.get_running_loop().call_later(self._bounds.answer, self._drop, request.protocol)
        try:
            await response.prepare(request)
            await response.write_eof()
        except ConnectionError:
            pass  # the client has gone: aiohttp finds out too, when it looks whether all is written
        finally:
            timer.cancel()

    def _wait(self, http: asyncio.Protocol, seconds: float | None) -> None:
        """Wait for the client, and drop the connection after `seconds` (None: the caller limits the wait)."""
        self._work(http)
        if http in self._open:
            loop = asyncio.get_running_loop()
            self._waiting[http] = None if seconds is None else loop.call_later(seconds, self._drop, http)

    def _work(self, http: asyncio.Protocol) -> None:
        """Stop waiting for the client: a request is being worked on."""
        timer = self._waiting.pop(http, None)
        if timer is not None:
            timer.cancel()

    def _drop(self, http: asyncio.Protocol) -> None:
        """End a connection at once, without waiting for its client to take what was written."""
        transport = self._open.get(http)
        self.lost(http)
        if transport is not None:
            transport.abort()


_TOO_MANY_BODY = RefusalError(503, "too_many_connections", "all connections are in use; try again later").body()
_TOO_MANY = b"\r\n".join(
    [
        b"HTTP/1.1 503 Service Unavailable",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(orjson.dumps(_TOO_MANY_BODY)),
        b"Retry-After: 1",
        b"Connection: close",
        b"",
        orjson.dumps(_TOO_MANY_BODY),
    ]
)
