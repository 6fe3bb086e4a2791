"""Several nodes that stand in for one another: which is asked, which is believed, which is refused."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from math import inf
from typing import TYPE_CHECKING, cast

import aiohttp
import pytest
import structlog
from aiohttp import web
from structlog.testing import capture_logs

from pocd.chain.cometbft import CometBFT
from pocd.chain.failover import (
    BACKOFF,
    FARTHEST_JUMP,
    FASTEST,
    KNOWN_HASHES,
    LEAP,
    LEAP_LOOKS,
    LEAP_SECONDS,
    LONGEST_REST,
    Failover,
)
from pocd.chain.rpc import Rpc
from pocd.chain.source import Block, BlockUnavailableError, ChainError, ChainSource, Head, SlowDownError
from pocd.dev.chain import DevChain
from tests.support.clocks import NOW, ManualClock
from tests.support.processes import Chain, free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from structlog.typing import FilteringBoundLogger


def failover(
    sources: Sequence[ChainSource],
    clock: ManualClock | None = None,
    *,
    chain_id: str | None = None,
    hashes: Mapping[int, str] | None = None,
    highest: int | None = None,
) -> Failover:
    return Failover(
        sources,
        chain_id=chain_id,
        hashes=hashes or {},
        highest=highest,
        clock=clock or ManualClock(),
        log=cast("FilteringBoundLogger", structlog.get_logger()),
    )


def block_at(height: int, *, chain_id: str = "chain", block_hash: str | None = None, age: float = 0.0) -> Block:
    return Block(chain_id, height, block_hash or f"HASH{height}", datetime.fromtimestamp(NOW - age, UTC))


class Fake:
    """A source that answers what it is told, and counts."""

    def __init__(self, name: str, answer: Block | ChainError, *, reorganises: bool = False) -> None:
        self.name = name
        self.answer = answer
        self.reorganises = reorganises
        self.catching_up = False
        self.asked = 0

    def __str__(self) -> str:
        return self.name

    async def block(self, height: int) -> Block:  # noqa: ARG002 - the answer is fixed
        self.asked += 1
        if isinstance(self.answer, ChainError):
            raise self.answer
        return self.answer

    async def head(self) -> Head:
        return Head(await self.block(0), self.catching_up)


DOWN = ChainError("down")


# Which is asked


async def test_the_first_is_asked_again_as_soon_as_it_works() -> None:
    clock = ManualClock()
    first, second, third = Fake("a", DOWN), Fake("b", block_at(5)), Fake("c", block_at(6))
    chain = failover([first, second, third], clock)
    assert (await chain.head()).block.height == 5
    first.answer = block_at(7)
    assert (await chain.head()).block.height == 5  # left alone
    assert (first.asked, second.asked, third.asked) == (1, 2, 0)
    clock.advance(BACKOFF[0])
    assert (await chain.head()).block.height == 7
    assert (await chain.head()).block.height == 7
    assert (first.asked, second.asked, third.asked) == (3, 2, 0)


async def test_a_source_that_fails_is_left_alone_longer_and_longer() -> None:
    clock = ManualClock()
    first, second = Fake("a", DOWN), Fake("b", block_at(5))
    chain = failover([first, second], clock)
    for times, seconds in enumerate([1, 2, 4, 8, 10, 10], start=1):
        await chain.head()
        clock.advance(seconds - 0.01)
        await chain.head()
        assert first.asked == times
        clock.advance(0.01)
    first.answer = block_at(6)
    await chain.head()
    first.answer = DOWN
    await chain.head()
    clock.advance(1)
    await chain.head()
    assert first.asked == 9  # the count began anew


async def test_all_left_alone_fail_at_once() -> None:
    clock = ManualClock()
    sources = [Fake("a", ChainError("a: refused")), Fake("b", ChainError("b: timeout"))]
    chain = failover(sources, clock)
    with pytest.raises(ChainError, match=r"^a: refused; b: timeout$"):
        await chain.head()
    clock.advance(0.5)
    with pytest.raises(
        ChainError, match=r"^a: refused \(left alone for 1 s more\); b: timeout \(left alone for 1 s more\)$"
    ) as caught:
        await chain.block(5)
    assert caught.type is ChainError
    assert [source.asked for source in sources] == [1, 1]


async def test_a_block_that_a_source_does_not_hold_is_no_failure() -> None:
    first, second = Fake("a", BlockUnavailableError("a: pruned")), Fake("b", block_at(5))
    chain = failover([first, second])
    assert (await chain.block(5)).height == 5
    first.answer = block_at(6)
    assert (await chain.head()).block.height == 6


async def test_it_says_what_each_source_said() -> None:
    chain = failover([Fake("a", ChainError("a: refused")), Fake("b", BlockUnavailableError("b: pruned"))])
    with pytest.raises(ChainError, match=r"^a: refused; b: pruned$") as caught:
        await chain.block(5)
    assert caught.type is ChainError


async def test_a_block_that_no_source_holds() -> None:
    chain = failover([Fake("a", BlockUnavailableError("a: pruned")), Fake("b", BlockUnavailableError("b: pruned"))])
    with pytest.raises(BlockUnavailableError, match=r"^a: pruned; b: pruned$"):
        await chain.block(5)


async def test_a_change_of_source_is_logged_once() -> None:
    clock = ManualClock()
    first, second = Fake("a", DOWN), Fake("b", block_at(5))
    chain = failover([first, second], clock)
    with capture_logs() as records:
        await chain.head()
        await chain.head()
        first.answer = block_at(6)
        clock.advance(1)
        await chain.head()
        await chain.head()
    assert [(record["action"], record["source"], record["because"]) for record in records] == [
        ("chain_source", "b", ["down"]),
        ("chain_source", "a", []),
    ]


# Which is behind


async def test_a_stale_head_is_a_reason_to_ask_the_next_but_no_failure() -> None:
    first, second = Fake("a", block_at(5, age=601)), Fake("b", block_at(7, age=600))
    chain = failover([first, second])
    with capture_logs() as records:
        assert (await chain.head()).block.height == 7
    assert records[0]["because"] == ["a has a newest block that is 601 s old"]
    first.answer = block_at(8)
    assert (await chain.head()).block.height == 8  # at once


async def test_a_head_that_is_catching_up_is_a_reason_to_ask_the_next_but_no_failure() -> None:
    first, second = Fake("a", block_at(5)), Fake("b", block_at(4))
    first.catching_up = True
    chain = failover([first, second])
    assert await chain.head() == Head(block_at(4), catching_up=False)
    first.catching_up = False
    assert (await chain.head()).block.height == 5


async def test_without_a_healthy_one_the_highest_that_is_behind_is_told() -> None:
    first, second = Fake("a", block_at(5, age=1000)), Fake("b", block_at(7))
    second.catching_up = True
    third = Fake("c", DOWN)
    chain = failover([first, second, third])
    assert await chain.head() == Head(block_at(7), catching_up=True)
    first.answer = block_at(7, age=1000)
    assert await chain.head() == Head(block_at(7, age=1000), catching_up=False)  # of equals the first
    assert (first.asked, second.asked, third.asked) == (2, 2, 1)


# Which is believed


async def test_another_chain_is_refused_and_the_next_source_asked() -> None:
    first, wrong, right = Fake("a", block_at(5)), Fake("b", block_at(6, chain_id="other")), Fake("c", block_at(6))
    chain = failover([first, wrong, right])
    await chain.head()
    first.answer = DOWN
    assert (await chain.head()).block == block_at(6)
    right.answer = ChainError("c is down")
    with pytest.raises(ChainError, match=r"b is on chain other, expected chain: check its URL \(another chain needs"):
        await chain.head()


@pytest.mark.parametrize("reorganises", [False, True])
async def test_a_chain_that_is_known_from_before(reorganises: bool) -> None:  # noqa: FBT001 - a parameter
    source = Fake("a", block_at(5), reorganises=reorganises)
    chain = failover([source], chain_id="known")
    for ask in (chain.head(), chain.block(5)):
        with pytest.raises(ChainError, match=r"^a is on chain chain, expected known: check its URL .*store\.path"):
            await ask


async def test_another_hash_at_a_known_height_is_refused() -> None:
    clock = ManualClock()
    source = Fake("a", block_at(5))
    chain = failover([source], clock)
    await chain.head()
    source.answer = block_at(5, block_hash="OTHER")
    with pytest.raises(ChainError, match=r"^a has hash OTHER at height 5, but HASH5 was seen before: check its URL"):
        await chain.block(5)
    source.answer = block_at(5)
    clock.advance(1)
    assert await chain.block(5) == block_at(5)


async def test_hashes_that_are_known_from_before() -> None:
    chain = failover([Fake("a", block_at(5))], hashes={5: "STORED"})
    with pytest.raises(ChainError, match="a has hash HASH5 at height 5, but STORED was seen before"):
        await chain.block(5)


async def test_of_too_many_known_hashes_the_newest_count() -> None:
    hashes = dict.fromkeys(range(1, KNOWN_HASHES + 2), "STORED")
    source = Fake("a", block_at(1))
    chain = failover([source], hashes=hashes)
    assert (await chain.block(1)).hash == "HASH1"
    source.answer = block_at(KNOWN_HASHES + 1)
    with pytest.raises(ChainError, match="STORED was seen before"):
        await chain.block(KNOWN_HASHES + 1)


async def test_where_blocks_are_replaced_another_hash_is_believed() -> None:
    source = Fake("a", block_at(5), reorganises=True)
    chain = failover([source], hashes={5: "STORED"})
    assert chain.reorganises
    assert await chain.block(5) == block_at(5)
    source.answer = block_at(5, block_hash="OTHER")
    assert (await chain.head()).block.hash == "OTHER"


async def test_an_absurd_height_is_refused() -> None:
    source, second = Fake("a", block_at(5 + FARTHEST_JUMP + 1)), Fake("b", block_at(6))
    chain = failover([source, second], highest=5)
    assert (await chain.head()).block.height == 6
    second.answer = DOWN
    with pytest.raises(ChainError, match=r"^a says that its newest block is 100000006, more than 100000000 above 5, "):
        await chain.head()


FAR = 5 + FARTHEST_JUMP - 1


async def test_a_leap_of_one_node_is_passed_over_while_another_is_well() -> None:
    clock = ManualClock()
    liar, honest = Fake("a", block_at(FAR)), Fake("b", block_at(6))
    chain = failover([liar, honest], clock, highest=5)
    for _ in range(100):
        assert (await chain.head()).block.height == 6
        clock.advance(LEAP_SECONDS)
        liar.answer = block_at(FAR + int(clock.elapsed))
    assert honest.asked == 100


async def test_one_lie_of_a_lone_node_is_not_believed() -> None:
    source = Fake("a", block_at(5))
    chain = failover([source])
    await chain.head()
    source.answer = block_at(FAR)
    with pytest.raises(ChainError, match=r"^a says that its newest block is 100000004, which is 99999999 above the h"):
        await chain.head()
    source.answer = block_at(6)
    assert (await chain.head()).block.height == 6


async def test_a_leap_that_a_lone_node_repeats_is_believed() -> None:
    clock = ManualClock()
    source = Fake("a", block_at(500))
    chain = failover([source], clock, highest=5)
    for height in (500, 502, 499, 501):  # a balanced address differs by a few
        source.answer = block_at(height)
        with pytest.raises(ChainError, match="above the highest"):
            await chain.head()
        clock.advance(LEAP_SECONDS / 4)
    assert (await chain.head()).block.height == 501


async def test_a_leap_is_not_believed_after_few_looks_or_to_another_height() -> None:
    clock = ManualClock()
    source = Fake("a", block_at(500))
    chain = failover([source], clock, highest=5)
    for height in (500, 500, FAR, FAR, 500, 500):
        source.answer = block_at(height)
        with pytest.raises(ChainError, match="above the highest"):
            await chain.head()
        clock.advance(LEAP_SECONDS)
    assert LEAP_LOOKS == 3
    assert (await chain.head()).block.height == 500


async def test_a_leap_that_two_nodes_confirm_is_believed_at_once() -> None:
    chain = failover([Fake("a", block_at(500)), Fake("b", block_at(499))], highest=5)
    assert (await chain.head()).block.height == 500


async def test_two_nodes_that_leap_to_different_heights_confirm_nothing() -> None:
    chain = failover([Fake("a", block_at(FAR)), Fake("b", block_at(500))], highest=5)
    with pytest.raises(ChainError, match=r"a says that .*; b says that "):
        await chain.head()


async def test_a_lie_that_was_believed_is_corrected_by_heads_of_now() -> None:
    clock = ManualClock()
    source = Fake("a", block_at(6))
    chain = failover([source], clock, highest=FAR)
    for _ in range(LEAP_LOOKS - 1):
        with pytest.raises(ChainError, match=r"which is 99999998 below the highest seen before: believed when"):
            await chain.head()
        clock.advance(LEAP_SECONDS)
    assert await chain.head() == Head(block_at(6), catching_up=False, corrects=True)
    source.answer = block_at(7)
    assert await chain.head() == Head(block_at(7), catching_up=False)
    source.answer = block_at(FAR)
    with pytest.raises(ChainError, match="above the highest"):
        await chain.head()


async def test_a_lie_that_was_believed_is_corrected_at_once_by_two_nodes() -> None:
    chain = failover([Fake("a", block_at(6)), Fake("b", block_at(5))], highest=FAR)
    assert await chain.head() == Head(block_at(6), catching_up=False, corrects=True)


@pytest.mark.parametrize("head", [Head(block_at(6, age=age), catching_up=False) for age in (601, -601)])
async def test_a_head_that_is_not_of_now_proves_nothing(head: Head) -> None:
    chain = failover([Fake("a", head.block), Fake("b", head.block)], highest=FAR)
    for _ in range(2 * LEAP_LOOKS):
        assert await chain.head() == head


async def test_a_node_that_catches_up_proves_nothing() -> None:
    source = Fake("a", block_at(6))
    source.catching_up = True
    assert await failover([source], highest=FAR).head() == Head(block_at(6), catching_up=True)


async def test_what_the_chain_can_have_made_since_is_no_leap() -> None:
    clock = ManualClock()
    source = Fake("a", block_at(5))
    chain = failover([source], clock)
    await chain.head()
    clock.advance(60)
    source.answer = block_at(5 + LEAP + int(60 * FASTEST))
    assert (await chain.head()).block == source.answer


async def test_the_hash_of_a_leap_that_is_not_believed_is_not_remembered() -> None:
    source = Fake("a", block_at(5))
    chain = failover([source])
    await chain.head()
    source.answer = block_at(500, block_hash="LIE")
    with pytest.raises(ChainError, match="above the highest"):
        await chain.head()
    source.answer = block_at(500)
    assert await chain.block(500) == block_at(500)


async def test_a_hash_in_another_spelling_is_the_same() -> None:
    source = Fake("a", block_at(5, block_hash="aBc"))
    chain = failover([source], hashes={5: "AbC"})
    assert (await chain.block(5)).hash == "aBc"


# Who asks to be left alone


@pytest.mark.parametrize(
    ("seconds", "rest"), [(None, BACKOFF[0]), (0.0, BACKOFF[0]), (37.5, 37.5), (1e9, LONGEST_REST), (inf, LONGEST_REST)]
)
async def test_a_lone_node_that_asks_to_be_left_alone_is(seconds: float | None, rest: float) -> None:
    clock = ManualClock()
    source = Fake("a", SlowDownError("a: HTTP 429", seconds))
    chain = failover([source], clock)
    with pytest.raises(ChainError, match=r"^a: HTTP 429$"):
        await chain.head()
    source.answer = block_at(5)
    clock.advance(rest - 0.01)
    with pytest.raises(ChainError, match=r"^a: HTTP 429 \(left alone for 1 s more\)$"):
        await chain.block(5)
    clock.advance(0.01)
    assert (await chain.head()).block.height == 5
    assert source.asked == 2


async def test_a_lone_node_that_fails_is_asked_again_at_once() -> None:
    source = Fake("a", DOWN)
    chain = failover([source])
    with pytest.raises(ChainError):
        await chain.head()
    source.answer = block_at(5)
    assert (await chain.head()).block.height == 5


async def test_nodes_that_flap_are_few_lines_of_log() -> None:
    clock = ManualClock()
    first, second, third = Fake("a", block_at(5)), Fake("b", block_at(5)), Fake("c", block_at(5))
    chain = failover([first, second, third], clock)
    with capture_logs() as records:
        for look in range(100):
            first.catching_up, second.catching_up = look % 2 == 0, look % 4 == 0
            await chain.head()
            clock.advance(0.5)
    assert len(records) <= 4


async def test_known_hashes_are_bounded_and_the_last_seen_stay() -> None:
    clock = ManualClock()
    source = Fake("a", block_at(1))
    chain = failover([source], clock)
    await chain.head()
    for height in range(2, KNOWN_HASHES + 1):
        source.answer = block_at(height)
        await chain.head()
    source.answer = block_at(1)
    await chain.head()  # seen again just now: height 2 is the next to be forgotten
    source.answer = block_at(KNOWN_HASHES + 1)
    await chain.head()
    source.answer = block_at(2, block_hash="FORGOTTEN")
    assert (await chain.head()).block.hash == "FORGOTTEN"
    source.answer = block_at(1, block_hash="OTHER")
    with pytest.raises(ChainError, match="HASH1 was seen before"):
        await chain.head()


async def test_no_sources() -> None:
    with pytest.raises(ValueError, match="at least one"):
        failover([])


# Over real sockets


def chain_of(seed: str, chain_id: str = "pocd-dev") -> Chain:
    return Chain(height=7, dev=DevChain(seed, 1.0, genesis=time.time(), chain_id=chain_id))


async def test_of_three_nodes_two_lie() -> None:
    other_chain, other_hash, honest = chain_of("test", "elsewhere"), chain_of("forged"), chain_of("test")
    clock = ManualClock(time.time())
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        for node in (other_chain, other_hash, honest):
            await stack.enter_async_context(node.served())
        sources = [CometBFT(Rpc(session, node.url, attempts=1)) for node in (other_chain, other_hash, honest)]
        known = {7: honest.dev.block_hash(7)}
        chain = failover(sources, clock, chain_id="pocd-dev", hashes=known)
        assert (await chain.head()).block.hash == honest.dev.block_hash(7)
        assert (await chain.block(6)).hash == honest.dev.block_hash(6)
        assert (other_chain.polls, other_hash.polls, honest.polls) == (1, 1, 1)
        clock.advance(BACKOFF[0])
        assert (await chain.head()).block.hash == honest.dev.block_hash(7)
        assert (other_chain.polls, other_hash.polls, honest.polls) == (2, 2, 2)
        honest.answer = lambda _request: web.Response(status=404)
        with pytest.raises(ChainError) as caught:
            await chain.head()
    for text in ("is on chain elsewhere, expected pocd-dev", f"but {known[7]} was seen before", "HTTP 404"):
        assert text in str(caught.value)


async def test_a_node_that_comes_back_is_preferred_again() -> None:
    first, second = chain_of("test"), chain_of("test")
    second.height = 8
    clock, port = ManualClock(time.time()), free_port()
    async with aiohttp.ClientSession() as session, second.served():
        urls = [f"http://127.0.0.1:{port}", second.url]
        chain = failover([CometBFT(Rpc(session, url, attempts=1)) for url in urls], clock)
        assert (await chain.head()).block.height == 8
        async with first.served(port):
            assert (await chain.head()).block.height == 8
            clock.advance(BACKOFF[0])
            assert (await chain.head()).block.height == 7
