"""One CometBFT node, read over its JSON-RPC: pure parsing first, then a thin shell that fetches.

docs/protocol.md section 8 lists the facts that bite; each has a test in tests/chain/test_cometbft.py.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pocd.chain.rpc import RpcAnswer, read_message
from pocd.chain.source import Block, BlockUnavailableError, ChainError, Head
from pocd.observe.mask import mask_url

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.chain.rpc import Rpc

_HEIGHT = re.compile(r"0|[1-9][0-9]{0,18}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})")
_NO_SUCH_HEIGHT = re.compile(r"height.*(must be less than or equal to|is not available)", re.IGNORECASE | re.DOTALL)


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
        hash=answer.text("sync_info.latest_block_hash"),
        time=_time(answer, "sync_info.latest_block_time"),
    )
    return Head(block, catching_up=answer.flag("sync_info.catching_up"))


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
    if answer.field("block") is None or answer.field("block_id.hash") == "":
        raise BlockUnavailableError(f"{where}: the node answered with an empty block")
    block = Block(
        chain_id=answer.text("block.header.chain_id"),
        height=_height(answer, "block.header.height"),
        hash=answer.text("block_id.hash"),
        time=_time(answer, "block.header.time"),
    )
    if block.height != height:
        raise ChainError(f"{where}: asked for block {height}, got block {block.height}")
    return block


def _result(body: bytes, where: str, secrets: Sequence[str]) -> RpcAnswer:
    message = read_message(body, where, lambda text, _code: _NO_SUCH_HEIGHT.search(text) is not None, secrets)
    return RpcAnswer(where, body, message.get("result"), secrets)


def _height(answer: RpcAnswer, path: str) -> int:
    value = answer.field(path)
    # CometBFT writes 64-bit integers as strings; proxies in front of it sometimes rewrite them as numbers. The
    # pattern also refuses true, an int to Python.
    if not isinstance(value, int | str) or not _HEIGHT.fullmatch(str(value)):
        raise answer.wrong(path, "a whole number")
    return int(value)


def _time(answer: RpcAnswer, path: str) -> datetime:
    value = answer.field(path)
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise answer.wrong(path, "an RFC 3339 time")
    try:
        return datetime.fromisoformat(value).astimezone(UTC)  # drops what is finer than a microsecond
    except (ValueError, OverflowError):  # a 13th month, or a year outside 1 to 9999 in UTC
        raise answer.wrong(path, "an RFC 3339 time") from None


class CometBFT:
    """The CometBFT node that `rpc` asks."""

    reorganises = False

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    def __str__(self) -> str:
        """The masked address: how messages name this node."""
        return str(self._rpc)

    async def head(self) -> Head:
        """Return the newest block (`/status`); see `ChainSource.head` and `parse_status` for the errors."""
        url = self._rpc.url("status")
        where = mask_url(str(url))
        return parse_status(await self._rpc.get(url, where), where, self._rpc.secrets)

    async def block(self, height: int) -> Block:
        """Return the block at `height`, at least 1; see `ChainSource.block` and `parse_block` for the errors."""
        url = self._rpc.url("block")
        where = f"{mask_url(str(url))} at height {height}"
        body = await self._rpc.get(url.update_query(height=height), where)
        return parse_block(body, height, where, self._rpc.secrets)
