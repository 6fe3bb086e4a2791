"""JSON-RPC to a chain's node: bounded requests with retries, and checked answers.

A chain's own module (cometbft.py, evm.py) knows the methods and the fields; nothing here does.
"""

from __future__ import annotations

import asyncio
import itertools
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from pocd.chain.source import (
    BlockUnavailableError,
    ChainError,
    RefusedError,
    SlowDownError,
    UnreachableError,
)
from pocd.clock import SYSTEM
from pocd.http.retry_after import longest_wait
from pocd.http.urls import as_written, below, unusable
from pocd.observe.mask import excerpt, mask_url, url_secrets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from multidict import CIMultiDictProxy
    from yarl import URL

MAX_ANSWER_BYTES = 8 * 1024 * 1024
"""The longest answer that is read, unless a call allows for more. A block with 100,000 hashes of transactions fits."""

MOST_COMMAS = 300_000
"""Commas in an answer that is read. It takes the time of its values to read JSON, not of its bytes; a full block has
200,000 transactions at most, and 10,000 signatures of the block before."""

LIMIT_EXCEEDED = (-32005, -32007, 429)
"""JSON-RPC errors by which a node says that it is asked too often: EIP-1474's, and two of large providers."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _TransientError(ChainError):
    """An error that may pass, and is tried again within the same call."""


class _NoAnswerError(_TransientError, UnreachableError):
    """No answer, which may pass."""


def read_message(
    body: bytes, where: str, absent: Callable[[str, object], bool], secrets: Sequence[str] = ()
) -> dict[str, Any]:
    """Read a JSON-RPC answer that is not an error.

    Args:
        body: The answer's bytes, whatever they are.
        where: The request, as error messages name it.
        absent: Tells by an error's text and code whether the node lacks the requested block.
        secrets: Credentials of the node's address, which messages do not show.

    Raises:
        BlockUnavailableError: The node lacks the block, by `absent`.
        SlowDownError: The node says that it is asked too often.
        RefusedError: The node answered with any other error.
        ChainError: The answer is no JSON object.
    """
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ChainError(f"{where}: the answer is not JSON: {excerpt(body, secrets=secrets)}") from None
    if not isinstance(message, dict):
        raise ChainError(f"{where}: the answer is not a JSON object: {excerpt(body, secrets=secrets)}")
    error = message.get("error")
    if _says_nothing(error):
        return message
    fields = error if isinstance(error, dict) else {"message": error}
    parts = [fields.get("message"), fields.get("data")]
    text = ": ".join(part for part in parts if isinstance(part, str) and part)
    code = fields.get("code")
    kind = BlockUnavailableError if absent(text, code) else SlowDownError if code in LIMIT_EXCEEDED else RefusedError
    raise kind(f"{where}: the node says: {excerpt(text or body, 160, secrets=secrets)}")


def _says_nothing(error: object) -> bool:
    """Tell whether an `error` stands in the answer for form's sake: null, "", {}, or an object of such values."""
    return not any(error.values()) if isinstance(error, dict) else not error


@dataclass(frozen=True, slots=True)
class RpcAnswer:
    """A part of an answer in JSON whose fields are checked as they are read; paths are dotted, with numbers in lists.

    Attributes:
        where: The request, as error messages name it.
        body: The whole answer; error messages show its beginning.
        content: The part of the answer at which paths begin.
        secrets: Credentials of the node's address, which messages do not show.
    """

    where: str
    body: bytes
    content: object
    secrets: Sequence[str] = ()

    def field(self, path: str) -> object:
        """Return the value at `path`; `ChainError` where it is missing."""
        value = self.content
        for name in path.split("."):
            if isinstance(value, dict) and name in value:
                value = value[name]
            elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
                value = value[int(name)]
            else:
                raise ChainError(f"{self.where}: the answer has no {path}: {excerpt(self.body, secrets=self.secrets)}")
        return value

    def maybe(self, path: str) -> object:
        """Return the value at `path`; None where it, or what it is in, is null or missing."""
        value = self.content
        for name in path.split("."):
            if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
                value = value[int(name)]
            else:
                value = value.get(name) if isinstance(value, dict) else None
        return value

    def wrong(self, path: str, expected: str) -> ChainError:
        """Return the error that names `path`, the expected value and the actual one."""
        value = self.maybe(path)
        if isinstance(value, dict | list):
            return ChainError(f"{self.where}: {path} must be {expected}, but is an object or a list")
        shown = excerpt(orjson.dumps(value), secrets=self.secrets)
        return ChainError(f"{self.where}: {path} must be {expected}, but is {shown}")

    def text(self, path: str) -> str:
        """Return a string that is opaque, but fit to be shown and hashed; `ChainError` where it is not."""
        value = self.field(path)
        # A page of text or a line break is no name of a chain and no hash.
        if not isinstance(value, str) or not 0 < len(value) <= 256 or not value.isprintable():
            raise self.wrong(path, "a non-empty string on one line")
        return value


class Rpc:
    """Requests to the node at `url`, over `session`, which the caller owns and closes.

    Every call is bounded: at most `attempts` requests of at most `timeout` seconds each, with random waits of at most
    1/4, 1/2, 1, 1, … s between them. Only what may pass is tried again: a failing connection, a timeout, and HTTP 5xx
    unless it carries a JSON-RPC error, which is an answer. A node that asks to be left alone is not asked again. One
    that failed at all attempts of a call is asked once a call until it answers: there may be many hosts that ask it.

    An answer that is compressed although we do not ask for it is unpacked; its limit holds before and after. None holds
    the event loop for long (`MOST_COMMAS`).

    Args:
        session: Sends the requests. User info in `url` is sent as basic authentication.
        url: Base address, http or https; a path is kept, and so is a query (for API keys).
        attempts: Requests per call, at least 1.
        timeout: Seconds for one request, from the connection to the last byte.
        sleep: Waits between attempts.
        wall: Wall time in seconds, which dates in Retry-After are counted from.

    Raises:
        ValueError: No request can be sent to `url` as it is written.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        attempts: int = 3,
        timeout: float = 5.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        wall: Callable[[], float] = SYSTEM.wall,
    ) -> None:
        if wrong := unusable(url):
            raise ValueError(f"{mask_url(url)} {wrong}")
        self._base = url
        self.secrets = url_secrets(url)  # which a node may send back
        self._session = session
        self._attempts = attempts
        self._timeout = timeout
        self._sleep = sleep
        self._wall = wall
        self._ids = itertools.count(1)
        self._down = False  # all attempts of the last call failed

    def __str__(self) -> str:
        """Return the node's address with secrets masked, as messages name the node."""
        return mask_url(self._base)

    def url(self, path: str, query: str = "") -> URL:
        """Return the address of `path` below the base, with the base's query before `query`."""
        return below(self._base, path, query)

    async def get(self, url: URL, where: str, limit: int = MAX_ANSWER_BYTES) -> bytes:
        """Return the body of the answer to `GET url`, of at most `limit` bytes.

        Raises:
            SlowDownError: The node asks to be left alone.
            UnreachableError: The node did not answer.
            ChainError: The answer is no JSON-RPC, or too long; the message begins with `where`.
        """
        return await self._call("GET", url, None, where, limit)

    async def post(self, method: str, params: list[object], where: str) -> bytes:
        """Return the body of the answer to a JSON-RPC call at the base address; errors as for `get`.

        An answer that names another call than this one is refused.
        """
        number = next(self._ids)
        call = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        body = await self._call("POST", as_written(self._base), orjson.dumps(call), where, MAX_ANSWER_BYTES)
        named = _id_of_result(body)
        if named not in {None, str(number)}:
            shown = excerpt(named or "", secrets=self.secrets)
            raise ChainError(f"{where}: asked with id {number}, got the answer to id {shown}: connections are mixed up")
        return body

    async def _call(self, verb: str, url: URL, content: bytes | None, where: str, limit: int) -> bytes:
        # One object per call: tenacity keeps the state of a call in it.
        retrying = AsyncRetrying(
            stop=stop_after_attempt(1 if self._down else self._attempts),
            wait=wait_random_exponential(multiplier=0.25, max=1.0),
            retry=retry_if_exception_type(_TransientError),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            body: bytes = await retrying(self._call_once, verb, url, content, where, limit)
        except ChainError as error:
            self._down = isinstance(error, _TransientError)
            raise
        self._down = False
        return body

    async def _call_once(self, verb: str, url: URL, content: bytes | None, where: str, limit: int) -> bytes:
        try:
            async with self._session.request(
                verb,
                url,
                data=content,
                headers={"Content-Type": "application/json"} if content else None,
                timeout=aiohttp.ClientTimeout(total=self._timeout),
                allow_redirects=False,
                raise_for_status=False,
            ) as response:
                body = await self._read_bounded(response, where, limit)
        except TimeoutError:
            raise _NoAnswerError(f"{where}: no answer within {self._timeout:g} s") from None
        except aiohttp.ClientResponseError as error:  # its own text quotes the URL, secrets included
            raise _NoAnswerError(
                f"{where}: the answer is not HTTP: {excerpt(error.message, secrets=self.secrets)}"
            ) from None
        except aiohttp.ClientError as error:
            text = excerpt(str(error) or type(error).__name__, 160, secrets=self.secrets)
            raise _NoAnswerError(f"{where}: {text}") from None
        self._check_http(response.status, response.headers, body, where)
        return body

    async def _read_bounded(self, response: aiohttp.ClientResponse, where: str, limit: int) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_chunked(64 * 1024):
            body += chunk
            if len(body) > limit:
                raise self._too_long(bytes(body), where, limit)
        unpacked = _unpack(bytes(body), limit + 1)
        if len(unpacked) > limit:
            raise self._too_long(unpacked, where, limit)
        if unpacked.count(b",") > MOST_COMMAS:
            begin = excerpt(unpacked[:2048], secrets=self.secrets, cut=True)
            raise ChainError(f"{where}: the answer has more than {MOST_COMMAS} commas: {begin}")
        return unpacked.removeprefix(_BYTE_ORDER_MARK)

    def _too_long(self, body: bytes, where: str, limit: int) -> ChainError:
        begin = excerpt(body[:2048], secrets=self.secrets, cut=True)
        return ChainError(f"{where}: the answer is longer than {limit} bytes: {begin}")

    def _check_http(self, status: int, headers: CIMultiDictProxy[str], body: bytes, where: str) -> None:
        retry_after = longest_wait(headers.getall("Retry-After", []), self._wall())
        if status == 429 or (status == 503 and retry_after is not None):
            raise SlowDownError(f"{where}: HTTP {status}: {excerpt(body, secrets=self.secrets)}", retry_after)
        if status == 200 or _is_rpc_error(body):
            return
        location = headers.get("Location")
        if 300 <= status < 400 and location is not None:
            target = excerpt(mask_url(location), secrets=self.secrets)
            raise ChainError(
                f"{where}: HTTP {status}, a redirect to {target}, which is not followed; configure that address"
            )
        kind = _TransientError if status >= 500 and status != 501 else RefusedError
        raise kind(f"{where}: HTTP {status}: {excerpt(body, secrets=self.secrets)}")


def _is_rpc_error(body: bytes) -> bool:
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(message, dict) and isinstance(message.get("error"), dict)


def _id_of_result(body: bytes) -> str | None:
    """Return the id of the call that an answer names; None where it names none, or is an error.

    Whoever fails to read a call cannot know its id, and some write one of their own.
    """
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(message, dict) or not _says_nothing(message.get("error")) or message.get("id") is None:
        return None
    number = message["id"]
    return str(number) if isinstance(number, int | str) else "(no number)"


def _unpack(body: bytes, most: int) -> bytes:
    """Return what gzip or deflate packed, `most` bytes of it; anything else as it is. JSON begins like neither."""
    if not body.startswith((b"\x1f\x8b", b"x")):
        return body
    unpacker = zlib.decompressobj(wbits=47)  # either format, by its head
    try:
        return unpacker.decompress(body, most)
    except zlib.error:
        return body
