"""Checks of the chain's nodes, and of this host's clock against the time of their blocks."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocd.chain.source import STALE_AFTER, ChainError, Head
from pocd.check.finding import Finding, green, red, yellow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pocd.chain.source import ChainSource

LOOK_BACK = 10  # blocks, from which follows how often one is made
CLOCK_OFF = 10.0  # seconds, either way, that are worth a look
CLOCK_WRONG = 60.0  # seconds that no block is made ahead of time
SYNCHRONISE = "keep the clock by NTP: timedatectl set-ntp true (systemd-timesyncd), or chrony; then chronyc tracking"


@dataclass(frozen=True, slots=True)
class Expected:
    """The chain that the nodes have to be on.

    Attributes:
        chain_id: The chain's id; None where the first node that answers decides.
        by: What names the chain: "chain.id" or "the store".
    """

    chain_id: str | None
    by: str


def expected(configured: str | None, of_store: str | None) -> Expected | Finding:
    """Return the expected chain, or a finding where the configuration and the store disagree."""
    if configured is not None and of_store not in {None, configured}:
        return red(
            "chain",
            f"chain.id is {configured}, but the store belongs to chain {of_store}",
            "correct chain.id; another chain needs another store.path",
        )
    return Expected(configured or of_store, "chain.id" if configured else "the store")


async def check_chain(
    sources: Sequence[ChainSource],
    wanted: Expected,
    *,
    confirmations: int,
    wall: Callable[[], float],
    limit: float,
) -> list[Finding]:
    """Ask every node for its head, at the same time, each for `limit` seconds at most.

    Args:
        sources: The nodes; findings name each by `str`.
        wanted: The expected chain.
        confirmations: How many blocks the head is behind the newest one.
        wall: This host's clock, Unix time in seconds.
        limit: Seconds for each node to answer.
    """
    answers = await asyncio.gather(*(_head(source, limit) for source in sources))
    heads = [(source, answer) for source, answer in zip(sources, answers, strict=True) if isinstance(answer, Head)]
    now = wall()
    findings = judge_nodes(dict(zip(map(str, sources), answers, strict=True)), wanted, now)
    if not heads:
        return [*findings, yellow("clock", "no block to hold it against: no node answers", "mend the chain first")]
    source, newest = max(heads, key=lambda pair: pair[1].block.time)
    interval = await seconds_a_block(source, newest, limit)
    return [*findings, judge_clock(newest, now, behind=(confirmations + 2) * interval)]


async def _head(source: ChainSource, limit: float) -> Head | ChainError:
    try:
        async with asyncio.timeout(limit):
            return await source.head()
    except TimeoutError:
        return ChainError(f"{source}: no answer within {limit:g} s")
    except ChainError as error:
        return error


async def seconds_a_block(source: ChainSource, head: Head, limit: float) -> float:
    """Return the seconds between blocks; 0 where the node does not hold an earlier one."""
    height = max(1, head.block.height - LOOK_BACK)
    if height == head.block.height:
        return 0.0
    try:
        async with asyncio.timeout(limit):
            earlier = await source.block(height)
    except (TimeoutError, ChainError):
        return 0.0
    return (head.block.time - earlier.time).total_seconds() / (head.block.height - height)


def judge_nodes(answers: dict[str, Head | ChainError], wanted: Expected, now: float) -> list[Finding]:
    """Return a finding for each node: yellow, not red, for one that is down while another is well.

    Args:
        answers: Answer of each node, by the node's name.
        wanted: The expected chain.
        now: This host's Unix time in seconds.
    """
    if wanted.chain_id is None:
        first = next((head.block.chain_id for head in answers.values() if isinstance(head, Head)), None)
        wanted = Expected(first, "the first node")
    stands_in = any(isinstance(head, Head) and head.block.chain_id == wanted.chain_id for head in answers.values())
    return [_judge_node(where, answer, wanted, now, stands_in=stands_in) for where, answer in answers.items()]


def _judge_node(where: str, answer: Head | ChainError, wanted: Expected, now: float, *, stands_in: bool) -> Finding:
    name = "chain"
    if isinstance(answer, ChainError):
        remedy = "check that the node runs, and its address in chain.urls"
        return (
            yellow(name, f"{answer} (another node stands in)", remedy) if stands_in else red(name, str(answer), remedy)
        )
    block = answer.block
    if block.chain_id != wanted.chain_id:
        return red(
            name,
            f"{where} is on chain {block.chain_id}, but {wanted.by} says {wanted.chain_id}",
            "correct its address in chain.urls, or chain.id; another chain needs another store.path",
        )
    age = now - block.time.timestamp()
    text = f"{where}: {block.chain_id}, block {block.height}, {_age(age)}"
    if answer.catching_up:
        return yellow(name, f"{text}, is catching up", "wait until the node has synchronised, or name another one")
    if age > STALE_AFTER:
        return yellow(name, text, "find out whether the chain stands or this node lags; name another one in chain.urls")
    return green(name, text)


def judge_clock(head: Head, now: float, *, behind: float) -> Finding:
    """Compare this host's clock with the time of the newest block.

    Args:
        head: The newest head of all nodes.
        now: This host's Unix time in seconds.
        behind: Usual age of a head in seconds.
    """
    name, age = "clock", now - head.block.time.timestamp()
    if -age > CLOCK_WRONG:
        return red(name, f"slow: the newest block was made {-age:.0f} s in its future", SYNCHRONISE)
    if -age > CLOCK_OFF:
        return yellow(name, f"slow: the newest block was made {-age:.0f} s in its future", SYNCHRONISE)
    if age > behind + CLOCK_OFF:
        text = f"the newest block is {_age(age)}, {behind:.0f} s are usual: fast, or the chain stands"
        return yellow(name, text, SYNCHRONISE)
    return green(name, f"agrees with the newest block, which is {_age(age)}")


def _age(seconds: float) -> str:
    return f"{seconds:.0f} s old" if seconds >= -0.5 else f"{-seconds:.0f} s ahead of this clock"
