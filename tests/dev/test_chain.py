"""The development chain: deterministic, and in CometBFT's words."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
from aiohttp.test_utils import BaseTestServer, TestServer

from pocd.chain.cometbft import CometBFT
from pocd.chain.rpc import Rpc
from pocd.chain.source import BlockUnavailableError, ChainError
from pocd.dev.chain import DevChain, application, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EXAMPLES: dict[str, Any] = orjson.loads((Path(__file__).parent.parent / "data/cometbft_examples.json").read_bytes())
GENESIS = 1_700_000_000.0
# The examples' node: its newest block is 1262196, its oldest 1262000.
CHAIN = DevChain("seed", block_seconds=6.0, genesis=GENESIS, first_height=1_262_000)
NOW = GENESIS + 196 * 6.0 + 1


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def server(clock: Clock) -> AsyncIterator[BaseTestServer]:
    async with TestServer(application(CHAIN, clock)) as server:
        yield server


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def test_heights_follow_the_clock() -> None:
    chain = DevChain("seed", block_seconds=2.0, genesis=100.0)
    assert [chain.head_height(now) for now in (0.0, 99.9, 100.0, 101.9, 102.0, 110.0)] == [0, 0, 1, 1, 2, 6]
    assert [chain.block_time(height) for height in (1, 2, 6)] == [100.0, 102.0, 110.0]


def test_hashes_follow_the_seed() -> None:
    chain = DevChain("seed", block_seconds=2.0, genesis=100.0)
    # printf 'seed:3' | sha256sum
    assert chain.block_hash(3) == "7413102DDF6B24AFDF52EE025C815CBA7A8DF63BC7C14E700836528D9131EE80"
    assert DevChain("other", block_seconds=2.0, genesis=100.0).block_hash(3) != chain.block_hash(3)


@pytest.mark.parametrize(("block_seconds", "first_height"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, 0)])
def test_impossible_chains(block_seconds: float, first_height: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        DevChain("seed", block_seconds, 0.0, first_height=first_height)


async def test_the_client_reads_it(server: BaseTestServer, session: aiohttp.ClientSession, clock: Clock) -> None:
    node = CometBFT(Rpc(session, str(server.make_url("/"))))
    head = await node.head()
    assert head.block == await node.block(1_262_196)
    assert head.block.chain_id == "pocd-dev"
    assert head.block.height == 1_262_196
    assert head.block.hash == CHAIN.block_hash(1_262_196)
    assert head.block.time == datetime.fromtimestamp(GENESIS + 196 * 6, UTC)
    assert not head.catching_up
    clock.now += 6
    assert (await node.head()).block.height == 1_262_197
    with pytest.raises(BlockUnavailableError, match="can't be greater than max height"):
        await node.block(1_262_198)
    with pytest.raises(BlockUnavailableError, match="min height 1262000 can't be greater"):
        await node.block(1)


async def test_before_the_first_block(server: BaseTestServer, session: aiohttp.ClientSession, clock: Clock) -> None:
    clock.now = GENESIS - 1
    node = CometBFT(Rpc(session, str(server.make_url("/"))))
    with pytest.raises(ChainError, match="no blocks yet"):
        await node.head()
    async with session.get(server.make_url("/status")) as response:
        body = await response.json()
    empty = EXAMPLES["errors"]["GET /status of an empty store"]
    assert body["result"]["sync_info"] == empty["body"]["result"]["sync_info"]
    async with session.get(server.make_url("/block")) as response:
        assert await response.json() == EXAMPLES["errors"]["GET /block of a height whose meta is gone"]["body"]


@pytest.mark.parametrize(
    ("name", "height"),
    [
        ("GET /block?height=BEYOND", "999999999"),
        ("GET /block?height=BEYOND", '"999999999"'),
        ("GET /block?height=PRUNED", "1"),
        ("GET /block?height=0", "0"),
    ],
)
async def test_errors_of_get(server: BaseTestServer, session: aiohttp.ClientSession, name: str, height: str) -> None:
    async with session.get(server.make_url("/block"), params={"height": height}) as response:
        assert response.status == EXAMPLES["errors"][name]["http_status"]
        assert await response.json() == EXAMPLES["errors"][name]["body"]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("POST block BEYOND", {"method": "block", "params": {"height": "999999999"}}),
        ("POST block BEYOND", {"method": "block", "params": {"height": 999999999}}),
        ("POST unknown method", {"method": "mine"}),
        ("POST unknown method", {}),
    ],
)
async def test_errors_of_post(
    server: BaseTestServer, session: aiohttp.ClientSession, name: str, call: dict[str, object]
) -> None:
    async with session.post(server.make_url("/"), json={"jsonrpc": "2.0", "id": 1} | call) as response:
        assert response.status == EXAMPLES["errors"][name]["http_status"]
        assert await response.json() == EXAMPLES["errors"][name]["body"]


@pytest.mark.parametrize("height", ["x", "1.5", "1 2"])
async def test_a_height_that_is_no_number(server: BaseTestServer, session: aiohttp.ClientSession, height: str) -> None:
    async with session.get(server.make_url("/block"), params={"height": height}) as response:
        assert response.status == 500
        assert (await response.json())["error"]["code"] == -32602


@pytest.mark.parametrize("params", [["3"], {"height": True}, {"height": 1.5}, {"height": {}}])
async def test_posted_heights_that_are_no_numbers(
    server: BaseTestServer, session: aiohttp.ClientSession, params: object
) -> None:
    async with session.post(server.make_url("/"), json={"id": 1, "method": "block", "params": params}) as response:
        assert response.status == 200
        assert (await response.json())["error"]["code"] == -32602


async def test_post_is_the_same_as_get(server: BaseTestServer, session: aiohttp.ClientSession) -> None:
    calls: list[tuple[str, dict[str, object]]] = [
        ("/status", {"method": "status"}),
        ("/health", {"method": "health"}),
        ("/block", {"method": "block"}),
        ("/block?height=", {"method": "block", "params": {}}),
        ("/block?height=1262100", {"method": "block", "params": {"height": "1262100"}}),
        ("/block?height=%221262100%22", {"method": "block", "params": {"height": 1262100}}),
    ]
    for path, call in calls:
        async with session.get(server.make_url(path)) as got, session.post(server.make_url("/"), json=call) as posted:
            assert got.status == posted.status == 200
            assert await got.json() == await posted.json()


@pytest.mark.parametrize("body", [b"", b"{", b"\xff"])
async def test_post_of_what_is_no_json(server: BaseTestServer, session: aiohttp.ClientSession, body: bytes) -> None:
    async with session.post(server.make_url("/"), data=body) as response:
        assert response.status == 500
        assert (await response.json())["error"]["code"] == -32700


async def test_post_of_what_is_no_call(server: BaseTestServer, session: aiohttp.ClientSession) -> None:
    async with session.post(server.make_url("/"), data=b"[1]") as response:
        assert (await response.json())["error"]["message"] == "Method not found"


async def test_serve_until_cancelled(session: aiohttp.ClientSession) -> None:
    urls: asyncio.Queue[str] = asyncio.Queue()
    chain = DevChain("seed", block_seconds=1e9, genesis=0.0)
    task = asyncio.create_task(serve(application(chain), "127.0.0.1", 0, urls.put_nowait))
    url = await urls.get()
    assert (await CometBFT(Rpc(session, url)).head()).block.hash in {chain.block_hash(height) for height in range(1, 9)}
    port = int(url.rpartition(":")[2])
    with pytest.raises(OSError, match=str(port)):
        await serve(application(chain), "127.0.0.1", port, None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ChainError, match="Cannot connect"):
        await CometBFT(Rpc(session, url, attempts=1)).head()
