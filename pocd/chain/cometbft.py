"""One CometBFT node, read over its JSON-RPC: pure parsing first, then a thin shell that fetches.

docs/protocol.md section 8 lists the facts that bite; each has a test in tests/test_chain.py.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import aiohttp
import orjson
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from yarl import URL

from pocd.chain.source import Block, BlockUnavailableError, ChainError, Head
from pocd.observe.mask import excerpt, mask_url

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MAX_ANSWER_BYTES = 8 * 1024 * 1024
"""The longest answer that is read; a block's transactions are in it."""

_HEIGHT = re.compile(r"0|[1-9][0-9]{0,18}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})")
_NO_SUCH_HEIGHT = re.compile(r"height.*(must be less than or equal to|is not available)", re.IGNORECASE | re.DOTALL)


class _TransientError(ChainError):
    """Worth another attempt within the same call."""


def parse_status(body: bytes, where: str) -> Head:
    """Read the answer to `/status` (docs/protocol.md section 8).

    Args:
        body: The answer's bytes, whatever they are.
        where: What was asked, as error messages name it.

    Raises:
        ChainError: A JSON-RPC error, a node without blocks, or an answer that makes no sense.
    """
    answer = _read(body, where)
    height = answer.height("sync_info.latest_block_height")
    if height == 0:
        raise ChainError(f"{where}: the node has no blocks yet; wait until it has synchronised")
    block = Block(
        chain_id=answer.text("node_info.network"),
        height=height,
        hash=answer.text("sync_info.latest_block_hash"),
        time=answer.time("sync_info.latest_block_time"),
    )
    return Head(block, catching_up=answer.flag("sync_info.catching_up"))


def parse_block(body: bytes, height: int, where: str) -> Block:
    """Read the answer to `/block?height=N` (docs/protocol.md section 8).

    Args:
        body: The answer's bytes, whatever they are.
        height: The height that was asked for; the block's own must be the same.
        where: What was asked, as error messages name it.

    Raises:
        BlockUnavailableError: The height is not there yet, or pruned, or the node has lost the block's data.
        ChainError: Another JSON-RPC error, or an answer that makes no sense.
    """
    answer = _read(body, where)
    if answer.field("block") is None or answer.field("block_id.hash") == "":
        raise BlockUnavailableError(f"{where}: the node answered with an empty block")
    block = Block(
        chain_id=answer.text("block.header.chain_id"),
        height=answer.height("block.header.height"),
        hash=answer.text("block_id.hash"),
        time=answer.time("block.header.time"),
    )
    if block.height != height:
        raise ChainError(f"{where}: asked for block {height}, got block {block.height}")
    return block


@dataclass(frozen=True, slots=True)
class _Answer:
    """A JSON-RPC result whose fields are checked as they are read; paths are dotted."""

    where: str
    body: bytes
    result: object

    def field(self, path: str) -> object:
        value = self.result
        for name in path.split("."):
            if not isinstance(value, dict) or name not in value:
                raise ChainError(f"{self.where}: the answer has no {path}: {excerpt(self.body)}")
            value = value[name]
        return value

    def wrong(self, path: str, expected: str) -> ChainError:
        value = self.field(path)
        shown = "an object or a list" if isinstance(value, dict | list) else excerpt(orjson.dumps(value))
        return ChainError(f"{self.where}: {path} must be {expected}, but is {shown}")

    def text(self, path: str) -> str:
        value = self.field(path)
        # Opaque, but shown and hashed: a page of text or a line break is no name of a chain and no hash.
        if not isinstance(value, str) or not 0 < len(value) <= 256 or not value.isprintable():
            raise self.wrong(path, "a non-empty string on one line")
        return value

    def height(self, path: str) -> int:
        value = self.field(path)
        # CometBFT writes 64-bit integers as strings; proxies in front of it sometimes rewrite them as numbers. The
        # pattern also refuses true, an int to Python.
        if not isinstance(value, int | str) or not _HEIGHT.fullmatch(str(value)):
            raise self.wrong(path, "a whole number")
        return int(value)

    def flag(self, path: str) -> bool:
        value = self.field(path)
        if not isinstance(value, bool):
            raise self.wrong(path, "true or false")
        return value

    def time(self, path: str) -> datetime:
        value = self.field(path)
        if not isinstance(value, str) or not _TIME.fullmatch(value):
            raise self.wrong(path, "an RFC 3339 time")
        try:
            return datetime.fromisoformat(value).astimezone(UTC)  # drops what is finer than a microsecond
        except (ValueError, OverflowError):  # a 13th month, or a year outside 1 to 9999 in UTC
            raise self.wrong(path, "an RFC 3339 time") from None


def _read(body: bytes, where: str) -> _Answer:
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ChainError(f"{where}: the answer is not JSON: {excerpt(body)}") from None
    if not isinstance(message, dict):
        raise ChainError(f"{where}: the answer is not a JSON object: {excerpt(body)}")
    if message.get("error") is not None:
        raise _rpc_error(message["error"], body, where)
    return _Answer(where, body, message.get("result"))


def _rpc_error(error: object, body: bytes, where: str) -> ChainError:
    parts = [error.get("message"), error.get("data")] if isinstance(error, dict) else [error]
    text = ": ".join(part for part in parts if isinstance(part, str) and part)
    kind = BlockUnavailableError if _NO_SUCH_HEIGHT.search(text) else ChainError
    return kind(f"{where}: the node says: {excerpt(text or body, 160)}")


def _is_rpc_error(body: bytes) -> bool:
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(message, dict) and isinstance(message.get("error"), dict)


class CometBFT:
    """The node at `url`, over `session`, which the caller owns and closes.

    Every call is bounded: at most `attempts` requests of at most `timeout` seconds each, with random waits of at most
    1/4, 1/2, 1, 1, … s between them. Only what may pass is tried again: a failing connection, a timeout, HTTP 429, and
    HTTP 5xx unless it carries a JSON-RPC error, which is an answer.

    Args:
        session: Sends the requests. User info in `url` is sent as basic authentication.
        url: Base address, http or https; a path is kept, and so is a query (for API keys).
        attempts: Requests per call, at least 1.
        timeout: Seconds for one request, from the connection to the last byte.
        sleep: Waits between attempts.

    Raises:
        ValueError: `url` is not an http(s) address.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        attempts: int = 3,
        timeout: float = 5.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        try:
            self._base = URL(url)
        except ValueError:
            raise ValueError(f"{mask_url(url)} is not a URL") from None  # the cause quotes the password
        if self._base.scheme not in {"http", "https"} or not self._base.host:
            raise ValueError(f"{mask_url(url)} is not an http:// or https:// URL with a host")
        self._session = session
        self._attempts = attempts
        self._timeout = timeout
        self._sleep = sleep

    def __str__(self) -> str:
        """The masked address: how messages name this node."""
        return mask_url(str(self._base))

    async def head(self) -> Head:
        """Return the newest block (`/status`); see `ChainSource.head` and `parse_status` for the errors."""
        url = self._url("status")
        where = mask_url(str(url))
        return parse_status(await self._get(url, where), where)

    async def block(self, height: int) -> Block:
        """Return the block at `height`, at least 1; see `ChainSource.block` and `parse_block` for the errors."""
        url = self._url("block")
        where = f"{mask_url(str(url))} at height {height}"
        return parse_block(await self._get(url.update_query(height=height), where), height, where)

    def _url(self, method: str) -> URL:
        return (self._base / method).with_query(self._base.query)

    async def _get(self, url: URL, where: str) -> bytes:
        # One object per call: tenacity keeps the state of a call in it.
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._attempts),
            wait=wait_random_exponential(multiplier=0.25, max=1.0),
            retry=retry_if_exception_type(_TransientError),
            sleep=self._sleep,
            reraise=True,
        )
        return await retrying(self._get_once, url, where)

    async def _get_once(self, url: URL, where: str) -> bytes:
        try:
            async with self._session.get(
                url,
                timeout=aiohttp.ClientTimeout(total=self._timeout),
                allow_redirects=False,
                raise_for_status=False,
            ) as response:
                body = await _read_bounded(response, where)
        except TimeoutError:
            raise _TransientError(f"{where}: no answer within {self._timeout:g} s") from None
        except aiohttp.ClientResponseError as error:  # its own text quotes the URL, secrets included
            raise _TransientError(f"{where}: the answer is not HTTP: {excerpt(error.message)}") from None
        except aiohttp.ClientError as error:
            raise _TransientError(f"{where}: {excerpt(str(error) or type(error).__name__, 160)}") from None
        except UnicodeError as error:  # a host with an empty or too long label, or user info outside Latin-1
            raise ChainError(f"{where}: this address cannot be used: {excerpt(str(error))}") from None
        _check_http(response.status, response.headers.get("Location"), body, where)
        return body


async def _read_bounded(response: aiohttp.ClientResponse, where: str) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(64 * 1024):
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            begin = excerpt(bytes(body[:1024]))
            raise ChainError(f"{where}: the answer is longer than {MAX_ANSWER_BYTES} bytes: {begin}")
    return bytes(body)


def _check_http(status: int, location: str | None, body: bytes, where: str) -> None:
    if status == 200 or (status != 429 and _is_rpc_error(body)):
        return
    if 300 <= status < 400 and location is not None:
        target = excerpt(mask_url(location))
        raise ChainError(
            f"{where}: HTTP {status}, a redirect to {target}, which is not followed; configure that address"
        )
    kind = _TransientError if status == 429 or status >= 500 else ChainError
    raise kind(f"{where}: HTTP {status}: {excerpt(body)}")
