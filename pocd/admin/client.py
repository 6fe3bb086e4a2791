"""A client of the admin API, for the command line and the demo."""

from __future__ import annotations

import errno
from io import BytesIO
from typing import Any

import aiohttp
import orjson

TIMEOUT = aiohttp.ClientTimeout(total=40, connect=3)  # above what the daemon allows its store


class AdminError(Exception):
    """The API cannot be reached or refused; the message says what and where.

    Attributes:
        status: The HTTP status of a refusal; None without an answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


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
        token: What the API asks for, if it does.
        query: Appended to the path.
        body: Sent as JSON; bytes as they are.

    Raises:
        AdminError: Nothing answers there, or the answer is an error.
    """
    raw = body if isinstance(body, bytes | None) else orjson.dumps(body)
    is_socket = url.startswith("unix://")
    connector = aiohttp.UnixConnector(url.removeprefix("unix://")) if is_socket else None
    base = "http://localhost" if is_socket else url.rstrip("/")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=TIMEOUT, headers=headers) as session,
            session.request(
                method,
                base + path,
                params=query,
                data=None if raw is None else BytesIO(raw),  # a stream, as aiohttp warns of large bytes
            ) as response,
        ):
            answer = orjson.loads(await response.read())
            if response.status >= 400:
                raise AdminError(f"{url} refused: {answer['error']['message']}", response.status)
            if not isinstance(answer, dict):
                raise AdminError(f"{url} is not pocd's admin API")
            return answer
    except TimeoutError:
        raise AdminError(f"{url} does not answer; is the daemon overloaded?") from None
    except aiohttp.ClientConnectionError as error:
        if is_socket and isinstance(error, aiohttp.ClientConnectorError) and error.errno == errno.EACCES:
            raise AdminError(f"{url} is for its owner and group only; call as one of them") from None
        raise AdminError(f"nothing listens on {url}; is the daemon running (systemctl status pocd)?") from None
    except (aiohttp.ClientError, ValueError, KeyError, TypeError):
        raise AdminError(f"{url} is not pocd's admin API") from None
