"""One Ethereum node, read over its JSON-RPC: pure parsing first, then a thin shell that fetches.

Such chains reorganise: the newest blocks may be replaced by others. So the head here is a block with some others on
top of it (docs/protocol.md section 8).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pocd.chain.rpc import RpcAnswer, read_message
from pocd.chain.source import GREATEST_HEIGHT, Block, BlockUnavailableError, ChainError, Head, RefusedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.chain.rpc import Rpc

# Ethereum's specification has no leading zeros and lower case only; some nodes pad, and some write upper case.
_QUANTITY = re.compile(r"0[xX][0-9a-fA-F]{1,64}")
_HASH = re.compile(r"0[xX][0-9a-fA-F]{64}")
_MILLISECONDS = 10**11  # a Unix time from here on counts them: in seconds it would be after the year 5000
# EIP-1474's "resource not found", and what nodes say of history that they have dropped (EIP-4444).
_ABSENT_CODES = (-32001, 4444)


def parse_quantity(body: bytes, where: str, secrets: Sequence[str] = ()) -> int:
    """Read an answer that is one number (`eth_chainId`, `eth_blockNumber`).

    Args:
        body: The answer's bytes, whatever they are.
        where: The request, as error messages name it.
        secrets: Credentials of the node's address, which messages do not show.

    Raises:
        ChainError: A JSON-RPC error, or an answer that makes no sense.
    """
    return _quantity(_answer(body, where, secrets), "result")


def parse_syncing(body: bytes, where: str, secrets: Sequence[str] = ()) -> bool:
    """Read the answer to `eth_syncing`: whether the node is behind the highest block it knows.

    It is an object that tells how far the node is, which some send also when it is at the head; else false or null.
    Errors are as for a quantity.
    """
    answer = _answer(body, where, secrets)
    value = answer.field("result")
    if value is None or value is False:
        return False
    if not isinstance(value, dict):
        raise answer.wrong("result", "false, null or an object")
    if "currentBlock" not in value or "highestBlock" not in value:
        return True
    return _quantity(answer, "result.currentBlock") < _quantity(answer, "result.highestBlock")


def parse_block(body: bytes, height: int, chain_id: str, where: str, secrets: Sequence[str] = ()) -> Block:
    """Read the answer to `eth_getBlockByNumber`.

    Args:
        body: The answer's bytes, whatever they are.
        height: The height that was asked for; the block's own must be the same.
        chain_id: The chain's id by the node; the block itself does not have it.
        where: The request, as error messages name it.
        secrets: Credentials of the node's address, which messages do not show.

    Raises:
        BlockUnavailableError: The height is not there yet, or pruned.
        ChainError: Another JSON-RPC error, or an answer that makes no sense.
    """
    answer = _answer(body, where, secrets)
    if answer.field("result") is None:
        raise BlockUnavailableError(f"{where}: the node has no such block")
    number = _quantity(answer, "result.number")
    if number != height:
        raise ChainError(f"{where}: asked for block {height}, got block {number}")
    block_hash = answer.field("result.hash")
    if not isinstance(block_hash, str) or not _HASH.fullmatch(block_hash):
        raise answer.wrong("result.hash", "0x and 64 hex digits")
    return Block(chain_id, number, block_hash.lower(), _time(answer, "result.timestamp"))


def _answer(body: bytes, where: str, secrets: Sequence[str]) -> RpcAnswer:
    return RpcAnswer(
        where, body, read_message(body, where, lambda _text, code: code in _ABSENT_CODES, secrets), secrets
    )


def _quantity(answer: RpcAnswer, path: str) -> int:
    value = answer.field(path)
    number = -1
    if isinstance(value, int) and not isinstance(value, bool):
        number = value  # what some write, and nothing else it could be
    elif isinstance(value, str) and _QUANTITY.fullmatch(value):
        number = int(value, 16)
    if number < 0:
        raise answer.wrong(path, "a whole number in hex")
    if number > GREATEST_HEIGHT:
        raise answer.wrong(path, "below 2^63")
    return number


def _time(answer: RpcAnswer, path: str) -> datetime:
    try:
        seconds = _quantity(answer, path)
        return datetime.fromtimestamp(seconds / 1000 if seconds >= _MILLISECONDS else seconds, UTC)
    except (ValueError, OverflowError, OSError):  # a year after 9999
        raise answer.wrong(path, "a Unix time in hex") from None


class EVM:
    """The Ethereum node that `rpc` asks.

    Args:
        rpc: Client of the node's JSON-RPC.
        confirmations: How many blocks must be on top of one before it counts; at least 0. Reorganisations that are
            no deeper than that are never seen.
    """

    reorganises = True

    def __init__(self, rpc: Rpc, *, confirmations: int) -> None:
        self._rpc = rpc
        self._confirmations = confirmations

    def __str__(self) -> str:
        """The masked address: how messages name this node."""
        return str(self._rpc)

    async def head(self) -> Head:
        """Return the block `confirmations` below the newest.

        Raises:
            ChainError: The node cannot be reached, its answer makes no sense, or the chain has fewer blocks than that.
        """
        catching_up = await self._catching_up()
        newest = parse_quantity(*await self._ask("eth_blockNumber"))
        height = newest - self._confirmations
        if height < 1:
            raise ChainError(
                f"{self}: the chain has only {newest} blocks, and one counts when {self._confirmations} are on top "
                "of it (chain.confirmations); wait"
            )
        return Head(await self.block(height), catching_up)

    async def block(self, height: int) -> Block:
        """Return the block at `height` as the node has it now, also above the head; see `ChainSource.block`."""
        chain_id = str(parse_quantity(*await self._ask("eth_chainId")))
        body, where, secrets = await self._ask("eth_getBlockByNumber", hex(height), False)
        return parse_block(body, height, chain_id, f"{where} at height {height}", secrets)

    async def _catching_up(self) -> bool:
        """Tell whether the node says that it is catching up; the age of its newest block tells in any case."""
        try:
            return parse_syncing(*await self._ask("eth_syncing"))
        except RefusedError:  # many public gateways do not offer this call
            return False

    async def _ask(self, method: str, *params: object) -> tuple[bytes, str, Sequence[str]]:
        where = f"{self} {method}"
        return await self._rpc.post(method, list(params), where), where, self._rpc.secrets
