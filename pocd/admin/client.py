"""A client of the admin API, for the command line and the demo."""

from __future__ import annotations

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

    Raises:
        AdminError: Nothing answers there, or the answer is an error.
    """
    raw = body if isinstance(body, bytes | None) else orjson.dumps(body)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=TIMEOUT, headers=headers) as session,
            session.request(
                method,
                url.rstrip("/") + path,
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
    except aiohttp.ClientConnectionError:
        raise AdminError(f"nothing listens on {url}; is the daemon running (systemctl status pocd)?") from None
    except (aiohttp.ClientError, ValueError, KeyError, TypeError):
        raise AdminError(f"{url} is not pocd's admin API") from None
