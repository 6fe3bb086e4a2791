"""A chain for development: blocks made by a clock and a seed, served as CometBFT's RPC serves them.

The arithmetic (`DevChain`) is pure; the answers have the forms of tests/data/cometbft_examples.json.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from pocd.http.server import json_answer, listening

if TYPE_CHECKING:
    from collections.abc import Callable

_NO_ID = -1  # what CometBFT writes where a GET brought no id


@dataclass(frozen=True, slots=True)
class DevChain:
    """A chain whose blocks follow from its fields and the time.

    Attributes:
        seed: Seed of the block hashes.
        block_seconds: Seconds between blocks, above 0.
        genesis: Unix time in seconds of the first block.
        chain_id: The network's name.
        first_height: Height of the first block; lower ones count as pruned.

    Raises:
        ValueError: `block_seconds` is not above 0, or `first_height` below 1.
    """

    seed: str
    block_seconds: float
    genesis: float
    chain_id: str = "pocd-dev"
    first_height: int = 1

    def __post_init__(self) -> None:
        if not self.block_seconds > 0:
            raise ValueError(f"block_seconds must be above 0, but is {self.block_seconds}")
        if self.first_height < 1:
            raise ValueError(f"first_height must be at least 1, but is {self.first_height}")

    def head_height(self, now: float) -> int:
        """Return the newest block's height at Unix time `now`, or 0 before the first block."""
        if now < self.genesis:
            return 0
        return self.first_height + int((now - self.genesis) // self.block_seconds)

    def block_hash(self, height: int) -> str:
        """Return the hash at `height`: SHA-256 of `{seed}:{height}`, 64 upper-case hex digits."""
        return hashlib.sha256(f"{self.seed}:{height}".encode()).hexdigest().upper()

    def block_time(self, height: int) -> float:
        """Return the Unix time in seconds at which the block at `height` is made."""
        return self.genesis + (height - self.first_height) * self.block_seconds


class _RpcError(Exception):
    """A JSON-RPC error, in CometBFT's words."""

    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        super().__init__(message)
        self.error = {"code": code, "message": message} | ({} if data is None else {"data": data})


def application(chain: DevChain, clock: Callable[[], float] = time.time) -> web.Application:
    """Serve `chain` as docs/protocol.md section 8 describes a node.

    `GET /status`, `GET /block?height=N` (the newest without a height), `GET /blockchain?minHeight=N&maxHeight=N`,
    `GET /health`, and all but the last as JSON-RPC at `POST /`.
    Errors are HTTP 500 on GET and HTTP 200 on POST, as CometBFT answers them.

    Args:
        chain: The chain to serve.
        clock: Unix time in seconds.
    """

    async def get(request: web.Request) -> web.Response:
        # CometBFT reads a number with or without quotes, and an empty one as if it were not there.
        params = {name: value.strip('"') or None for name, value in request.query.items()}
        try:
            return _respond(_NO_ID, result=answer(chain, request.path.rpartition("/")[2], params, clock()))
        except _RpcError as error:
            return _respond(_NO_ID, status=500, error=error.error)

    async def post(request: web.Request) -> web.Response:
        try:
            call = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            return _respond(_NO_ID, status=500, error=_RpcError(-32700, "Parse error. Invalid JSON", str(error)).error)
        call = call if isinstance(call, dict) else {}
        identity = call.get("id", _NO_ID)
        try:
            return _respond(identity, result=answer(chain, call.get("method"), call.get("params") or {}, clock()))
        except _RpcError as error:
            return _respond(identity, error=error.error)

    app = web.Application()
    app.router.add_get("/status", get)
    app.router.add_get("/block", get)
    app.router.add_get("/blockchain", get)
    app.router.add_get("/health", get)
    app.router.add_post("/", post)
    return app


async def serve(app: web.Application, host: str, port: int, on_started: Callable[[str], None] | None) -> None:
    """Serve a chain until cancelled.

    Args:
        app: What serves the chain, see `application`.
        host: Address to listen at.
        port: TCP port; 0 takes a free one.
        on_started: Called once with the URL, when requests are answered.

    Raises:
        OSError: The port is taken, or the address is not this machine's.
    """
    async with listening(app, host, port, shutdown_timeout=1.0) as url:
        if on_started is not None:
            on_started(url)
        await asyncio.Event().wait()  # nobody sets it: only cancellation ends this


def _respond(identity: object, *, status: int = 200, **content: object) -> web.Response:
    return json_answer({"jsonrpc": "2.0", "id": identity} | content, status)


def answer(chain: DevChain, method: object, params: object, now: float) -> dict[str, Any]:
    """Return the result of a call of the node's RPC at Unix time `now`."""
    if method == "health":
        return {}
    if method == "status":
        return _status(chain, now)
    if method == "block":
        return _block(chain, _height_parameter(params), now)
    if method == "blockchain":
        return _blockchain(chain, _height_parameter(params, "minHeight"), _height_parameter(params, "maxHeight"), now)
    raise _RpcError(-32601, "Method not found")


def _height_parameter(params: object, name: str = "height") -> int | None:
    height = params.get(name) if isinstance(params, dict) else params
    if height is None:
        return None
    try:
        if isinstance(height, int | str) and not isinstance(height, bool):
            return int(height)
    except ValueError:
        pass  # the same answer as for a list or a float
    raise _RpcError(-32602, "Invalid params", f"{name} must be a number, but got {height!r}")


def _status(chain: DevChain, now: float) -> dict[str, Any]:
    head = chain.head_height(now)
    earliest = chain.first_height if head else 0
    return {
        "node_info": {"network": chain.chain_id, "moniker": "devchain"},
        "sync_info": _sync_info(chain, "latest", head)
        | _sync_info(chain, "earliest", earliest)
        | {"catching_up": head == 0},
    }


def _sync_info(chain: DevChain, which: str, height: int) -> dict[str, str]:
    """Describe one block of the status; height 0 is an empty store."""
    return {
        f"{which}_block_hash": chain.block_hash(height) if height else "",
        f"{which}_app_hash": "",
        f"{which}_block_height": str(height),
        f"{which}_block_time": _rfc3339(chain.block_time(height)) if height else "1970-01-01T00:00:00Z",
    }


def _block(chain: DevChain, height: int | None, now: float) -> dict[str, Any]:
    head = chain.head_height(now)
    if height is None:
        if head == 0:
            return {"block_id": {"hash": "", "parts": {"total": 0, "hash": ""}}, "block": None}
        height = head
    if height <= 0:
        raise _RpcError(-32603, "Internal error", f"height must be greater than 0, but got {height}")
    if height > head:
        reason = f"height {height} must be less than or equal to the current blockchain height {head}"
        raise _RpcError(-32603, "Internal error", reason)
    if height < chain.first_height:
        reason = f"height {height} is not available, lowest height is {chain.first_height}"
        raise _RpcError(-32603, "Internal error", reason)
    meta = _meta(chain, height)
    return {"block_id": meta["block_id"], "block": {"header": meta["header"], "data": {"txs": []}}}


def _blockchain(chain: DevChain, least: int | None, most: int | None, now: float) -> dict[str, Any]:
    """Describe blocks, the highest first; without a limit the 20 newest."""
    head = chain.head_height(now)
    most = min(most or head, head)
    least = max(least or 1, chain.first_height, most - 19)
    if least > most:
        raise _RpcError(-32603, "Internal error", f"min height {least} can't be greater than max height {most}")
    return {"last_height": str(head), "block_metas": [_meta(chain, height) for height in range(most, least - 1, -1)]}


def _meta(chain: DevChain, height: int) -> dict[str, Any]:
    previous = chain.block_hash(height - 1) if height > chain.first_height else ""
    return {
        "block_id": {"hash": chain.block_hash(height), "parts": {"total": 1, "hash": chain.block_hash(height)}},
        "header": {
            "chain_id": chain.chain_id,
            "height": str(height),
            "time": _rfc3339(chain.block_time(height)),
            "last_block_id": {"hash": previous},
        },
    }


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
