"""An orchestrator of the live network: its bodies, as its programs send them, and its receiver of callbacks."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from aiohttp import web

from tests.support.delivering import Server, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

POW = "/api/v1/inference/pow"
MODEL = "MiniMaxAI/MiniMax-M2.7"
PLACE = "/v2/poc-batches/MiniMaxAI%252FMiniMax-M2.7"
KEY = "02b4630f12a0b1d6a0c85a7f0eab5c2fb3bd4f1c5e0d9a8b7c6d5e4f3a2b1c0d9e"
REGULAR = "9B4C6E0DD5E8F1A2B3C4D5E6F708192A3B4C5D6E7F8091A2B3C4D5E6F708192A"
CONFIRMATION = REGULAR.lower()
SEQ_LEN = 16
ENCODING = {"dtype": "f16", "k_dim": 12, "endian": "le"}


def init_body(origin: str, *, node_id: int = 1, node_count: int = 2, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """The body of an init/generate."""
    body = {
        "block_hash": REGULAR,
        "block_height": 6450112,
        "public_key": KEY,
        "node_id": node_id,
        "node_count": node_count,
        "params": {"model": MODEL, "seq_len": SEQ_LEN},
        "url": f"{origin}{PLACE}",
    }
    return body | changes


def generate_body(nonces: list[int], **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """The body of a generate without a callback URL."""
    body = init_body("", **{"nonces": nonces} | changes)
    return body if "url" in changes else {name: value for name, value in body.items() if name != "url"}


@dataclass
class Callbacks:
    """The receiver of callbacks: what it has taken, by hash and nonce, and whether its window is open."""

    server: Server
    open: bool = True
    refused: int = 0
    artifacts: dict[str, dict[int, str]] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    twice: list[int] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.server.url

    def has_judged(self, request_id: str) -> bool:
        return request_id in self.verdicts

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.raw_path.startswith(PLACE), request.raw_path
        body = orjson.loads(await request.read())
        if not self.open:
            self.refused += 1
            return web.Response(status=503)
        if request.raw_path == f"{PLACE}/validated":
            self.verdicts[body["request_id"]] = body
            return web.Response()
        assert request.raw_path == f"{PLACE}/generated"
        assert set(body) == {"public_key", "block_hash", "block_height", "node_id", "artifacts", "encoding"}
        assert (body["public_key"], body["encoding"]) == (KEY, ENCODING)
        if request.headers["webhook-id"] not in self.seen:  # what a killed sender cannot know was taken comes again
            self.seen.add(request.headers["webhook-id"])
            taken = self.artifacts.setdefault(body["block_hash"], {})
            self.twice += [each["nonce"] for each in body["artifacts"] if each["nonce"] in taken]
            taken.update((each["nonce"], each["vector_b64"]) for each in body["artifacts"])
        return web.Response()


@asynccontextmanager
async def receiving_callbacks() -> AsyncIterator[Callbacks]:
    async with serving() as server:
        callbacks = Callbacks(server)
        server.handle = callbacks.handle
        yield callbacks


async def ask(url: str, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
    """The status and the JSON of a call."""
    data = None if body is None else orjson.dumps(body)
    named = {"Content-Type": "application/json"} | headers
    async with aiohttp.ClientSession() as session:
        async with session.request(method, url + path, data=data, headers=named) as response:
            return response.status, orjson.loads(await response.read())
