"""The scheduler over a real store and a real miner: which round runs, held against a plain model."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from pocd.chain.evm import EVM
from pocd.chain.rpc import Rpc
from pocd.chain.source import Block, BlockUnavailableError, ChainError, ChainSource, Head
from pocd.clock import SYSTEM
from pocd.mining.control import Control
from pocd.mining.miner import Miner
from pocd.mining.scheduler import ALWAYS_HELD, DEEPEST, RoundScheduler
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.protocol.rounds import RoundPolicy
from pocd.store.batches import form_batches
from pocd.store.errors import StoreUnavailableError
from pocd.store.outbox import KnownChain, Outbox
from pocd.store.proofs import Weights
from pocd.store.rounds import recent_rounds
from pocd.store.thread import OutboxThread
from tests.support.anvil import needs_anvil, running_anvil
from tests.support.clocks import NOW, ManualClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from structlog.typing import FilteringBoundLogger

POLICY = RoundPolicy(every=5, offset=0, duration=3)


class Chain:
    """A chain that the test lengthens and reorganises, as one node sees it. Hashes say which fork made a block."""

    def __init__(self, height: int = 0, *, reorganises: bool = False) -> None:
        self.reorganises = reorganises
        self.forks = 0
        self.hashes: list[str] = []  # of heights 1, 2, 3, …
        self.asked: list[int] = []
        self.failing = False
        self.pruned_below = 1
        self.grow(height)

    def grow(self, height: int) -> None:
        """Lengthen the chain to `height`; one that is longer stays."""
        self.hashes += [f"{self.forks}:{new}" for new in range(len(self.hashes) + 1, height + 1)]

    def reorganise(self, depth: int) -> None:
        """Replace the newest `depth` blocks."""
        self.forks += 1
        height = len(self.hashes)
        del self.hashes[max(height - depth, 0) :]
        self.grow(height)

    async def block(self, height: int) -> Block:
        self.asked.append(height)
        if self.failing:
            raise ChainError("refused")
        return self.at(height)

    def at(self, height: int) -> Block:
        if not self.pruned_below <= height <= len(self.hashes):
            raise BlockUnavailableError(f"no block {height}")
        return Block("chain", height, self.hashes[height - 1], datetime.fromtimestamp(NOW, UTC))

    async def head(self) -> Head:
        return Head(self.at(len(self.hashes)), catching_up=False)


def round_of(block: Block, public_key: str = "miner") -> Round:
    return Round(block.hash, block.height, public_key, 1.4, "poc2", "tiny", 16)


class Scheduled:
    """A scheduler, its miner and its store, and how often what began."""

    def __init__(
        self, path: Path, chain: ChainSource, policy: RoundPolicy = POLICY, *, withdraw: bool, public_key: str = "miner"
    ) -> None:
        self.chain = chain
        self.outbox = OutboxThread(path)
        self.miner = Miner(self.outbox, Changes(), clock=ManualClock(), group_seconds=0)
        self.log = cast("FilteringBoundLogger", structlog.get_logger())
        self.control = Control(
            self.miner, self.outbox, Node(0, 1), runs={}, clock=ManualClock(), log=self.log, events=Events(SYSTEM)
        )
        self.scheduler = RoundScheduler(
            chain,
            self.control,
            self.outbox,
            policy=policy,
            make_round=lambda block: round_of(block, public_key),
            withdraw=withdraw,
            queued=self.miner.batchable,
            clock=ManualClock(),
            log=self.log,
        )

    def close(self) -> None:
        self.outbox.close()

    @property
    def mined(self) -> Round | None:
        return self.miner.mining.round if self.miner.mining else None

    async def look(self, head: Head | None = None) -> Round | None:
        """One look at `head`, or at the chain's own; returns what is mined after it."""
        await self.scheduler.on_head(head or await self.chain.head())
        return self.mined

    async def on_chain(self) -> list[Round]:
        """The rounds in the store that are not replaced."""
        return [round_ for round_, replaced in (await self.outbox(recent_rounds, 1000)).items() if not replaced]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def scheduled(
    path: Path, chain: ChainSource, policy: RoundPolicy = POLICY, *, withdraw: bool = True, public_key: str = "miner"
) -> closing[Scheduled]:
    return closing(Scheduled(path, chain, policy, withdraw=withdraw, public_key=public_key))


def actions(records: Sequence[object]) -> list[str]:
    return [cast("dict[str, str]", record)["action"] for record in records]


# The height that counts


async def test_a_round_begins_at_its_start_lives_and_ends(path: Path) -> None:
    chain = Chain()
    with scheduled(path, chain) as one, capture_logs() as records:
        mined = []
        for height in range(4, 12):
            chain.grow(height)
            round_ = await one.look()
            mined.append(round_ and round_.block_height)
    assert mined == [None, 5, 5, 5, None, None, 10, 10]
    assert chain.asked == []  # the head itself was the start
    assert actions(records) == ["round_begin", "round_end", "round_begin"]
    assert (records[0]["height"], records[0]["block_hash"], records[0]["by"]) == (5, "0:5", "chain")


async def test_a_round_whose_start_was_missed_is_found(path: Path) -> None:
    chain = Chain(7)
    with scheduled(path, chain) as one:
        assert await one.look() == round_of(chain.at(5))
    assert chain.asked == [5]


async def test_a_node_that_lags_ends_no_round_and_begins_none_that_is_over(path: Path) -> None:
    chain = Chain(11)
    with scheduled(path, chain) as one, capture_logs() as records:
        current = await one.look()
        assert current == round_of(chain.at(10))
        for height in (7, 7, 9, 4):
            assert await one.look(Head(chain.at(height), catching_up=False)) == current
        assert one.outbox.view.chain == KnownChain("chain", 11)
    assert actions(records) == ["round_begin", "head_back"]
    assert (records[1]["height"], records[1]["highest"], records[1]["round"]) == (7, 11, 10)


async def test_heights_that_go_back_and_forth_are_few_lines_of_log(path: Path) -> None:
    chain = Chain(11)
    with scheduled(path, chain) as one, capture_logs() as records:
        for _ in range(50):
            await one.look()
            await one.look(Head(chain.at(10), catching_up=False))
    assert actions(records) == ["round_begin", "head_back", "head_well", "head_back"]


async def test_two_spellings_of_one_hash_are_one_block(path: Path) -> None:
    chain = Chain(11, reorganises=True)
    chain.hashes[9] = "0xab"
    with scheduled(path, chain) as one, capture_logs() as records:
        mined = await one.look()
        chain.hashes[9] = "0xAB"
        assert await one.look() == mined
        chain.grow(15)
        await one.look()
    with scheduled(path, chain) as one:
        await one.look()
        assert mined in await one.on_chain()
    assert actions(records) == ["round_begin", "round_begin"]


async def test_a_head_that_corrects_a_lie_takes_its_place_also_across_a_restart(path: Path) -> None:
    chain = Chain(11)
    lie = Head(Block("chain", 10_000_003, "LIE", datetime.fromtimestamp(NOW, UTC)), catching_up=False)
    with scheduled(path, chain) as one:
        await one.look()
        assert await one.look(lie) is None
        assert await one.look() is None
        assert await one.look(Head(chain.at(11), catching_up=False, corrects=True)) == round_of(chain.at(10))
        assert one.outbox.view.chain == KnownChain("chain", 11)
    with scheduled(path, chain) as one:
        assert await one.look() == round_of(chain.at(10))


async def test_a_restart_behind_a_node_that_lags_begins_no_round_that_is_over(path: Path) -> None:
    chain = Chain(11)
    with scheduled(path, chain) as one:
        await one.look()
    behind = Chain(7)
    with scheduled(path, behind) as one:
        assert await one.look() is None
        assert behind.asked == []  # it cannot know block 10
        behind.grow(10)
        assert await one.look() == round_of(chain.at(10))


async def test_a_block_that_cannot_be_read_ends_what_is_over_and_begins_the_new_one_later(path: Path) -> None:
    chain = Chain(6)
    with scheduled(path, chain) as one:
        assert await one.look()
        chain.grow(11)
        chain.failing = True
        with pytest.raises(ChainError, match="refused"):
            await one.look()
        assert one.mined is None
        chain.failing = False
        assert await one.look() == round_of(chain.at(10))


async def test_the_head_is_remembered_only_when_it_rises(path: Path) -> None:
    chain = Chain(6)
    with scheduled(path, chain) as one:
        await one.look()
        known = one.outbox.view.chain
        await one.look()
        assert one.outbox.view.chain is known
        chain.grow(9)
        assert await one.look() is None
        assert one.outbox.view.chain == KnownChain("chain", 9)


@contextlib.contextmanager
def full(method: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that cannot take what `method` writes."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise StoreUnavailableError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Outbox, method.__name__, refuse)
        yield


@pytest.mark.parametrize("method", [Outbox.remember_head, Outbox.begin_round])
async def test_a_full_store_ends_what_is_over_and_loses_nothing(
    path: Path, method: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(6)
    with scheduled(path, chain) as one:
        await one.look()
        chain.grow(10)
        with full(method, monkeypatch), pytest.raises(StoreUnavailableError):
            await one.look()
        assert one.mined is None
        # What could not be written down is known all the same.
        assert await one.look(Head(chain.at(7), catching_up=False)) is None
        assert await one.look() == round_of(chain.at(10))


# Blocks that are replaced


async def test_a_replaced_block_takes_its_round_with_it(path: Path) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain) as one:
        old = await one.look()
        assert old == round_of(chain.at(10))
        chain.reorganise(3)
        with capture_logs() as records:
            new = await one.look()
        assert new == round_of(chain.at(10)) != old
        assert await one.on_chain() == [new]
        assert actions(records) == ["round_replaced", "round_begin"]
        replaced = records[0]
        assert (replaced["height"], replaced["block_hash"], replaced["new_block_hash"]) == (10, "0:10", "1:10")
        assert await one.look() == new  # and nothing more happens
        assert await one.on_chain() == [new]
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM rounds WHERE replaced IS NOT NULL").fetchone() == (1,)


async def test_all_rounds_of_a_deep_reorganisation_are_replaced_also_those_that_are_over(path: Path) -> None:
    chain = Chain(reorganises=True)
    with scheduled(path, chain) as one:
        for height in range(1, 27):
            chain.grow(height)
            await one.look()
        assert [round_.block_height for round_ in await one.on_chain()] == [25, 20, 15, 10, 5]
        chain.reorganise(9)
        chain.grow(31)  # the head is beyond the next round's start
        chain.asked.clear()
        assert await one.look() == round_of(chain.at(30))
        assert [round_.block_height for round_ in await one.on_chain()] == [30, 15, 10, 5]
        assert chain.asked == [25, 20, 15, 30]  # 15 is on the chain, so 10 and 5 are


async def test_a_block_that_comes_back_takes_up_its_round_again(path: Path) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain) as one:
        first = await one.look()
        hashes = list(chain.hashes)
        chain.reorganise(3)
        second = await one.look()
        assert second != first
        chain.hashes = hashes
        assert await one.look() == first
        assert await one.on_chain() == [first]


async def test_a_block_that_comes_back_while_its_round_is_being_computed(path: Path) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain) as one:
        first = await one.look()
        lease = await one.miner.lease(1)
        hashes = list(chain.hashes)
        chain.reorganise(3)
        await one.look()
        chain.hashes = hashes
        assert await one.look() == first
        assert await one.on_chain() == [first]
        await one.miner.complete(lease, [1.0], Weights("f00d", "float32"))
        assert (await one.miner.lease(1)).span.start == 1  # it goes on where it was


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_block_that_comes_back_after_its_round_gives_back_what_was_withdrawn(
    path: Path,
    restarted: bool,  # noqa: FBT001 - a parameter
) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain) as one:
        first = await one.look()
        await one.miner.complete(await one.miner.lease(1), [1.0], Weights("f00d", "float32"))
        await one.outbox(form_batches, ["one"], size=1, age=0.0, now=NOW, current=None)
        hashes = list(chain.hashes)
        chain.reorganise(3)
        second = await one.look()
        assert one.outbox.view.queues["one"].withdrawn_batches == 1
        chain.hashes = hashes
        chain.grow(14)  # between two rounds
        if not restarted:
            seen = one.miner.batchable.count
            with capture_logs() as records:
                assert await one.look() is None
            assert actions(records) == ["round_replaced", "round_reinstated", "round_end"]
            assert one.miner.batchable.count > seen, "whoever delivers is told"
    with scheduled(path, chain) as one:
        chain.grow(13 + (DEEPEST + 10 if restarted else 0))
        await one.look()
        assert first in await one.on_chain()
        assert second not in await one.on_chain()
        assert one.outbox.view.queues["one"].withdrawn_batches == 0
        assert one.outbox.view.queues["one"].pending_batches == 1


async def test_a_block_that_comes_back_below_a_round_that_stayed_is_found(path: Path) -> None:
    """A node on another fork has a lower head: the round above it is not compared with that fork."""
    chain = Chain(reorganises=True)
    with scheduled(path, chain) as one:
        for height in (6, 11, 16):
            chain.grow(height)
            await one.look()
        before = await one.on_chain()
        fork = Chain(reorganises=True)
        fork.forks = 7
        fork.grow(13)
        chain.hashes, hashes = fork.hashes, chain.hashes
        await one.look()
        assert [round_.block_height for round_ in await one.on_chain()] == [15]
        chain.hashes = hashes
        await one.look()
        assert await one.on_chain() == before


async def test_a_replaced_block_is_asked_for_until_it_cannot_come_back(path: Path) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain) as one:
        await one.look()
        chain.reorganise(3)
        await one.look()
        asked = []
        for height in (15, 10 + DEEPEST - 1, 10 + DEEPEST, 10 + DEEPEST + 1):
            chain.grow(height)
            chain.asked.clear()
            await one.look()
            asked.append(list(chain.asked))
    assert asked == [[10], [15, 10], [265, 10], [265]]


async def test_rounds_of_another_key_at_the_same_height_are_no_replacement(path: Path) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain) as one:
        first = await one.look()
    with scheduled(path, chain, public_key="other") as one:
        second = await one.look()
        assert second is not None
        assert second.public_key == "other"
        assert await one.on_chain() == [second, first]
        chain.reorganise(2)
        third = await one.look()
        assert await one.on_chain() == [third]


async def test_a_chain_that_does_not_reorganise_is_not_compared(path: Path) -> None:
    chain = Chain(11)
    with scheduled(path, chain) as one:
        await one.look()
        chain.asked.clear()
        await one.look()
    assert chain.asked == []


async def test_a_node_behind_the_round_says_nothing_about_it(path: Path) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain) as one:
        mined = await one.look()
        chain.reorganise(3)
        chain.asked.clear()
        assert await one.look(Head(chain.at(9), catching_up=False)) == mined
        assert chain.asked == []
        assert await one.on_chain() == [mined]


async def test_blocks_that_are_pruned_are_believed_but_not_those_near_the_head(path: Path) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain) as one:
        old = await one.look()
        chain.pruned_below = 11
        with pytest.raises(BlockUnavailableError, match="no block 10"):
            await one.look()
        assert one.mined == old  # nothing is known against it
        chain.grow(10 + ALWAYS_HELD + 2)
        new = await one.look()
        assert new == round_of(chain.at(140))
        assert await one.on_chain() == [new, old]


async def test_older_rounds_are_compared_before_a_new_one_begins_or_it_does_not(path: Path) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain) as one:
        old = await one.look()
        chain.reorganise(3)
        chain.grow(15)
        chain.pruned_below = 11  # a node behind a balancer that has not got it yet
        with pytest.raises(BlockUnavailableError, match="no block 10"):
            await one.look()
        assert one.mined is None
        chain.pruned_below = 1
        new = await one.look()
        assert new == round_of(chain.at(15))
        assert old not in await one.on_chain()


@pytest.mark.parametrize("withdraw", [True, False])
async def test_what_a_replaced_round_found_is_withdrawn_where_that_is_wanted(
    path: Path,
    withdraw: bool,  # noqa: FBT001 - a parameter
) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain, withdraw=withdraw) as one:
        await one.look()
        await one.miner.complete(await one.miner.lease(1), [1.0], Weights("f00d", "float32"))
        await one.outbox(form_batches, ["one"], size=1, age=0.0, now=NOW, current=None)
        chain.reorganise(3)
        await one.look()
        queue = one.outbox.view.queues["one"]
    assert (queue.pending_batches, queue.withdrawn_batches) == ((0, 1) if withdraw else (1, 0))


async def test_a_store_that_is_full_in_the_middle_of_a_replacement_is_made_good_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(11, reorganises=True)
    with scheduled(path, chain) as one:
        old = await one.look()
        chain.reorganise(3)
        with full(Outbox.begin_round, monkeypatch), pytest.raises(StoreUnavailableError):
            await one.look()
        assert one.mined is None
        assert await one.on_chain() == []
        new = await one.look()
        assert new not in {old, None}
        assert await one.on_chain() == [new]


# Against a plain model


@st.composite
def policies(draw: st.DrawFn) -> RoundPolicy:
    every = draw(st.integers(1, 8))
    return RoundPolicy(every, draw(st.integers(0, every - 1)), draw(st.integers(1, every)))


def alive_at(height: int, policy: RoundPolicy) -> int | None:
    """The start of the round that lives at `height`, found by walking back."""
    starts = range(height, max(height - policy.duration, 0), -1)
    return next((start for start in starts if start % policy.every == policy.offset), None)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("head"), st.integers(1, 40)),  # the node is at that height
        st.tuples(st.just("unreadable"), st.integers(1, 40)),  # and no other block can be read
        st.tuples(st.just("restart"), st.just(0)),
        st.tuples(st.just("reorganise"), st.integers(1, 12)),
    ),
    max_size=25,
)


async def play(path: Path, policy: RoundPolicy, steps: Sequence[tuple[str, int]], *, reorganises: bool) -> None:
    chain = Chain(40, reorganises=reorganises)
    highest = 0
    one = Scheduled(path, chain, policy, withdraw=True)
    try:
        for step, number in steps:
            if step == "restart":
                one.close()
                one = Scheduled(path, chain, policy, withdraw=True)
                continue
            if step == "reorganise":
                if reorganises:
                    chain.reorganise(number)
                continue
            highest = max(highest, number)
            alive = alive_at(highest, policy)
            before = one.mined
            chain.failing = step == "unreadable"
            try:
                mined = await one.look(Head(chain.at(number), catching_up=False))
            except ChainError:
                # Nothing that is over goes on, and what is alive is not dropped.
                keeps = before is not None and before.block_height == alive
                assert one.mined == (before if keeps else None)
                continue
            if alive is None:
                assert mined is None, "nothing is alive"
            elif alive <= number:
                assert mined == round_of(chain.at(alive)), "what is alive is mined"
            else:
                assert mined is None or (mined == before and mined.block_height == alive), "nothing else is"
            if reorganises:
                for round_ in await one.on_chain():
                    assert round_.block_height > number or round_ == round_of(chain.at(round_.block_height))
    finally:
        one.close()


@settings(max_examples=150)
@given(policy=policies(), steps=STEPS, reorganises=st.booleans())
def test_no_round_that_is_over_and_none_missed_that_is_alive(
    policy: RoundPolicy,
    steps: Sequence[tuple[str, int]],
    reorganises: bool,  # noqa: FBT001 - a strategy gives it
) -> None:
    with tempfile.TemporaryDirectory() as folder, capture_logs():
        asyncio.run(play(Path(folder) / "store.db", policy, steps, reorganises=reorganises))


# A real node


@needs_anvil
async def test_a_real_reorganisation(path: Path) -> None:
    async with running_anvil() as anvil:
        node = EVM(Rpc(anvil.session, anvil.url), confirmations=2)
        with scheduled(path, node) as one:
            await anvil.mine(13)
            old = await one.look()
            assert old == round_of(await node.block(10))
            await anvil.reorganise(2)  # blocks 12 and 13
            assert await one.look() == old
            await anvil.reorganise(5)
            new = await one.look()
            assert new == round_of(await node.block(10)) != old
            assert await one.on_chain() == [new]
            await anvil.mine(3)
            assert (await one.look()) is None
