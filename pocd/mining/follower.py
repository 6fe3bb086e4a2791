"""The loop that polls the chain, and the chain's health.

Level-triggered: every look reports the whole head, changed or not, so that a missed block or an outage needs no
catching up. What should run is a pure function of the head (docs/protocol.md section 8).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocd.chain.source import STALE_AFTER, ChainError, ChainSource, Head
from pocd.observe.levels import Level
from pocd.store.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.protocol.epochs import Stage

LAG = 3
"""Blocks below the highest one seen that are no sign of a node that lags: balanced public nodes differ by a few."""

LOG_EVERY = 60.0
"""Seconds between two log lines while the chain is down."""

JITTER = 0.2
"""Share of the interval by which polls vary, either way: else hosts that began together would go on asking together."""


@dataclass(frozen=True, slots=True)
class EpochState:
    """The live network's epoch, by the chain's newest answer.

    Attributes:
        number: Number of the epoch.
        stage: What is due.
        refused: Why the round that is due is not mined; None where it is.
        accepted: The last height at which its artifacts are accepted, by the height that a round is called by; rounds
            that are not in it are over.
    """

    number: int
    stage: Stage
    refused: str | None
    accepted: Mapping[int, int]


@dataclass(slots=True)
class ChainHealth:
    """Health of the chain by the last polls; the follower writes it, the admin API and the metrics read it.

    Attributes:
        head: The newest head that was read, also one that is catching up.
        seen_at: Unix time in seconds of the last poll that succeeded.
        error: Error of the last poll; None when it succeeded.
        failures: Number of polls that failed since the last good one.
        highest: The highest head ever seen, also before this daemon's start, less those that were lies.
        epoch: Epoch of the live network; None on other chains, and until the chain tells.
        followed: Whether there is a chain to follow; a proof engine may have none, and no problem with it.
    """

    head: Head | None = None
    seen_at: float | None = None
    error: str | None = None
    failures: int = 0
    highest: int = 0
    epoch: EpochState | None = None
    followed: bool = True

    def problem(self, now: float, poll_interval: float, stale_after: float = STALE_AFTER) -> str | None:
        """Return why the chain is degraded; None when it is well (docs/protocol.md section 8).

        Args:
            now: Unix time in seconds.
            poll_interval: Seconds between polls; three missed ones (or 30 s, if that is longer) are a problem.
            stale_after: Seconds; a newest block older than this means a node that lags without saying so.
        """
        if not self.followed:
            return None
        because = f": {self.error}" if self.error else ""
        if self.head is None or self.seen_at is None:
            return f"no good answer from the chain yet{because}"
        # One poll with its retries may take 15 s, so a short interval alone is no measure.
        if now - self.seen_at > max(3 * poll_interval, 30.0):
            return f"last good answer {now - self.seen_at:.0f} s ago{because}"
        if self.head.catching_up:
            return f"the node is catching up, at height {self.head.block.height}"
        if self.head.block.height < self.highest - LAG:
            return (
                f"the node's newest block, {self.head.block.height}, is below {self.highest}, which was seen before: "
                "it lags, or the chain was reset (then use another store.path)"
            )
        age = now - self.head.block.time.timestamp()
        stale = f"the newest block, {self.head.block.height}, is {age:.0f} s old: the node lags or the chain stands"
        return stale if age > stale_after else None


async def follow(
    source: ChainSource,
    *,
    poll_interval: float,
    on_head: Callable[[Head], Awaitable[None]],
    health: ChainHealth,
    log: FilteringBoundLogger,
    clock: Clock,
    jitter: Callable[[], float],
    on_problem: Callable[[str | None], None] = lambda _problem: None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Poll `source` until cancelled and pass every head on (docs/protocol.md section 8).

    A head that is catching up is noted in `health` but not passed on. A `ChainError`, of the source or of `on_head`,
    is a failed poll: noted, logged, and forgotten at the next good one; so is a store that cannot take what `on_head`
    has for it. Any other exception is a bug and ends the loop.

    Args:
        source: Source of heads; its calls must be bounded in time.
        poll_interval: Seconds from the start of one poll to the start of the next on average, if polls take no longer.
        on_head: Called after every good answer, also when the head is the same as before.
        health: Updated in place.
        log: Gets a line when the chain goes down, one a minute while it is, and one when it is restored; also one when
            a chain that answers is degraded, and one when it is well again. What flaps is well again after a minute.
        clock: Paces the polls by its monotonic clock, and dates them by its wall clock.
        jitter: Uniformly random in [-1, 1].
        on_problem: Called with the text when `health` has a problem, and with None when it is well again.
        sleep: Waits that many seconds.
    """
    down, degraded, unwell = Level(), Level(), Level()
    logged_at = 0.0  # when the chain was last said to be down
    while True:
        started = clock.monotonic()
        await _poll(source, on_head, health, clock)
        now = clock.monotonic()
        problem = health.problem(clock.wall(), poll_interval)
        turn = down.look(now, bad=health.error is not None)
        if turn == "worse" or (health.error is not None and now - logged_at >= LOG_EVERY):
            log.warning("chain not followed", action="chain_down", error=health.error, failures=health.failures)
            logged_at = now
        elif turn == "better":
            log.info("chain restored", action="chain_restored", times=down.times)
        if health.error is None:
            turn = degraded.look(now, bad=problem is not None)
            if turn == "worse":
                log.warning("chain degraded", action="chain_degraded", problem=problem)
            elif turn == "better":
                log.info("chain well again", action="chain_well", times=degraded.times)
        if unwell.look(now, bad=problem is not None):
            on_problem(problem)
        await sleep(max(poll_interval * (1 + JITTER * jitter()) - (now - started), 0.0))


async def _poll(
    source: ChainSource,
    on_head: Callable[[Head], Awaitable[None]],
    health: ChainHealth,
    clock: Clock,
) -> None:
    try:
        head = await source.head()
        health.head = head
        health.highest = head.block.height if head.corrects else max(health.highest, head.block.height)
        if not head.catching_up:
            await on_head(head)
    except (ChainError, StoreUnavailableError) as error:
        health.error = str(error)
        health.failures += 1
    else:
        health.seen_at = clock.wall()
        health.error = None
        health.failures = 0
