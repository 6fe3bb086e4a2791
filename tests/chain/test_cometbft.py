"""CometBFT's answers, good, bad and absurd, and what is common to all nodes: requests over real sockets."""

from __future__ import annotations

import asyncio
import copy
import gzip
import zlib
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from pocd.chain import rpc
from pocd.chain.cometbft import CometBFT, parse_block, parse_meta, parse_status
from pocd.chain.make import CHAIN_TIMEOUT
from pocd.chain.rpc import Rpc
from pocd.chain.source import Block, BlockUnavailableError, ChainError, Head, RefusedError, SlowDownError
from pocd.http.client import open_session
from pocd.observe.mask import excerpt, mask_url
from tests.support.processes import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

EXAMPLES: dict[str, Any] = orjson.loads((Path(__file__).parent.parent / "data/cometbft_examples.json").read_bytes())
STATUS, BLOCK = EXAMPLES["StatusResponse"], EXAMPLES["BlockResponse"]
META = orjson.dumps(
    {
        "result": {
            "last_height": "1262196",
            "block_metas": [
                {"block_id": BLOCK["result"]["block_id"], "header": BLOCK["result"]["block"]["header"], "num_txs": "1"}
            ],
        }
    }
)
WHERE = "http://node:26657/rpc"


def error_body(name: str) -> bytes:
    return orjson.dumps(EXAMPLES["errors"][name]["body"])


def changed(document: dict[str, Any], path: str, value: object) -> bytes:
    """The document with one field replaced."""
    document = copy.deepcopy(document)
    *parents, last = path.split(".")
    inner = document
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return orjson.dumps(document)


def without(document: dict[str, Any], path: str) -> bytes:
    """The document less one field."""
    document = copy.deepcopy(document)
    *parents, last = path.split(".")
    inner = document
    for name in parents:
        inner = inner[name]
    del inner[last]
    return orjson.dumps(document)


# Parsing


def test_published_status() -> None:
    assert parse_status(orjson.dumps(STATUS), WHERE) == Head(
        Block(
            chain_id="cosmoshub-2",
            height=1262196,
            hash="790BA84C3545FCCC49A5C629CEE6EA58A6E875C3862175BDC11EE7AF54703501",
            time=datetime(2019, 8, 1, 11, 52, 22, 818762, tzinfo=UTC),
        ),
        catching_up=False,
    )


def test_published_block() -> None:
    assert parse_block(orjson.dumps(BLOCK), 12, WHERE) == Block(
        chain_id="cosmoshub-2",
        height=12,
        hash="112BC173FD838FB68EB43476816CD7B4C6661B6884A9E357B417EE957E1CF8F7",
        time=datetime(2019, 4, 22, 17, 1, 51, 701356, tzinfo=UTC),
    )


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("GET /block?height=BEYOND", BlockUnavailableError, "height 999999999 must be less than or equal to"),
        ("GET /block?height=PRUNED", BlockUnavailableError, "height 1 is not available, lowest height is 1262000"),
        ("GET /block?height=0", RefusedError, "height must be greater than 0, but got 0"),
        ("POST block BEYOND", BlockUnavailableError, "current blockchain height 1262196"),
        ("POST unknown method", RefusedError, "Method not found"),
        ("GET /block of a height whose meta is gone", BlockUnavailableError, "an empty block"),
    ],
)
def test_published_errors_of_block(name: str, kind: type[ChainError], text: str) -> None:
    with pytest.raises(ChainError, match=text) as caught:
        parse_block(error_body(name), 12, WHERE)
    assert caught.type is kind
    assert str(caught.value).startswith(WHERE)


def test_old_wording_of_a_block_not_there_yet() -> None:
    error = {"code": -32603, "message": "Height must be less than or equal to the current blockchain height"}
    with pytest.raises(BlockUnavailableError):
        parse_block(orjson.dumps({"error": error}), 12, WHERE)


def test_a_service_that_is_not_available_says_nothing_about_the_block() -> None:
    with pytest.raises(ChainError) as caught:
        parse_block(b'{"error": {"message": "upstream is not available"}}', 12, WHERE)
    assert caught.type is RefusedError


def test_empty_store() -> None:
    with pytest.raises(ChainError, match="the node has no blocks yet"):
        parse_status(error_body("GET /status of an empty store"), WHERE)


@pytest.mark.parametrize("empty", [("block_id.hash", ""), ("block", None)])
def test_either_half_of_an_empty_block(empty: tuple[str, object]) -> None:
    path, value = empty
    with pytest.raises(BlockUnavailableError):
        parse_block(changed(BLOCK, f"result.{path}", value), 12, WHERE)


def test_another_height_than_asked_for_is_refused() -> None:
    with pytest.raises(ChainError, match="asked for block 13, got block 12"):
        parse_block(orjson.dumps(BLOCK), 13, WHERE)


@pytest.mark.parametrize("height", [7, 7.0, "7", "007"])
def test_heights_as_others_write_them(height: object) -> None:
    head = parse_status(changed(STATUS, "result.sync_info.latest_block_height", height), WHERE)
    assert head.block.height == 7


HEX = STATUS["result"]["sync_info"]["latest_block_hash"]


@pytest.mark.parametrize(("sent", "spelling"), [(HEX.lower(), HEX), (HEX, HEX), ("0xaBc ", "0xaBc "), ("abc", "abc")])
def test_a_hash_in_hex_has_one_spelling_and_others_are_kept_as_they_came(sent: str, spelling: str) -> None:
    assert parse_status(changed(STATUS, "result.sync_info.latest_block_hash", sent), WHERE).block.hash == spelling


def test_the_hash_of_a_block_has_the_spelling_of_the_head() -> None:
    block = parse_block(changed(BLOCK, "result.block_id.hash", HEX.lower()), 12, WHERE)
    assert block.hash == HEX
    assert (
        parse_meta(META.replace(BLOCK["result"]["block_id"]["hash"].encode(), HEX.lower().encode()), 12, WHERE) == block
    )


@pytest.mark.parametrize("error", [None, "", {}, [], {"code": 0, "message": "", "data": None}])
def test_an_empty_error_beside_a_result_is_no_error(error: object) -> None:
    assert parse_status(orjson.dumps(STATUS | {"error": error}), WHERE).block.height == 1262196


def test_an_answer_without_the_envelope() -> None:
    assert parse_status(orjson.dumps(STATUS["result"]), WHERE) == parse_status(orjson.dumps(STATUS), WHERE)
    assert parse_block(orjson.dumps(BLOCK["result"]), 12, WHERE) == parse_block(orjson.dumps(BLOCK), 12, WHERE)


def test_the_small_answer_says_the_same_as_the_whole_block() -> None:
    assert parse_meta(META, 12, WHERE) == parse_block(orjson.dumps(BLOCK), 12, WHERE)


@pytest.mark.parametrize("metas", [None, [], [None]])
def test_no_meta_is_no_block(metas: object) -> None:
    with pytest.raises(BlockUnavailableError, match="an empty block"):
        parse_meta(orjson.dumps({"result": {"block_metas": metas}}), 12, WHERE)


def test_the_small_answer_for_a_block_that_is_not_there() -> None:
    data = "min height 13 can't be greater than max height 12"
    with pytest.raises(BlockUnavailableError, match="min height 13"):
        parse_meta(orjson.dumps({"error": {"code": -32603, "message": "Internal error", "data": data}}), 13, WHERE)


@pytest.mark.parametrize("metas", ["x", {}, ["x"], [{}]])
def test_nonsense_metas(metas: object) -> None:
    with pytest.raises(ChainError, match=r"block_metas must be a list|the answer has no block_id") as caught:
        parse_meta(orjson.dumps({"result": {"block_metas": metas}}), 12, WHERE)
    assert caught.type is ChainError


@pytest.mark.parametrize("height", ["9223372036854775808", "9" * 20, 2**63, 1e300])
def test_a_height_beyond_63_bits(height: object) -> None:
    with pytest.raises(ChainError, match=r"latest_block_height must be (below 2\^63|a whole number), but is"):
        parse_status(changed(STATUS, "result.sync_info.latest_block_height", height), WHERE)
    assert parse_status(changed(STATUS, "result.sync_info.latest_block_height", 2**63 - 1), WHERE).block.height > 2**62


@pytest.mark.parametrize("height", [True, -1, "-1", "+1", "1.0", 1.5, "", " 1", "1_0", "\u0661", "0x1", None, []])
def test_nonsense_height(height: object) -> None:
    with pytest.raises(ChainError, match="latest_block_height must be a whole number, but is"):
        parse_status(changed(STATUS, "result.sync_info.latest_block_height", height), WHERE)


@pytest.mark.parametrize("value", ["", None, 5, ["A"], "A\nB", "\x1b[31m", "A" * 257])
@pytest.mark.parametrize("path", ["result.sync_info.latest_block_hash", "result.node_info.network"])
def test_nonsense_text(path: str, value: object) -> None:
    with pytest.raises(ChainError, match="must be a non-empty string on one line") as caught:
        parse_status(changed(STATUS, path, value), WHERE)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("value", "catching_up"), [(False, False), ("false", False), (None, False), (True, True), ("true", True)]
)
def test_catching_up(value: object, catching_up: bool) -> None:  # noqa: FBT001 - what is expected
    assert parse_status(changed(STATUS, "result.sync_info.catching_up", value), WHERE).catching_up is catching_up


def test_a_node_that_does_not_say_is_not_catching_up() -> None:
    assert not parse_status(without(STATUS, "result.sync_info.catching_up"), WHERE).catching_up


@pytest.mark.parametrize("value", ["no", 0, 1, 1.0, [], {}])
def test_nonsense_catching_up(value: object) -> None:
    with pytest.raises(ChainError, match="catching_up must be true or false"):
        parse_status(changed(STATUS, "result.sync_info.catching_up", value), WHERE)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2024-02-29T23:59:59Z", datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)),
        ("2024-02-29t23:59:59.5z", datetime(2024, 2, 29, 23, 59, 59, 500000, tzinfo=UTC)),
        ("2024-01-01T00:00:00.9999999999Z", datetime(2024, 1, 1, 0, 0, 0, 999999, tzinfo=UTC)),
        ("2024-01-01T00:00:00.5+02:00", datetime(2023, 12, 31, 22, 0, 0, 500000, tzinfo=UTC)),
    ],
)
def test_times(text: str, time: datetime) -> None:
    parsed = parse_status(changed(STATUS, "result.sync_info.latest_block_time", text), WHERE).block.time
    assert parsed == time
    assert parsed.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    "value", ["", "2024-01-01", "2024-13-01T00:00:00Z", "2024-01-01T00:00:00", "0001-01-01T00:00:00+14:00", 5, None]
)
def test_nonsense_time(value: object) -> None:
    with pytest.raises(ChainError, match="latest_block_time must be an RFC 3339 time"):
        parse_status(changed(STATUS, "result.sync_info.latest_block_time", value), WHERE)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", r"is not JSON: \(nothing\)"),
        (b"<html>\r\n<h1>Access denied</h1>", "is not JSON: <html> <h1>Access denied</h1>"),
        (b'{"jsonrpc": "2.0", "res', 'is not JSON: {"jsonrpc": "2.0", "res'),
        (b"\xff\xfe\x00", "is not JSON: \ufffd\ufffd"),
        (b"[]", r"is not a JSON object: \[\]"),
        (b"null", "is not a JSON object: null"),
        (b"{}", "has no sync_info.latest_block_height: {}"),
        (b'{"error": {}}', "has no sync_info.latest_block_height"),
        (b'{"result": []}', "has no sync_info.latest_block_height"),
        (b'{"result": {"sync_info": "x"}}', "has no sync_info.latest_block_height"),
        (b'{"error": "slow down"}', "the node says: slow down"),
        (b'{"error": {"code": 5}}', 'the node says: {"error": {"code": 5}}'),
        (b'{"error": ' + b"[" * 500 + b"]" * 500 + b"}", "the node says: {"),
    ],
)
def test_nonsense_answers(body: bytes, text: str) -> None:
    with pytest.raises(ChainError, match=text) as caught:
        parse_status(body, WHERE)
    assert str(caught.value).startswith(WHERE)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("path", ["result.node_info.network", "result.sync_info"])
def test_missing_fields_of_status(path: str) -> None:
    with pytest.raises(ChainError, match="the answer has no"):
        parse_status(without(STATUS, path), WHERE)


@pytest.mark.parametrize(
    "path", ["block_id", "block", "block.header", "block.header.chain_id", "block.header.height", "block.header.time"]
)
def test_missing_fields_of_block(path: str) -> None:
    with pytest.raises(ChainError, match="the answer has no") as caught:
        parse_block(without(BLOCK, f"result.{path}"), 12, WHERE)
    assert caught.type is ChainError


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from(["sync_info", "sync_info.latest_block_height", "sync_info.latest_block_time", "node_info.network"]),
    JSON,
)
def test_any_value_anywhere_is_a_head_or_a_chain_error(path: str, value: object) -> None:
    try:
        head = parse_status(changed(STATUS, f"result.{path}", value), WHERE)
    except ChainError:
        return
    assert head.block.height > 0
    assert head.block.hash


@given(st.binary())
def test_any_bytes_are_a_chain_error(body: bytes) -> None:
    with pytest.raises(ChainError):
        parse_block(body, 1, WHERE)


def test_a_value_too_deep_to_write_down() -> None:
    body = orjson.dumps(STATUS).replace(
        b'"latest_block_height":"1262196"', b'"latest_block_height":' + b"[" * 500 + b"]" * 500
    )
    with pytest.raises(ChainError, match="must be a whole number, but is an object or a list"):
        parse_status(body, WHERE)


# Masking


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("http://host:26657/rpc", "http://host:26657/rpc"),
        ("http://user:pass@host/rpc", "http://***@host/rpc"),
        ("http://user:p@ss@host", "http://***@host"),
        ("http://user:p/ss@host/rpc", "http://***@host/rpc"),
        ("http://user:pass@host/http://other", "http://***@host/http://other"),
        ("user:pass@host", "***@host"),
        ("https://host/rpc?key=abc&x=&flag", "https://host/rpc?key=***&x=***&***"),
        ("https://host/rpc?mail=a@b", "https://host/rpc?mail=***"),
        ("https://host/#token", "https://host/"),
        ("http://[::1", "http://[::1"),
        ("http://host\n\x1b[31m", "http://host\ufffd\ufffd[31m"),
        ("", ""),
    ],
)
def test_mask_url(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "(nothing)"),
        (b" \r\n\x00", "(nothing)"),
        ("a\u2028b\x1b[0m\u202e", "a b [0m"),
        (b"caf\xc3\xa9 \xff", "café \ufffd"),
        ("x" * 80, "x" * 80),
        ("x" * 81, "x" * 80 + "…"),
        (b"x" * 10**6, "x" * 80 + "…"),
    ],
)
def test_excerpt(data: bytes | str, line: str) -> None:
    assert excerpt(data) == line


# A node, over real sockets


class Waits:
    """Stands in for asyncio.sleep: remembers, and does not wait."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@asynccontextmanager
async def node_of(
    *answers: Callable[[web.Request], Awaitable[web.StreamResponse]],
    path: str = "",
    attempts: int = 3,
    request_timeout: float = 5.0,
) -> AsyncIterator[tuple[CometBFT, list[web.Request], Waits]]:
    """A client of a server that gives these answers in turn, the last one for ever."""
    requests: list[web.Request] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        requests.append(request)
        return await answers[min(len(requests), len(answers)) - 1](request)

    app = web.Application()
    app.router.add_get("/{tail:.*}", handle)
    waits = Waits()
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        yield (
            CometBFT(
                Rpc(session, f"{server.make_url('/')}{path}", sleep=waits, attempts=attempts, timeout=request_timeout)
            ),
            requests,
            waits,
        )


def answer(body: object, status: int = 200, **headers: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    content = body if isinstance(body, bytes) else orjson.dumps(body)

    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(body=content, status=status, headers=headers)

    return handle


async def hang_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def test_head_and_block() -> None:
    async with node_of(answer(STATUS), answer(META)) as (node, requests, waits):
        assert (await node.head()).block.height == 1262196
        assert (await node.block(12)).height == 12
        assert [request.path_qs for request in requests] == ["/status", "/blockchain?minHeight=12&maxHeight=12"]
        assert waits.seconds == []


@pytest.mark.parametrize(
    "refusal",
    [
        lambda: answer(b"404 page not found", 404),
        lambda: answer(b"", 501),
        lambda: answer(error_body("POST unknown method")),
        lambda: answer(STATUS),
        lambda: answer(b"<html>"),
    ],
)
async def test_a_node_without_the_small_call_is_asked_for_the_whole_block_and_first_from_then_on(
    refusal: Callable[[], Callable[[web.Request], Awaitable[web.StreamResponse]]],
) -> None:
    async with node_of(refusal(), answer(BLOCK)) as (node, requests, _):
        assert await node.block(12) == await node.block(12)
        assert [request.path for request in requests] == ["/blockchain", "/block", "/block"]


async def test_a_node_that_lacks_the_block_in_either_call() -> None:
    example = EXAMPLES["errors"]["GET /block?height=PRUNED"]
    pruned = answer(example["body"], example["http_status"])
    async with node_of(answer(b"", 404), pruned, pruned) as (node, requests, _):
        for _ in range(2):
            with pytest.raises(BlockUnavailableError, match="lowest height is 1262000"):
                await node.block(12)
        assert [request.path for request in requests] == ["/blockchain", "/block", "/block"]


async def test_a_block_as_large_as_the_protocol_allows() -> None:
    transactions = ["A" * 146] * 200_000  # 28 MiB
    async with node_of(answer(b"", 404), answer(changed(BLOCK, "result.block.data", {"txs": transactions}))) as (
        node,
        _,
        _,
    ):
        assert (await node.block(12)).height == 12


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, b"\xef\xbb\xbf".__add__])
async def test_an_answer_that_is_packed_unasked(pack: Callable[[bytes], bytes]) -> None:
    async with node_of(answer(pack(orjson.dumps(STATUS)))) as (node, _, _):
        assert (await node.head()).block.height == 1262196


async def test_the_limit_of_an_answer_holds_for_what_is_unpacked() -> None:
    async with node_of(answer(gzip.compress(b"[" * (rpc.MAX_ANSWER_BYTES + 1)))) as (node, requests, _):
        with pytest.raises(ChainError, match=rf"longer than {rpc.MAX_ANSWER_BYTES} bytes: \[\[\["):
            await node.head()
        assert len(requests) == 1


@pytest.mark.parametrize(
    ("reply", "seconds"),
    [
        (answer(b"", 429), None),
        (answer({"error": {"message": "slow down"}}, 429, **{"Retry-After": "37"}), 37.0),
        (answer(b"", 429, **{"Retry-After": "1.5"}), 1.5),
        (answer(b"", 503, **{"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}), 0.0),
        (answer(b"", 429, **{"Retry-After": "soon"}), None),
        (answer({"error": {"code": -32005, "message": "limit exceeded"}}), None),
        (answer({"error": {"code": 429, "message": "compute units"}}), None),
    ],
)
async def test_who_says_slow_down_is_not_asked_again(
    reply: Callable[[web.Request], Awaitable[web.StreamResponse]], seconds: float | None
) -> None:
    async with node_of(reply) as (node, requests, waits):
        for ask in (node.head, lambda: node.block(5)):
            with pytest.raises(SlowDownError) as caught:
                await ask()
            assert caught.value.seconds == seconds
        assert len(requests) == 2
        assert waits.seconds == []


async def test_path_and_query_of_the_url_are_kept() -> None:
    async with node_of(answer(META), path="rpc/?key=a%26b") as (node, requests, _):
        await node.block(12)
        assert requests[0].path == "/rpc/blockchain"
        assert dict(requests[0].query) == {"key": "a&b", "minHeight": "12", "maxHeight": "12"}


async def test_a_rpc_error_of_http_500_is_an_answer_and_not_tried_again() -> None:
    example = EXAMPLES["errors"]["GET /block?height=BEYOND"]
    async with node_of(answer(example["body"], example["http_status"])) as (node, requests, _):
        with pytest.raises(BlockUnavailableError, match="at height 999999999: the node says: Internal error: height"):
            await node.block(999999999)
        assert len(requests) == 1


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_what_may_pass_is_tried_again(status: int) -> None:
    async with node_of(*[answer(b"<h1>busy</h1>", status)] * 2, answer(STATUS)) as (node, requests, waits):
        assert (await node.head()).block.height == 1262196
        assert len(requests) == 3
        assert len(waits.seconds) == 2
        assert all(0 <= seconds <= 0.5 for seconds in waits.seconds)


async def test_a_lost_connection_is_tried_again() -> None:
    # Twice: aiohttp itself asks once more, within the attempt, when a GET's connection is lost.
    async with node_of(hang_up, hang_up, answer(STATUS)) as (node, _, waits):
        assert (await node.head()).block.height == 1262196
        assert waits.seconds


async def test_attempts_end() -> None:
    async with node_of(answer(b"<h1>busy</h1>", 503), attempts=2) as (node, requests, _):
        with pytest.raises(ChainError, match=r"/status: HTTP 503: <h1>busy</h1>"):
            await node.head()
        assert len(requests) == 2


async def test_a_node_that_is_down_is_asked_once_a_call_until_it_answers() -> None:
    busy = answer(b"busy", 503)
    async with node_of(*[busy] * 5, answer(STATUS), busy) as (node, requests, _):
        for asked in (3, 4, 5):
            with pytest.raises(ChainError, match="HTTP 503"):
                await node.head()
            assert len(requests) == asked
        await node.head()
        with pytest.raises(ChainError, match="HTTP 503"):
            await node.head()
        assert len(requests) == 6 + 3, "it had answered"


@pytest.mark.parametrize("status", [201, 204, 401, 403, 404])
async def test_what_will_not_pass_is_not_tried_again(status: int) -> None:
    async with node_of(answer(b"" if status == 204 else b"no\r\n", status)) as (node, requests, _):
        with pytest.raises(ChainError, match=rf"/status: HTTP {status}: (no|\(nothing\))$"):
            await node.head()
        assert len(requests) == 1


@pytest.mark.parametrize("body", [b"<html>", b'{"result": {', b"[1]", b'{"result": {"sync_info": 5}}'])
async def test_nonsense_with_http_200(body: bytes) -> None:
    async with node_of(answer(body)) as (node, requests, _):
        with pytest.raises(ChainError, match=r"^http://127\.0\.0\.1:\d+/status: the answer "):
            await node.head()
        assert len(requests) == 1


async def test_redirects_are_not_followed() -> None:
    redirect = answer(b"", 302, Location="http://me:secret@elsewhere/status")
    async with node_of(redirect, answer(STATUS)) as (node, requests, _):
        with pytest.raises(ChainError, match=r"HTTP 302, a redirect to http://\*\*\*@elsewhere/status, which is not"):
            await node.head()
        assert len(requests) == 1


async def test_an_answer_without_end_is_cut_off() -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while request.transport is not None:
            await response.write(b"[" * 1_000_000)
        return response

    async with node_of(endless) as (node, requests, _):
        with pytest.raises(ChainError, match=rf"longer than {rpc.MAX_ANSWER_BYTES} bytes: \[\[\["):
            await node.head()
        assert len(requests) == 1


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1"])
async def test_an_answer_of_too_many_values_is_not_read(value: bytes) -> None:
    body = b"[" + (value + b",") * (rpc.MOST_COMMAS + 1) + b"0]"
    async with node_of(answer(body)) as (node, requests, _):
        with pytest.raises(ChainError, match=f"has more than {rpc.MOST_COMMAS} commas: "):
            await node.head()
        assert len(requests) == 1


async def test_a_stalling_node() -> None:
    released = asyncio.Event()

    async def stall(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b'{"result"')
        await released.wait()
        return response

    async with node_of(stall, attempts=2, request_timeout=0.1) as (node, _, waits):
        with pytest.raises(ChainError, match=r"/status: no answer within 0\.1 s"):
            await node.head()
        released.set()
        assert len(waits.seconds) == 1, "it was asked twice"


async def raw_server(reply: bytes) -> asyncio.Server:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    return await asyncio.start_server(handle, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b"", "Server disconnected"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "the answer is not HTTP: "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "not all data received|payload is not completed"),
    ],
)
async def test_not_quite_http(reply: bytes, text: str) -> None:
    async with await raw_server(reply) as server, aiohttp.ClientSession() as session:
        port = server.sockets[0].getsockname()[1]
        node = CometBFT(Rpc(session, f"http://me:secret@127.0.0.1:{port}?key=hidden", sleep=Waits()))
        with pytest.raises(ChainError, match="(?i)" + text) as caught:
            await node.head()
    message = str(caught.value)
    assert message.startswith(f"http://***@127.0.0.1:{port}/status?key=***: ")
    assert message.isprintable()
    assert "secret" not in message
    assert "hidden" not in message


async def test_connection_refused() -> None:
    waits, port = Waits(), free_port()
    async with aiohttp.ClientSession() as session:
        node = CometBFT(Rpc(session, f"http://me:secret@127.0.0.1:{port}", sleep=waits))
        with pytest.raises(ChainError, match=r"^http://\*\*\*@127\.0\.0\.1:\d+/blockchain at height 5: Cannot connect"):
            await node.block(5)
        assert len(waits.seconds) == 2
        assert str(node) == f"http://***@127.0.0.1:{port}"


@pytest.mark.parametrize(
    "url", ["", "node:26657", "ftp://me:secret@node", "http://", "http://me:secret/@node", "http://me:secret@a..b"]
)
async def test_not_an_address(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(ValueError, match="must ") as caught:
            Rpc(session, url)
    assert "secret" not in str(caught.value)


async def asked_for(base: str) -> list[str]:
    """What a node at `base`, with HOST in it, is asked for: its head, and a block in both ways."""
    targets: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        targets.append((await reader.readuntil(b"\r\n\r\n")).split()[1].decode())
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 30\r\n\r\nno page for hidden or hi%64den")
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server, open_session(CHAIN_TIMEOUT) as session:
        rpc = Rpc(session, base.replace("HOST", f"127.0.0.1:{server.sockets[0].getsockname()[1]}"), attempts=1)
        for call in (CometBFT(rpc).head, partial(CometBFT(rpc).block, 5)):
            with pytest.raises(ChainError, match="404") as caught:
                await call()
            if "?" not in base:
                continue
            assert "hidden" not in str(caught.value)
            assert "hi%64den" not in str(caught.value)
    return targets


@pytest.mark.parametrize(
    ("base", "path", "key"),
    [
        ("http://HOST", "", ""),
        ("http://HOST/", "", ""),
        ("http://HOST?key=hi%64den", "", "key=hi%64den"),
        ("http://HOST/a%3D%3D//b/?key=hi%64den&x=a+b%2B", "/a%3D%3D//b", "key=hi%64den&x=a+b%2B"),
    ],
)
async def test_path_and_query_of_a_node_are_sent_as_they_are_written(base: str, path: str, key: str) -> None:
    assert await asked_for(base) == [
        f"{path}/status" + (f"?{key}" if key else ""),
        f"{path}/blockchain?" + (f"{key}&" if key else "") + "minHeight=5&maxHeight=5",
        f"{path}/block?" + (f"{key}&" if key else "") + "height=5",
    ]
