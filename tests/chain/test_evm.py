"""Ethereum's answers, good, bad and absurd; and a real node that mines and reorganises."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from pocd.chain.evm import EVM, parse_block, parse_quantity, parse_syncing
from pocd.chain.rpc import Rpc
from pocd.chain.source import Block, BlockUnavailableError, ChainError, RefusedError, SlowDownError
from tests.support.anvil import needs_anvil, running_anvil

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WHERE = "http://node:8545 eth_method"
HASH = "0xDc0818cf78f21a8e70579cb46a43643f78291264dda342ae31049421c82d21ae"
# Block 13 of a chain, with the fields that count; nodes send a dozen more.
BLOCK = {"number": "0xd", "hash": HASH, "timestamp": "0x55ba4227", "parentHash": "0x0"}


def result(value: object) -> bytes:
    return orjson.dumps({"jsonrpc": "2.0", "id": 1, "result": value})


# Parsing


def test_a_block() -> None:
    assert parse_block(result(BLOCK), 13, "1", WHERE) == Block(
        chain_id="1", height=13, hash=HASH.lower(), time=datetime(2015, 7, 30, 15, 26, 31, tzinfo=UTC)
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("0x0", 0), ("0x1", 1), ("0xff", 255), ("0x7" + "f" * 15, 2**63 - 1)),
        *(("0x00", 0), ("0x01", 1), ("0xFF", 255), ("0XfF", 255), ("0x" + "0" * 63 + "1", 1), (1, 1)),
    ],
)
def test_a_quantity(text: object, number: int) -> None:
    assert parse_quantity(result(text), WHERE) == number


@pytest.mark.parametrize(
    "value",
    [
        *("", "0x", "0X", "1", "-0x1", -1, "0x-1", "0x1_0", " 0x1", "0x1\n", "0xg", "0x\u0661"),
        *("0x" + "0" * 64 + "1", True, False, 1.0, [], {}, ["0x1"]),
    ],
)
def test_nonsense_quantities(value: object) -> None:
    with pytest.raises(ChainError, match="result must be a whole number in hex, but is") as caught:
        parse_quantity(result(value), WHERE)
    assert str(caught.value).startswith(WHERE)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("value", "syncing"),
    [
        *((False, False), (None, False), ({}, True)),
        ({"currentBlock": "0x1", "highestBlock": "0x2"}, True),
        ({"startingBlock": "0x0", "currentBlock": "0x2", "highestBlock": "0x2"}, False),
        ({"currentBlock": "0x0", "highestBlock": "0x0", "stages": []}, False),
    ],
)
def test_syncing(value: object, syncing: bool) -> None:  # noqa: FBT001 - what is expected
    assert parse_syncing(result(value), WHERE) is syncing


@pytest.mark.parametrize("value", [True, 0, "false", []])
def test_nonsense_syncing(value: object) -> None:
    with pytest.raises(ChainError, match="result must be false, null or an object, but is"):
        parse_syncing(result(value), WHERE)


def test_no_such_block() -> None:
    with pytest.raises(BlockUnavailableError, match="eth_method: the node has no such block"):
        parse_block(result(None), 13, "1", WHERE)


@pytest.mark.parametrize("body", [b"{}", b'{"jsonrpc": "2.0", "id": 1}'])
def test_an_answer_without_a_result_says_nothing_about_the_block(body: bytes) -> None:
    with pytest.raises(ChainError, match="the answer has no result") as caught:
        parse_block(body, 13, "1", WHERE)
    assert caught.type is ChainError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": 4444, "message": "pruned history unavailable"}, BlockUnavailableError),
        ({"code": -32001, "message": "Resource not found"}, BlockUnavailableError),
        ({"code": -32601, "message": "the method eth_getBlockByNumber does not exist"}, RefusedError),
        ({"code": -32005, "message": "limit exceeded"}, SlowDownError),
        ({"code": [4444], "message": "what"}, RefusedError),
        ({"message": "no code"}, RefusedError),
    ],
)
def test_errors(error: dict[str, object], kind: type[ChainError]) -> None:
    with pytest.raises(ChainError, match=f"the node says: {error['message']}") as caught:
        parse_block(orjson.dumps({"error": error}), 13, "1", WHERE)
    assert caught.type is kind


def test_another_height_than_asked_for_is_refused() -> None:
    with pytest.raises(ChainError, match="asked for block 14, got block 13"):
        parse_block(result(BLOCK), 14, "1", WHERE)


@pytest.mark.parametrize("value", [None, "", "0x", HASH[2:], HASH + "0", HASH[:-1], HASH[:-1] + "g", HASH + "\n", 5])
def test_nonsense_hash(value: object) -> None:
    with pytest.raises(ChainError, match=r"result\.hash must be 0x and 64 hex digits, but is"):
        parse_block(result(BLOCK | {"hash": value}), 13, "1", WHERE)


@pytest.mark.parametrize("value", ["0x7" + "f" * 15, "0x" + "f" * 12])
def test_a_time_that_no_calendar_has(value: str) -> None:
    with pytest.raises(ChainError, match=r"result\.timestamp must be a Unix time in hex, but is"):
        parse_block(result(BLOCK | {"timestamp": value}), 13, "1", WHERE)


@pytest.mark.parametrize("field", ["number", "hash", "timestamp"])
def test_missing_fields(field: str) -> None:
    with pytest.raises(ChainError, match=rf"the answer has no result\.{field}"):
        parse_block(result({name: value for name, value in BLOCK.items() if name != field}), 13, "1", WHERE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NEARLY_HEX = st.text("0123456789abcdefABCDEFx", max_size=20).map("0x".__add__)


@given(st.sampled_from(["number", "hash", "timestamp"]), JSON | NEARLY_HEX)
def test_any_value_anywhere_is_the_block_or_a_chain_error(field: str, value: object) -> None:
    try:
        block = parse_block(result(BLOCK | {field: value}), 13, "1", WHERE)
    except ChainError as error:
        assert str(error).isprintable()  # noqa: PT017 - either outcome is right
        return
    assert block.height == 13
    assert re.fullmatch("0x[0-9a-f]{64}", block.hash)
    assert block.time.tzinfo is UTC


@given(JSON | NEARLY_HEX)
def test_any_result_is_a_number_or_a_chain_error(value: object) -> None:
    try:
        number = parse_quantity(result(value), WHERE)
        assert number == (int(value, 16) if isinstance(value, str) else value)
    except ChainError as error:
        assert str(error).startswith(WHERE)  # noqa: PT017 - either outcome is right


@given(st.binary() | JSON.map(orjson.dumps) | JSON.map(lambda error: orjson.dumps({"error": error, "result": None})))
def test_any_bytes_are_a_chain_error(body: bytes) -> None:
    with pytest.raises(ChainError):
        parse_quantity(body, WHERE)
    with pytest.raises(ChainError):
        parse_block(body, 1, "1", WHERE)


# A node, over real sockets


@asynccontextmanager
async def node_of(
    answers: dict[str, object], *, confirmations: int = 0
) -> AsyncIterator[tuple[EVM, list[dict[str, Any]]]]:
    """A client of a server that gives each method's answer, and the calls that it got."""
    calls: list[dict[str, Any]] = []

    async def handle(request: web.Request) -> web.Response:
        assert request.content_type == "application/json"
        assert dict(request.query) == {"key": "a&b"}
        calls.append(await request.json())
        answer = answers[calls[-1]["method"]]
        return (
            answer if isinstance(answer, web.Response) else web.json_response({"id": calls[-1]["id"], "result": answer})
        )

    app = web.Application()
    app.router.add_post("/rpc", handle)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        rpc = Rpc(session, f"{server.make_url('/rpc')}?key=a%26b")
        yield EVM(rpc, confirmations=confirmations), calls


HONEST = {"eth_chainId": "0x1", "eth_syncing": False, "eth_blockNumber": "0xf", "eth_getBlockByNumber": BLOCK}


def test_a_hash_has_one_spelling() -> None:
    spellings = [HASH, HASH.lower(), "0x" + HASH[2:].upper(), HASH.upper()]
    assert {parse_block(result(BLOCK | {"hash": text}), 13, "1", WHERE).hash for text in spellings} == {HASH.lower()}


def test_a_time_in_milliseconds() -> None:
    block = parse_block(result(BLOCK | {"timestamp": hex(1_700_000_000_500)}), 13, "1", WHERE)
    assert block.time == datetime.fromtimestamp(1_700_000_000.5, UTC)


def test_a_quantity_beyond_63_bits() -> None:
    with pytest.raises(ChainError, match=r"result must be below 2\^63, but is"):
        parse_quantity(result("0x8" + "0" * 15), WHERE)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b'{"id": 1, "error": {"code": -32601, "message": "rpc method is not whitelisted"}}'),
        (403, b'{"id": 1, "error": {"code": -32601, "message": "rpc method is not whitelisted"}}'),
        (200, b'{"error": "unsupported method"}'),
        (400, b'{"error": "unsupported method"}'),
        (403, b"<html><title>403 Forbidden</title></html>"),
        (405, b""),
        (501, b"Not Implemented"),
    ],
)
async def test_a_gateway_that_does_not_offer_eth_syncing(status: int, body: bytes) -> None:
    async with node_of(HONEST | {"eth_syncing": web.Response(body=body, status=status)}) as (node, _):
        with pytest.raises(ChainError, match="asked for block 15, got block 13"):  # so it was asked for the block
            await node.head()


async def test_a_gateway_that_limits_eth_syncing_asks_for_patience() -> None:
    error = {"id": 1, "error": {"code": -32005, "message": "limit exceeded"}}
    async with node_of(HONEST | {"eth_syncing": web.Response(body=orjson.dumps(error))}) as (node, calls):
        with pytest.raises(SlowDownError, match="limit exceeded"):
            await node.head()
    assert len(calls) == 1


@pytest.mark.parametrize("other", [999, "999", [1], {}])
async def test_the_answer_to_another_call_is_not_believed(other: object) -> None:
    mixed_up = web.Response(body=orjson.dumps({"id": other, "result": "0xf4240"}))
    async with node_of(HONEST | {"eth_blockNumber": mixed_up}) as (node, _):
        with pytest.raises(ChainError, match=r"eth_blockNumber: asked with id 2, got the answer to id .*: connections"):
            await node.head()


async def test_a_block_of_very_many_transactions() -> None:
    block = BLOCK | {"number": "0xf", "transactions": ["0x" + "a" * 64] * 100_000}
    async with node_of(HONEST | {"eth_getBlockByNumber": block}) as (node, _):
        assert (await node.block(15)).hash == HASH.lower()


async def test_each_call_has_an_id_of_its_own() -> None:
    async with node_of(HONEST, confirmations=2) as (node, calls):
        await node.head()
    assert len({call["id"] for call in calls}) == len(calls)


async def test_the_calls() -> None:
    async with node_of(HONEST, confirmations=2) as (node, calls):
        head = await node.head()
    assert (head.block.height, head.block.chain_id, head.catching_up) == (13, "1", False)
    assert [(call["method"], call["params"]) for call in calls] == [
        ("eth_syncing", []),
        ("eth_blockNumber", []),
        ("eth_chainId", []),
        ("eth_getBlockByNumber", ["0xd", False]),
    ]
    assert all(call["jsonrpc"] == "2.0" for call in calls)


async def test_catching_up() -> None:
    async with node_of(HONEST | {"eth_syncing": {"currentBlock": "0xf"}}, confirmations=2) as (node, _):
        assert (await node.head()).catching_up


async def test_the_key_is_masked_and_the_method_named() -> None:
    async with node_of(HONEST | {"eth_blockNumber": None}) as (node, _):
        with pytest.raises(
            ChainError, match=r"^http://127\.0\.0\.1:\d+/rpc\?key=\*\*\* eth_blockNumber: result must be"
        ):
            await node.head()


@pytest.mark.parametrize(("newest", "confirmations"), [("0x0", 0), ("0x5", 5), ("0x5", 9)])
async def test_a_chain_that_is_too_short(newest: str, confirmations: int) -> None:
    async with node_of(HONEST | {"eth_blockNumber": newest}, confirmations=confirmations) as (node, calls):
        with pytest.raises(ChainError, match=rf"the chain has only {int(newest, 16)} blocks, .* wait$"):
            await node.head()
    assert calls[-1]["method"] == "eth_blockNumber"


# anvil


@needs_anvil
async def test_a_real_node() -> None:
    async with running_anvil("--chain-id", "4242") as anvil:
        node = EVM(Rpc(anvil.session, anvil.url), confirmations=3)
        with pytest.raises(ChainError, match="the chain has only 0 blocks, and one counts when 3 are on top of it"):
            await node.head()
        await anvil.mine(3)
        with pytest.raises(ChainError, match="the chain has only 3 blocks"):
            await node.head()
        await anvil.mine(1)
        head = await node.head()
        assert (head.block.chain_id, head.block.height, head.catching_up) == ("4242", 1, False)
        assert head.block == await node.block(1)
        told = await anvil.call("eth_getBlockByNumber", "0x1", False)
        assert isinstance(told, dict)
        assert (head.block.hash, head.block.time.timestamp()) == (told["hash"], int(told["timestamp"], 16))
        assert (await node.block(4)).height == 4  # above the head: as the node has it
        with pytest.raises(BlockUnavailableError, match="eth_getBlockByNumber at height 5: the node has no such block"):
            await node.block(5)


@needs_anvil
async def test_a_reorganisation_that_the_confirmations_hide_and_one_that_they_do_not() -> None:
    async with running_anvil() as anvil:
        await anvil.mine(20)
        node = EVM(Rpc(anvil.session, anvil.url), confirmations=5)
        head = await node.head()
        assert head.block.height == 15
        newest = await node.block(20)
        await anvil.reorganise(5)
        assert await node.head() == head
        assert (await node.block(20)).hash != newest.hash
        await anvil.reorganise(10)
        after = await node.head()
        assert after.block.height == 15
        assert after.block.hash != head.block.hash
