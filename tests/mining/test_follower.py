"""The loop that looks at the chain, with time given by the test."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import pytest
import structlog
from structlog.testing import capture_logs

from pocd.chain.source import Block, ChainError, Head
from pocd.mining.follower import JITTER, LAG, ChainHealth, follow
from pocd.store.errors import StoreUnavailableError
from tests.support.clocks import NOW, ManualClock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from structlog.typing import FilteringBoundLogger


class PlayedOutError(Exception):
    """The script has no more answers."""


class Play:
    """A source, a clock, a sleep and a listener, played from a script of answers, one for each poll."""

    reorganises = False

    def __init__(
        self, script: Sequence[Head | Exception], *, seconds_per_poll: float = 0.0, set_by: float = 0.0
    ) -> None:
        self.script = list(script)
        self.seconds_per_poll = seconds_per_poll
        self.set_by = set_by  # at each poll, the wall clock alone
        self.clock = ManualClock()
        self.waits: list[float] = []
        self.heads: list[Head] = []
        self.refuse: Exception | None = None
        self.problems: list[str | None] = []
        self.health = ChainHealth()
        self.jitter = 0.0

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.clock.advance(seconds)
        if not self.script:
            raise PlayedOutError

    async def head(self) -> Head:
        self.clock.advance(self.seconds_per_poll)
        self.clock.now += self.set_by
        answer = self.script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def block(self, height: int) -> Block:
        raise AssertionError(f"the follower asks for no block, but did for {height}")

    async def on_head(self, head: Head) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.heads.append(head)

    async def run(self, poll_interval: float = 5.0) -> list[tuple[str, str]]:
        """Play the script to its end; the log's records as (level, action)."""
        with capture_logs() as records:
            try:
                await follow(
                    self,
                    poll_interval=poll_interval,
                    on_head=self.on_head,
                    health=self.health,
                    log=cast("FilteringBoundLogger", structlog.get_logger()),
                    clock=self.clock,
                    jitter=lambda: self.jitter,
                    on_problem=self.problems.append,
                    sleep=self.sleep,
                )
            except PlayedOutError:
                return [(record["log_level"], record["action"]) for record in records]
            raise AssertionError("the loop ended")


def head_at(height: int, *, age: float = 0.0, catching_up: bool = False) -> Head:
    time = datetime.fromtimestamp(NOW - age, UTC)
    return Head(Block("chain", height, f"HASH{height}", time), catching_up)


async def test_every_head_is_passed_on_changed_or_not() -> None:
    play = Play([head_at(1), head_at(1), head_at(2)])
    assert await play.run() == []
    assert play.heads == [head_at(1), head_at(1), head_at(2)]
    assert play.health == ChainHealth(head_at(2), seen_at=NOW + 10, error=None, failures=0, highest=2)


async def test_the_wait_is_the_interval_less_the_time_spent() -> None:
    play = Play([head_at(1)] * 2, seconds_per_poll=2.0)
    await play.run()
    assert play.waits == [3.0, 3.0]


@pytest.mark.parametrize("jitter", [-1.0, 0.5, 1.0])
async def test_the_interval_varies_from_host_to_host(jitter: float) -> None:
    play = Play([head_at(1)], seconds_per_poll=2.0)
    play.jitter = jitter
    await play.run()
    assert play.waits == [pytest.approx(5.0 * (1 + JITTER * jitter) - 2.0)]


async def test_the_wait_is_never_negative() -> None:
    play = Play([head_at(1)], seconds_per_poll=7.0)
    await play.run()
    assert play.waits == [0.0]


async def test_a_clock_set_back_does_not_stop_the_polls() -> None:
    play = Play([head_at(1)], set_by=-3600.0)
    await play.run()
    assert play.waits == [5.0]


async def test_a_failure_is_noted_and_forgotten() -> None:
    play = Play([head_at(1), ChainError("refused"), ChainError("timeout")])
    await play.run()
    assert play.health == ChainHealth(head_at(1), seen_at=NOW, error="timeout", failures=2, highest=1)
    play.script = [head_at(2)]
    await play.run()
    assert play.health == ChainHealth(head_at(2), seen_at=NOW + 15, error=None, failures=0, highest=2)


async def test_log_lines_down_at_most_one_a_minute_and_restored() -> None:
    down, restored = ("warning", "chain_down"), ("info", "chain_restored")
    play = Play([head_at(1)] + [ChainError("refused")] * 25 + [head_at(2)] * 3 + [ChainError("refused")] * 2)
    # 25 failures 5 s apart: at 0, 60 and 120 s.
    assert await play.run() == [down, down, down, restored, down]


async def test_log_goes_on_after_the_clock_was_set_back() -> None:
    play = Play([ChainError("refused")] * 13, set_by=-3600.0)  # 5 s apart
    assert len(await play.run()) == 2


async def test_an_error_of_the_listener_is_a_failed_poll() -> None:
    play = Play([head_at(1), head_at(2)])
    play.refuse = ChainError("block 2 is pruned")
    assert await play.run() == [("warning", "chain_down")]
    assert play.health == ChainHealth(head_at(2), seen_at=None, error="block 2 is pruned", failures=2, highest=2)
    assert play.health.problem(play.clock.now, 5.0) == "no good answer from the chain yet: block 2 is pruned"


async def test_a_store_that_is_full_is_a_failed_poll() -> None:
    play = Play([head_at(1)])
    play.refuse = StoreUnavailableError("store x.db: disk full")
    assert await play.run() == [("warning", "chain_down")]
    assert play.health.error == "store x.db: disk full"
    play.refuse, play.script = None, [head_at(2)]
    await play.run()
    assert play.health.error is None


async def test_log_lines_degraded_and_well_again_once_each() -> None:
    degraded, well, down = ("warning", "chain_degraded"), ("info", "chain_well"), ("warning", "chain_down")
    behind, stale = head_at(2, catching_up=True), head_at(2, age=900)
    play = Play([head_at(1), behind, behind, stale, head_at(9), head_at(6), head_at(5), head_at(9)])
    assert await play.run() == [degraded, well, degraded]  # for how long it is well has to be seen
    play = Play([behind, ChainError("refused"), behind, head_at(3)])
    assert await play.run() == [degraded, down, ("info", "chain_restored"), well]


async def test_a_chain_that_flaps_is_few_lines_of_log() -> None:
    degraded, well = ("warning", "chain_degraded"), ("info", "chain_well")
    down, restored = ("warning", "chain_down"), ("info", "chain_restored")
    play = Play([head_at(2), head_at(2, catching_up=True)] * 50 + [head_at(2)] * 14)
    assert await play.run() == [degraded, well, degraded, well]
    assert len(play.problems) == 4
    flapping: list[Head | Exception] = [head_at(2), ChainError("refused")]
    play = Play([*flapping * 6, *[head_at(2)] * 14])  # 60 s
    assert await play.run() == [down, restored, down, restored]


async def test_a_problem_is_told_when_it_begins_and_when_it_ends() -> None:
    down = ChainError("down")
    play = Play([head_at(1), down, down, down, down, head_at(2), head_at(3, catching_up=True)])
    await play.run(poll_interval=10.0)
    assert play.problems == ["last good answer 40 s ago: down", None, "the node is catching up, at height 3"]


async def test_the_highest_head_is_remembered() -> None:
    play = Play([head_at(9), head_at(5)])
    await play.run()
    assert play.health.highest == 9
    assert play.health.problem(play.clock.now, 5.0) == (
        "the node's newest block, 5, is below 9, which was seen before: "
        "it lags, or the chain was reset (then use another store.path)"
    )
    assert ChainHealth(head_at(5), NOW, highest=5 + LAG).problem(NOW, 5.0) is None


async def test_a_head_that_corrects_a_lie_is_the_highest() -> None:
    play = Play([head_at(10_000), Head(head_at(5).block, catching_up=False, corrects=True)])
    await play.run()
    assert play.health.highest == 5
    assert play.health.problem(play.clock.now, 5.0) is None


async def test_a_head_that_is_catching_up_is_not_passed_on() -> None:
    play = Play([head_at(1, catching_up=True), head_at(2)])
    await play.run()
    assert play.heads == [head_at(2)]
    play = Play([head_at(1, catching_up=True)])
    await play.run()
    assert play.health.problem(NOW, 5.0) == "the node is catching up, at height 1"


async def test_a_bug_is_not_hidden() -> None:
    play = Play([ZeroDivisionError()])
    with pytest.raises(ZeroDivisionError):
        await play.run()


@pytest.mark.parametrize(
    ("health", "after", "problem"),
    [
        (ChainHealth(), 0.0, "no good answer from the chain yet"),
        (ChainHealth(error="refused", failures=1), 0.0, "no good answer from the chain yet: refused"),
        (ChainHealth(head_at(1), NOW), 5.0, None),
        (ChainHealth(head_at(1), NOW, "timeout", 1), 30.0, None),
        (ChainHealth(head_at(1), NOW, "timeout", 6), 31.0, "last good answer 31 s ago: timeout"),
        (ChainHealth(head_at(1), NOW), 31.0, "last good answer 31 s ago"),
        (ChainHealth(head_at(1, catching_up=True), NOW), 0.0, "the node is catching up, at height 1"),
        (ChainHealth(head_at(1, age=600), NOW), 0.0, None),
        (
            ChainHealth(head_at(1, age=601), NOW),
            0.0,
            "the newest block, 1, is 601 s old: the node lags or the chain stands",
        ),
    ],
)
def test_problem(health: ChainHealth, after: float, problem: str | None) -> None:
    assert health.problem(NOW + after, 5.0) == problem


def test_the_interval_and_the_age_are_the_callers() -> None:
    health = ChainHealth(head_at(1), NOW)
    assert health.problem(NOW + 180, 60.0) is None
    assert health.problem(NOW + 181, 60.0) == "last good answer 181 s ago"
    assert health.problem(NOW + 11, 5.0, stale_after=10.0) is not None
