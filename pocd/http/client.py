"""How we call others over HTTP: without cookies or the environment's proxies, and without waiting for each other."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler

from pocd.http.answers import TolerantParser

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiohttp import AddrInfoType

    Refuse = Callable[[str], str | None]
    Addresses = Sequence[tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]]  # the last for `getnameinfo`


NO_ADDRESS = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}  # the second is not everywhere
STUCK_SECONDS = 30.0  # after which the kernel ends a connection whose other side takes nothing


def open_session(
    timeout: aiohttp.ClientTimeout,
    *,
    window: int | None = None,
    refuse: Refuse | None = None,
    certificate: Callable[[float], None] | None = None,
) -> aiohttp.ClientSession:
    """Return a client for one peer, which shares nothing with those for others; the caller closes it.

    Each request has a connection of its own, so that no answer is taken for another request's.

    Args:
        timeout: Limits of each call.
        window: Size of the receive buffer in bytes, for small answers; None for the system's default. It
            bounds how long a peer that floods us can keep our thread busy in one go.
        refuse: Returns why an IP address must not be connected to, or None. It is called right before each connection,
            for a looked-up address and one in the URL; the next one of the same name is tried all the same.
        certificate: Called at each connection by TLS with the time at which the peer's certificate expires, in seconds
            since the epoch.
    """
    # IPv6 and IPv4 are tried in turn, as RFC 8305 says. Answers come uncompressed: nobody can send us a bomb.
    return aiohttp.ClientSession(
        timeout=timeout,
        connector=_Connector(
            resolver=ThreadResolver(), socket_factory=partial(_open_socket, window, refuse), certificate=certificate
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"},
        request_class=_Request,
    )


class _Request(aiohttp.ClientRequest):
    """Aiohttp's request, with user info in UTF-8 (RFC 7617 section 2.1); its own is Latin-1, and fails at the rest."""

    def update_auth(self, auth: aiohttp.BasicAuth | None, trust_env: bool = False) -> None:  # noqa: FBT001, FBT002 - aiohttp's own
        """Set the user info of the URL as Basic authentication."""
        known = auth or self.auth
        super().update_auth(known and known._replace(encoding="utf-8"), trust_env)


class _Connector(aiohttp.TCPConnector):
    """Aiohttp's connections, each for one request.

    On a connection that is kept, an answer too many, by the peer or a proxy before it, would be believed about the next
    request, and all later ones be off by one; and one that the peer closes just then costs that request.
    """

    def __init__(
        self,
        *,
        resolver: AbstractResolver,
        socket_factory: Callable[[AddrInfoType], socket.socket],
        certificate: Callable[[float], None] | None,
    ) -> None:
        super().__init__(resolver=resolver, socket_factory=socket_factory, force_close=True)
        self._factory = partial(_Connection, loop=self._loop, certificate=certificate)  # type: ignore[assignment] # a subclass will do


class _Connection(ResponseHandler):
    """Aiohttp's side of a connection, which is closed by an answer that comes before the request."""

    def __init__(self, loop: asyncio.AbstractEventLoop, certificate: Callable[[float], None] | None = None) -> None:
        super().__init__(loop)
        self._certificate = certificate

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take notice of the connection; its handshake, if it has one, is done."""
        super().connection_made(transport)
        found = transport.get_extra_info("peercert")
        if found and self._certificate is not None:
            self._certificate(ssl.cert_time_to_seconds(found["notAfter"]))

    def set_response_params(self, **params: Any) -> None:  # noqa: ANN401 - aiohttp's own
        """Expect the answer to the request that is about to be sent."""
        super().set_response_params(**params)
        self._parser = TolerantParser(self._parser, self, self._loop)  # type: ignore[assignment] # all that is asked

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer, or close the connection."""
        if self._parser is None:
            self.abort()
        else:
            super().data_received(data)


def _open_socket(window: int | None, refuse: Refuse | None, address: AddrInfoType) -> socket.socket:
    """Make a socket that does not outlive its use; `OSError` for an address that is refused.

    Closing a connection waits for what is written to it to be taken. A peer that stops reading in the middle of a
    request would keep one socket of each attempt for ever, until there are none left.
    """
    family, kind, protocol, _, (host, *_) = address
    reason = refuse(str(host)) if refuse else None
    if reason is not None:
        raise PermissionError(errno.EACCES, reason)
    opened = socket.socket(family, kind, protocol)
    if window is not None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STUCK_SECONDS * 1000))
    return opened


class ThreadResolver(AbstractResolver):
    """Looks names up by the system's resolver, each name in a thread of its own.

    The system's call cannot be cancelled and may take half a minute. In a pool that all share, a few dead names
    would hold up every other one (uvloop's has two threads for this). Here a name that hangs occupies one thread,
    which whoever asks for the same name again waits for, and which does not keep the process from ending.

    Args:
        getaddrinfo: The system's.
    """

    def __init__(self, getaddrinfo: Callable[..., Addresses] = socket.getaddrinfo) -> None:
        self._getaddrinfo = getaddrinfo
        self._lookups: dict[tuple[str, int, socket.AddressFamily], asyncio.Future[Addresses]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of `host`.

        Raises:
            OSError: The name is not known, or cannot be looked up now.
        """
        key = (host, port, family)
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = self._start(key)
        found = await asyncio.shield(lookup)
        return [
            ResolveResult(
                hostname=host,
                host=socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0],
                port=port,
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, protocol, _, address in found
        ]

    def _start(self, key: tuple[str, int, socket.AddressFamily]) -> asyncio.Future[Addresses]:
        loop = asyncio.get_running_loop()
        lookup: asyncio.Future[Addresses] = loop.create_future()
        lookup.add_done_callback(lambda done: self._finished(key, done))
        host, port, family = key

        def look_up() -> None:
            found: Addresses | OSError
            try:
                found = self._look_up(host, port, family)
            except OSError as error:
                found = error
            except UnicodeError as error:
                found = OSError(f"{host!r} is not a host name: {error}")
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(report, found)

        def report(found: Addresses | OSError) -> None:
            if isinstance(found, OSError):
                lookup.set_exception(found)
            else:
                lookup.set_result(found)

        try:
            threading.Thread(target=look_up, name=f"lookup {host}", daemon=True).start()
        except RuntimeError as error:  # too many threads
            report(OSError(errno.EAGAIN, f"{host!r} cannot be looked up: {error}"))
        return lookup

    def _look_up(self, host: str, port: int, family: socket.AddressFamily) -> Addresses:
        """Ask for addresses of the kinds that this host has; where there is none, for any: loopback is of no kind."""
        try:
            return self._getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family, flags=socket.AI_ADDRCONFIG)
        except socket.gaierror as error:
            if error.errno not in NO_ADDRESS:
                raise
        return self._getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family, flags=0)

    def _finished(self, key: tuple[str, int, socket.AddressFamily], lookup: asyncio.Future[Addresses]) -> None:
        del self._lookups[key]
        if not lookup.cancelled():
            lookup.exception()  # taken notice of, also when nobody waits for it any more

    async def close(self) -> None:
        """Do nothing: lookups under way end by themselves."""
