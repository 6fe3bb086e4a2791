"""The scheduler of the live network's rounds, over the development chain, a real store and a real miner."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from pocd.chain.source import Block, BlockUnavailableError, ChainError, Head
from pocd.clock import SYSTEM
from pocd.dev.chain import DevChain
from pocd.dev.epochs import WINDOWS, EpochChain
from pocd.mining.control import Control
from pocd.mining.epochs import EpochScheduler, EpochWatcher
from pocd.mining.follower import ChainHealth
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.protocol.epochs import LiveScheme, Phase, Recipe
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.store.thread import OutboxThread
from tests.support.clocks import ManualClock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from structlog.typing import FilteringBoundLogger

    from pocd.protocol.epochs import EpochInfo

FIRST = 1000
BLOCKS = DevChain("seed", block_seconds=5.0, genesis=1_700_000_000.0, first_height=FIRST)
CONFIRMED = 31  # blocks after the start of each epoch

SCHEME_OF = {False: "artifacts", True: "artifacts-256"}


def round_of(block: Block, recipe: Recipe, stronger_rng: bool) -> Round:  # noqa: FBT001 - as the scheduler calls it
    return Round(block.hash, block.height, "02b463", 1.4, SCHEME_OF[stronger_rng], recipe.model, recipe.seq_len)


class DevNode:
    """A node of the development chain, at the height that the test sets."""

    def __init__(self) -> None:
        self.chain = EpochChain(BLOCKS, "tiny", 32)
        self.height = FIRST
        self.said_at: int | None = None  # height of an older answer
        self.silent = False

    async def epoch_info(self) -> EpochInfo:
        if self.silent:
            raise ChainError("refused")
        return replace(self.chain.info(self.said_at or self.height), recipes=self._recipes())

    def _recipes(self) -> tuple[Recipe, ...]:
        return (Recipe("tiny", self.chain.scheme, self.chain.seq_len, None),)

    async def block(self, height: int) -> Block:
        if not FIRST <= height <= self.height:
            raise BlockUnavailableError(f"no block {height}")
        return self.at(height)

    def at(self, height: int) -> Block:
        time = datetime.fromtimestamp(BLOCKS.block_time(height), UTC)
        return Block("pocd-dev", height, BLOCKS.block_hash(height), time)


class Scheduled:
    """A scheduler with its control, miner and store, and what it made run."""

    def __init__(self, path: Path, node: DevNode) -> None:
        self.node = node
        self.outbox = OutboxThread(path)
        log = cast("FilteringBoundLogger", structlog.get_logger())
        self.miner = Miner(self.outbox, Changes(), clock=ManualClock())
        self.control = Control(
            self.miner, self.outbox, Node(0, 1), runs={}, clock=ManualClock(), log=log, events=Events(SYSTEM)
        )
        self.health = ChainHealth()
        self.scheduler = EpochScheduler(
            node,
            EpochWatcher(node, health=self.health, models=["tiny"], log=log),
            self.control,
            self.outbox,
            make_round=round_of,
            clock=ManualClock(),
            log=log,
        )

    async def look(self, height: int) -> Round | None:
        """Look at a head, and return the round that runs then."""
        self.node.height = max(self.node.height, height)
        await self.scheduler.on_head(Head(self.node.at(height), catching_up=False))
        assert (self.miner.mining.round if self.miner.mining else None) == self.control.chain_round
        return self.control.chain_round

    def close(self) -> None:
        self.outbox.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def scheduled(path: Path) -> Iterator[Scheduled]:
    with contextlib.closing(Scheduled(path, DevNode())) as one:
        yield one


def named(height: int) -> tuple[int, str]:
    """The height and the hash of the round that is due at `height`, by the development chain's plan."""
    epoch, offset = divmod(height - FIRST, WINDOWS.epoch)
    start = FIRST + epoch * WINDOWS.epoch
    if offset < 8:
        return start, BLOCKS.block_hash(start)
    if CONFIRMED + 2 <= offset < CONFIRMED + 12:
        return start + CONFIRMED, BLOCKS.block_hash(start + CONFIRMED + 2).lower()
    return 0, ""


def confirm(node: DevNode, heights: Iterable[int]) -> None:
    """Announce the confirmation rounds whose heights have come."""
    for height in heights:
        if (height - FIRST) % WINDOWS.epoch == CONFIRMED:
            node.chain.confirm(height)


async def test_the_rounds_of_two_epochs(scheduled: Scheduled) -> None:
    for height in range(FIRST, FIRST + 2 * WINDOWS.epoch):
        confirm(scheduled.node, [height])
        found = await scheduled.look(height)
        assert (found.block_height, found.block_hash) == named(height) if found else named(height) == (0, ""), height
        assert found is None or (found.seq_len, found.scheme) == (32, SCHEME_OF[False])
        assert scheduled.health.epoch is not None
        assert scheduled.health.epoch.number == 1 + (height - FIRST) // WINDOWS.epoch


@settings(max_examples=30)
@given(st.sets(st.integers(FIRST, FIRST + 2 * WINDOWS.epoch - 1), min_size=1), st.data())
async def test_missed_blocks_and_restarts_change_no_round(seen: set[int], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        node, path = DevNode(), Path(folder) / "store.db"
        scheduled, before = Scheduled(path, node), FIRST - 1
        try:
            for height in sorted(seen):
                confirm(node, range(before + 1, height + 1))
                before = height
                if data.draw(st.booleans()):
                    scheduled.close()
                    scheduled = Scheduled(path, node)
                found = await scheduled.look(height)
                assert (found.block_height, found.block_hash) == named(height) if found else named(height) == (0, "")
        finally:
            scheduled.close()


async def test_a_round_goes_on_to_its_last_block_while_the_chain_says_nothing(scheduled: Scheduled) -> None:
    running = await scheduled.look(FIRST + 2)
    assert running is not None
    scheduled.node.silent = True
    for height in range(FIRST + 3, FIRST + 10):
        with pytest.raises(ChainError, match="refused"):
            await scheduled.look(height)
        assert scheduled.control.chain_round == (running if height < FIRST + 8 else None), height


async def test_where_the_chain_never_said_anything_nothing_runs(scheduled: Scheduled) -> None:
    scheduled.node.silent = True
    with pytest.raises(ChainError):
        await scheduled.look(FIRST)
    assert scheduled.control.chain_round is None
    assert scheduled.health.epoch is None


async def test_an_older_answer_ends_no_confirmation_round(scheduled: Scheduled) -> None:
    await scheduled.look(FIRST + 29)
    scheduled.node.chain.confirm(FIRST + CONFIRMED)
    running = await scheduled.look(FIRST + CONFIRMED + 2)
    assert running is not None
    scheduled.node.said_at = FIRST + 29
    assert await scheduled.look(FIRST + CONFIRMED + 3) == running


async def test_a_lagging_head_ends_no_round_and_brings_none_back(scheduled: Scheduled) -> None:
    running = await scheduled.look(FIRST + 4)
    assert await scheduled.look(FIRST + 1) == running
    assert await scheduled.look(FIRST + 8) is None
    scheduled.node.said_at = FIRST + 4
    assert await scheduled.look(FIRST + 4) is None


async def test_a_round_that_runs_keeps_its_parameters(scheduled: Scheduled) -> None:
    running = await scheduled.look(FIRST)
    scheduled.node.chain.seq_len, scheduled.node.chain.stronger_rng = 64, True
    assert await scheduled.look(FIRST + 1) == running
    following = await scheduled.look(FIRST + WINDOWS.epoch)
    assert following is not None
    assert (following.seq_len, following.scheme) == (64, SCHEME_OF[True])


@pytest.mark.parametrize("name", ["scheme", "model"])
async def test_what_pocd_does_not_compute_is_refused_by_name_once_and_told(scheduled: Scheduled, name: str) -> None:
    if name == "scheme":
        scheduled.node.chain.scheme = LiveScheme.DECODE
    else:
        scheduled.scheduler._watcher._models = ["other"]
    with capture_logs() as logs:
        for height in (FIRST, FIRST + 1):
            assert await scheduled.look(height) is None
    (line,) = [entry for entry in logs if entry["action"] == "round_refused"]
    assert scheduled.health.epoch is not None
    refused = scheduled.health.epoch.refused
    assert refused is not None
    assert refused == line["cause"]
    assert ("POC_SCHEME_DECODE, which pocd does not compute" if name == "scheme" else "model 'other'") in refused
    assert scheduled.health.epoch.stage.phase is Phase.GENERATE
