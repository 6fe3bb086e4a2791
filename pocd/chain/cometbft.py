"""One CometBFT node, read over its JSON-RPC: pure parsing first, then a thin shell that fetches.

docs/protocol.md section 8 lists the facts that bite; each has a test in tests/chain/test_cometbft.py.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pocd.chain.rpc import RpcAnswer, read_message
from pocd.chain.source import (
    GREATEST_HEIGHT,
    Block,
    BlockUnavailableError,
    ChainError,
    Head,
    SlowDownError,
    UnreachableError,
)
from pocd.observe.mask import mask_url

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.chain.rpc import Rpc

MAX_BLOCK_BYTES = 40 * 1024 * 1024
"""The longest whole block that is read: 22,020,096 bytes in base64, and 10,000 signatures of the block before."""

_HEIGHT = re.compile("[0-9]{1,32}")
_HASH = re.compile("[0-9a-fA-F]{64}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})")
_NO_SUCH_HEIGHT = re.compile(
    r"height.*(must be less than or equal to|is not available|can't be greater than max height)",
    re.IGNORECASE | re.DOTALL,
)


def parse_status(body: bytes, where: str, secrets: Sequence[str] = ()) -> Head:
    """Read the answer to `/status` (docs/protocol.md section 8).

    Args:
        body: The answer's bytes, whatever they are.
        where: The request, as error messages name it.
        secrets: Credentials of the node's address, which messages do not show.

    Raises:
        ChainError: A JSON-RPC error, a node without blocks, or an answer that makes no sense.
    """
    answer = _result(body, where, secrets)
    height = _height(answer, "sync_info.latest_block_height")
    if height == 0:
        raise ChainError(f"{where}: the node has no blocks yet; wait until it has synchronised")
    block = Block(
        chain_id=answer.text("node_info.network"),
        height=height,
        hash=_hash(answer, "sync_info.latest_block_hash"),
        time=_time(answer, "sync_info.latest_block_time"),
    )
    return Head(block, catching_up=_catching_up(answer))


def parse_block(body: bytes, height: int, where: str, secrets: Sequence[str] = ()) -> Block:
    """Read the answer to `/block?height=N` (docs/protocol.md section 8).

    Args:
        body: The answer's bytes, whatever they are.
        height: The height that was asked for; the block's own must be the same.
        where: The request, as error messages name it.
        secrets: Credentials of the node's address, which messages do not show.

    Raises:
        BlockUnavailableError: The height is not there yet, or pruned, or the node has lost the block's data.
        ChainError: Another JSON-RPC error, or an answer that makes no sense.
    """
    answer = _result(body, where, secrets)
    if answer.field("block") is None:
        raise _empty(where)
    return _block(answer, "block.header", height)


def parse_meta(body: bytes, height: int, where: str, secrets: Sequence[str] = ()) -> Block:
    """Read the answer to `/blockchain?minHeight=N&maxHeight=N` (docs/protocol.md section 8).

    Args:
        body: The answer's bytes, whatever they are.
        height: The height that was asked for; the block's own must be the same.
        where: The request, as error messages name it.
        secrets: Credentials of the node's address, which messages do not show.

    Raises:
        BlockUnavailableError: The height is not there yet, or pruned, or the node has lost the block's data.
        ChainError: Another JSON-RPC error, or an answer that makes no sense.
    """
    metas = _result(body, where, secrets)
    listed = metas.field("block_metas")
    if listed is None:  # how Go writes an empty list
        listed = []
    if not isinstance(listed, list):
        raise metas.wrong("block_metas", "a list")
    if not listed or listed[0] is None:
        raise _empty(where)
    return _block(RpcAnswer(where, body, listed[0], secrets), "header", height)


def _block(answer: RpcAnswer, header: str, height: int) -> Block:
    if answer.field("block_id.hash") == "":
        raise _empty(answer.where)
    block = Block(
        chain_id=answer.text(f"{header}.chain_id"),
        height=_height(answer, f"{header}.height"),
        hash=_hash(answer, "block_id.hash"),
        time=_time(answer, f"{header}.time"),
    )
    if block.height != height:
        raise ChainError(f"{answer.where}: asked for block {height}, got block {block.height}")
    return block


def _empty(where: str) -> BlockUnavailableError:
    return BlockUnavailableError(f"{where}: the node answered with an empty block")


def _result(body: bytes, where: str, secrets: Sequence[str]) -> RpcAnswer:
    message = read_message(body, where, lambda text, _code: _NO_SUCH_HEIGHT.search(text) is not None, secrets)
    return RpcAnswer(where, body, message.get("result", message), secrets)  # Sei answers a GET with the bare result


def _hash(answer: RpcAnswer, path: str) -> str:
    """Return the hash: in upper case if it is a SHA-256 in hex; other chains' as it came."""
    text = answer.text(path)
    return text.upper() if _HASH.fullmatch(text) else text


def _height(answer: RpcAnswer, path: str) -> int:
    value = answer.field(path)
    # CometBFT writes 64-bit integers as strings; proxies in front of it sometimes rewrite them as numbers.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # The pattern also refuses true, an int to Python.
    if not isinstance(value, int | str) or not _HEIGHT.fullmatch(str(value)):
        raise answer.wrong(path, "a whole number")
    if int(value) > GREATEST_HEIGHT:
        raise answer.wrong(path, "below 2^63")
    return int(value)


def _catching_up(answer: RpcAnswer) -> bool:
    """Tell whether the node says that it is catching up; the age of its newest block tells in any case."""
    path = "sync_info.catching_up"
    sync_info = answer.field("sync_info")
    value = sync_info.get("catching_up") if isinstance(sync_info, dict) else None
    if value not in (None, True, False, "true", "false") or isinstance(value, int | float) != isinstance(value, bool):
        raise answer.wrong(path, "true or false")
    return value in (True, "true")


def _time(answer: RpcAnswer, path: str) -> datetime:
    value = answer.field(path)
    # RFC 3339 allows the letters in lower case.
    if not isinstance(value, str) or not _TIME.fullmatch(value.upper()):
        raise answer.wrong(path, "an RFC 3339 time")
    try:
        return datetime.fromisoformat(value.upper()).astimezone(UTC)  # drops what is finer than a microsecond
    except (ValueError, OverflowError):  # a 13th month, or a year outside 1 to 9999 in UTC
        raise answer.wrong(path, "an RFC 3339 time") from None


class CometBFT:
    """The CometBFT node that `rpc` asks.

    A block's hash is in the small answer to `/blockchain`. A node or a proxy that does not serve it, or with something
    else, is asked for the whole block (`/block`) in the same call, and first from then on.

    Args:
        rpc: Client of the node's JSON-RPC.
        below: What stands between the node's address and the names of calls, with a slash at its end.
    """

    reorganises = False

    def __init__(self, rpc: Rpc, *, below: str = "") -> None:
        self._rpc = rpc
        self._below = below
        self._calls = (self._meta, self._whole)  # the one that was answered last is the first

    def __str__(self) -> str:
        """The masked address: how messages name this node."""
        return str(self._rpc)

    async def head(self) -> Head:
        """Return the newest block (`/status`); see `ChainSource.head` and `parse_status` for the errors."""
        url = self._rpc.url(f"{self._below}status")
        where = mask_url(str(url))
        return parse_status(await self._rpc.get(url, where), where, self._rpc.secrets)

    async def block(self, height: int) -> Block:
        """Return the block at `height`, at least 1; see `ChainSource.block` for the errors."""
        first, second = self._calls
        try:
            return await first(height)
        except (BlockUnavailableError, SlowDownError, UnreachableError):
            raise
        except ChainError:
            try:
                block = await second(height)
            except BlockUnavailableError:
                self._calls = (second, first)
                raise
            self._calls = (second, first)
            return block

    async def _meta(self, height: int) -> Block:
        name = f"{self._below}blockchain"
        where = f"{mask_url(str(self._rpc.url(name)))} at height {height}"
        body = await self._rpc.get(self._rpc.url(name, f"minHeight={height}&maxHeight={height}"), where)
        return parse_meta(body, height, where, self._rpc.secrets)

    async def _whole(self, height: int) -> Block:
        name = f"{self._below}block"
        where = f"{mask_url(str(self._rpc.url(name)))} at height {height}"
        body = await self._rpc.get(self._rpc.url(name, f"height={height}"), where, MAX_BLOCK_BYTES)
        return parse_block(body, height, where, self._rpc.secrets)
