"""A client of the admin API, for the command line and the demo."""

from __future__ import annotations

import errno
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

TIMEOUT = aiohttp.ClientTimeout(total=40, connect=3)  # above what the daemon allows its store
STREAM_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=3, sock_read=40)  # the daemon says something every 15 s
EVENTS = "/api/v1/pow/events"


class AdminError(Exception):
    """The API cannot be reached or refused; the message says what and where.

    Attributes:
        status: The HTTP status of a refusal; None without an answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of the daemon.

    Attributes:
        id: Id of the event, from which a stream can be resumed.
        kind: Kind of `pocd.observe.events`, or `dropped`: the stream has ended, and can be resumed from `id`.
        data: Fields of the kind, and `time` in seconds since the epoch, except in `dropped`.
    """

    id: str
    kind: str
    data: dict[str, Any]


async def call(
    url: str,
    method: str,
    path: str,
    *,
    token: str | None = None,
    query: dict[str, str] | None = None,
    body: dict[str, Any] | bytes | None = None,
) -> dict[str, Any]:
    """Call the API at `url`, with `body` as JSON (bytes as they are), and return the JSON that it answers.

    Args:
        url: `http://HOST:PORT`, or `unix://PATH` for a Unix socket.
        method: The HTTP method.
        path: Begins with a slash.
        token: Bearer token, if the API needs one.
        query: Appended to the path.
        body: Sent as JSON; bytes as they are.

    Raises:
        AdminError: Nothing answers there, or the answer is an error.
    """
    raw = body if isinstance(body, bytes | None) else orjson.dumps(body)
    async with (
        _session(url, token, TIMEOUT) as (session, base),
        session.request(
            method,
            base + path,
            params=query,
            data=None if raw is None else BytesIO(raw),  # a stream, as aiohttp warns of large bytes
        ) as response,
    ):
        answer = _checked(url, response.status, orjson.loads(await response.read()))
        if not isinstance(answer, dict):
            raise AdminError(f"{url} is not pocd's admin API")
        return answer


async def events(
    url: str, *, token: str | None = None, last_id: str | None = None, latest: int = 0
) -> AsyncGenerator[ServerEvent, None]:
    """Yield the daemon's events as they happen, until it ends the stream.

    Args:
        url: `http://HOST:PORT`, or `unix://PATH` for a Unix socket.
        token: Bearer token, if the API needs one.
        last_id: Id of the event after which to begin.
        latest: Number of past events to begin with, where `last_id` is not given.

    Raises:
        AdminError: Nothing answers there, the answer is an error, or the stream falls silent.
    """
    headers = {"Last-Event-ID": last_id} if last_id else {}
    query = {"latest": str(latest)} if latest and not last_id else {}
    async with (
        _session(url, token, STREAM_TIMEOUT) as (session, base),
        session.get(base + EVENTS, headers=headers, params=query) as response,
    ):
        if response.status >= 400:
            _checked(url, response.status, orjson.loads(await response.read()))
        fields: dict[str, str] = {}
        async for line in response.content:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name:
                fields[name] = value
                continue
            if "data" in fields:
                yield ServerEvent(fields["id"], fields["event"], orjson.loads(fields["data"]))
            fields = {}


@asynccontextmanager
async def _session(
    url: str, token: str | None, limits: aiohttp.ClientTimeout
) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    """Give a session for calls of the API, and the base URL of its paths."""
    is_socket = url.startswith("unix://")
    connector = aiohttp.UnixConnector(url.removeprefix("unix://")) if is_socket else None
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with _told(url, is_socket=is_socket):
        async with aiohttp.ClientSession(connector=connector, timeout=limits, headers=headers) as session:
            yield session, "http://localhost" if is_socket else url.rstrip("/")


def _checked(url: str, status: int, answer: Any) -> Any:  # noqa: ANN401 - whatever JSON has
    """Return an answer unless its status is an error's."""
    if status >= 400:
        raise AdminError(f"{url} refused: {answer['error']['message']}", status)
    return answer


@contextmanager
def _told(url: str, *, is_socket: bool) -> Iterator[None]:
    """Turn a call's exceptions into an `AdminError` for people."""
    try:
        yield
    except TimeoutError:
        raise AdminError(f"{url} does not answer; is the daemon overloaded?") from None
    except aiohttp.ClientConnectionError as error:
        if is_socket and isinstance(error, aiohttp.ClientConnectorError) and error.errno == errno.EACCES:
            raise AdminError(f"{url} is for its owner and group only; call as one of them") from None
        raise AdminError(f"nothing listens on {url}; is the daemon running (systemctl status pocd)?") from None
    except (aiohttp.ClientError, ValueError, KeyError, TypeError):
        raise AdminError(f"{url} is not pocd's admin API") from None
