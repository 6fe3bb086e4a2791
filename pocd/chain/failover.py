"""Several nodes of one chain that stand in for one another, as long as they agree."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from pocd.chain.gonka import Gonka
from pocd.chain.source import (
    STALE_AFTER,
    Block,
    BlockUnavailableError,
    ChainError,
    ChainSource,
    Head,
    SlowDownError,
    same_hash,
)
from pocd.observe.levels import CALM, Level
from pocd.protocol.epochs import EpochInfo

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock

Answer = TypeVar("Answer", Block, Head, EpochInfo)

KNOWN_HASHES = 256
"""How many heights' hashes are remembered, those seen last."""

FARTHEST_JUMP = 100_000_000
"""Blocks; a head farther than this above the highest one seen is refused, as it would end all rounds for good."""

LEAP = 100
"""Blocks above the highest head seen that are always believed; farther is a leap, unless so much time went by."""

FASTEST = 20.0
"""Blocks a second that a chain may make."""

LEAP_LOOKS = 3
"""Looks in a row in which one node alone must repeat its leap to be believed."""

LEAP_SECONDS = 10.0
"""Seconds for which one node alone must repeat its leap to be believed."""

LONGEST_REST = 600.0
"""Seconds that a node is left alone at most when it asks for it."""

BACKOFF = (1.0, 2.0, 4.0, 8.0, 10.0)
"""Seconds that a source is not asked after its first, second, … failure in a row; then always the last value."""


@dataclass(slots=True)
class _Node:
    """A source, its failures in a row, and the looks at it in a row whose heads were leaps.

    It is not asked before the monotonic time `rests_until`, due to `error`; a lone one is, unless it `asked_for_rest`.
    """

    source: ChainSource
    failures: int = 0
    rests_until: float = 0.0
    error: str = ""
    asked_for_rest: bool = False
    leaps: int = 0
    leaps_since: float = 0.0
    leapt_to: int = 0


class Failover:
    """Asks `sources` in order, from the first, until one answers, agrees with what is known, and is not behind.

    A source that failed, and is not the only one, is left alone for a while (`BACKOFF`); so the first is asked again
    as soon as it may work. One that asks to be left alone is, also if it is the only one. A node that lags is no
    failure: the next is asked, but with no better one its head is what there is.

    The chain's id is fixed, by the caller or by the first answer, and so is each height's hash where blocks are never
    replaced. A node on another chain, or with another hash at a known height, is refused (docs/protocol.md section 8).
    Which of two nodes is right cannot be known from here: the first stays believed.

    A head that is higher than the chain can have become since the last one is a leap; so is one of now that is lower
    than the chain can have been minutes ago, which proves that the highest was a lie. It is passed over, until a second
    node confirms it, or no other node is well and the same one repeats it for a while.

    Args:
        sources: Sources of one kind, at least one; messages name each by `str(source)`.
        chain_id: The chain's id; None where the first answer decides it.
        hashes: Known block hashes by height; ignored where blocks may be replaced.
        highest: Height of the highest known head; None where none is known.
        clock: Measures waits by its monotonic clock, and the age of blocks by its wall clock.
        log: Gets a line when another source's head is taken than before; one a minute where that flaps.
        stale_after: Seconds; a head older than this is behind.

    Raises:
        ValueError: The list of sources is empty.
    """

    def __init__(
        self,
        sources: Sequence[ChainSource],
        *,
        chain_id: str | None,
        hashes: Mapping[int, str],
        highest: int | None,
        clock: Clock,
        log: FilteringBoundLogger,
        stale_after: float = STALE_AFTER,
    ) -> None:
        if not sources:
            raise ValueError("at least one chain source is needed")
        assert len({source.reorganises for source in sources}) == 1, "sources of one chain are of one kind"
        self._nodes = [_Node(source) for source in sources]
        self._chain_id = chain_id
        self._hashes = OrderedDict(sorted(hashes.items())[-KNOWN_HASHES:])
        self._highest = highest
        self._rose_at: float | None = None  # when `_highest` rose; monotonic
        self._clock = clock
        self._log = log
        self._stale_after = stale_after
        self._followed = sources[0]
        self._turned = Level()
        self._logged_at = float("-inf")

    def __str__(self) -> str:
        """Return the sources' names, in order."""
        return ", ".join(str(node.source) for node in self._nodes)

    @property
    def reorganises(self) -> bool:
        """Tell whether the chain may replace blocks, as its sources say."""
        return self._nodes[0].source.reorganises

    async def head(self) -> Head:
        """Return the head of the first source that answers and is not behind; else the highest that is.

        Raises:
            ChainError: No source answered, or none agreed; the message joins all their errors.
        """
        errors: list[ChainError] = []
        behind: list[tuple[Head, ChainSource]] = []
        leaps: list[tuple[Head, _Node]] = []
        for node in self._nodes:
            try:
                head = await self._ask(node, lambda source: source.head(), self._check_head)
            except ChainError as error:
                errors.append(error)
                continue
            if (leap := self._leap(head)) is not None:
                errors.append(ChainError(f"{node.source} {leap}"))
                leaps.append((head, node))
                continue
            self._believe(head)
            node.leaps = 0
            if self._problem(head) is None:
                for _, other in leaps:
                    other.leaps = 0
                return self._take(head, node.source, [*map(str, errors), *self._problems(behind)])
            behind.append((head, node.source))
        confirmed = self._confirmed(leaps)
        if confirmed is not None:
            head, source = confirmed
            if self._highest is not None and head.block.height < self._highest:
                self._highest = None
                head = replace(head, corrects=True)
            self._believe(head)
            return self._take(head, source, ["the nodes repeat it"])
        if not behind:
            raise _joined(errors)
        head, source = max(behind, key=lambda pair: pair[0].block.height)  # the first of equals
        return self._take(head, source, [*map(str, errors), *self._problems(behind)])

    async def block(self, height: int) -> Block:
        """Return the block at `height` (at least 1) of the first source that has it.

        Raises:
            BlockUnavailableError: Every source answered that it lacks the block.
            ChainError: No source answered, or none agreed; the message joins all their errors.
        """
        errors: list[ChainError] = []
        for node in self._nodes:
            try:
                block = await self._ask(node, lambda source: source.block(height), self._check)
            except ChainError as error:
                errors.append(error)
            else:
                self._learn(block)
                return block
        raise _joined(errors)

    async def epoch_info(self) -> EpochInfo:
        """Return what the chain says of its latest epoch by the first source that answers, which all are of `Gonka`.

        Raises:
            ChainError: No source answered, or with a height that cannot be; the message joins all their errors.
        """
        errors: list[ChainError] = []
        for node in self._nodes:
            try:
                return await self._ask(node, _epoch_info_of, self._check_info)
            except ChainError as error:
                errors.append(error)
        raise _joined(errors)

    async def _ask(
        self,
        node: _Node,
        ask: Callable[[ChainSource], Awaitable[Answer]],
        check: Callable[[Answer, ChainSource], None],
    ) -> Answer:
        left = node.rests_until - self._clock.monotonic()
        if left > 0 and (node.asked_for_rest or len(self._nodes) > 1):
            raise ChainError(f"{node.error} (left alone for {math.ceil(left)} s more)")
        try:
            answer = await ask(node.source)
            check(answer, node.source)
        except BlockUnavailableError:
            raise  # an answer too
        except ChainError as error:
            rest = BACKOFF[min(node.failures, len(BACKOFF) - 1)]
            node.asked_for_rest = isinstance(error, SlowDownError)
            if isinstance(error, SlowDownError) and error.seconds is not None:
                rest = min(max(rest, error.seconds), LONGEST_REST)
            node.error = str(error)
            node.rests_until = self._clock.monotonic() + rest
            node.failures += 1
            raise
        node.failures = 0
        return answer

    def _check_info(self, info: EpochInfo, source: ChainSource) -> None:
        if self._highest is not None and info.height > self._highest + LEAP:
            raise ChainError(
                f"{source} says of its epoch that the newest block is {info.height}, but the highest seen is "
                f"{self._highest}"
            )

    def _check_head(self, head: Head, source: ChainSource) -> None:
        height = head.block.height
        if self._highest is not None and height > self._highest + FARTHEST_JUMP:
            raise ChainError(
                f"{source} says that its newest block is {height}, more than {FARTHEST_JUMP} above {self._highest}, "
                "the highest seen before: check its URL (if it is right, use another store.path)"
            )
        self._check(head.block, source)

    def _leap(self, head: Head) -> str | None:
        """Return what is wrong with a height that cannot be if the highest seen before is right."""
        if self._highest is None:
            return None
        rise = head.block.height - self._highest
        passed = 0.0 if self._rose_at is None else self._clock.monotonic() - self._rose_at
        is_of_now = not head.catching_up and abs(self._age(head)) <= self._stale_after
        if rise > LEAP + FASTEST * passed:
            where = f"{rise} above"
        elif is_of_now and -rise > LEAP + FASTEST * self._stale_after:
            where = f"{-rise} below"
        else:
            return None
        return (
            f"says that its newest block is {head.block.height}, which is {where} the highest seen before: "
            f"believed when a second node says so, or this one for {LEAP_SECONDS:.0f} s"
        )

    def _confirmed(self, leaps: list[tuple[Head, _Node]]) -> tuple[Head, ChainSource] | None:
        """Return the first leap that another node confirms, or that its node has repeated for long enough."""
        now = self._clock.monotonic()
        for head, node in leaps:
            height = head.block.height
            if abs(height - node.leapt_to) > LEAP + FASTEST * (now - node.leaps_since):
                node.leaps = 0
            if node.leaps == 0:
                node.leaps_since = now
            node.leaps += 1
            node.leapt_to = height
        for head, node in leaps:
            near = sum(abs(other.block.height - head.block.height) <= LEAP for other, _ in leaps)
            if near > 1 or (node.leaps >= LEAP_LOOKS and now - node.leaps_since >= LEAP_SECONDS):
                node.leaps = 0
                return head, node.source
        return None

    def _believe(self, head: Head) -> None:
        self._learn(head.block)
        if self._highest is None or head.block.height > self._highest:
            self._highest = head.block.height
            self._rose_at = self._clock.monotonic()

    def _check(self, block: Block, source: ChainSource) -> None:
        if self._chain_id is not None and block.chain_id != self._chain_id:
            raise ChainError(
                f"{source} is on chain {block.chain_id}, expected {self._chain_id}: check its URL "
                "(another chain needs another store.path)"
            )
        known = self._hashes.get(block.height)
        if not self.reorganises and known is not None and not same_hash(block.hash, known):
            raise ChainError(
                f"{source} has hash {block.hash} at height {block.height}, but {known} was seen before: check its URL "
                "(a chain that began anew needs another store.path)"
            )

    def _learn(self, block: Block) -> None:
        """Hold all later answers against a block that is believed."""
        self._chain_id = block.chain_id
        if self.reorganises:
            return
        self._hashes[block.height] = block.hash
        self._hashes.move_to_end(block.height)
        if len(self._hashes) > KNOWN_HASHES:
            self._hashes.popitem(last=False)

    def _problem(self, head: Head) -> str | None:
        if head.catching_up:
            return "is catching up"
        age = self._age(head)
        return f"has a newest block that is {age:.0f} s old" if age > self._stale_after else None

    def _age(self, head: Head) -> float:
        return self._clock.wall() - head.block.time.timestamp()

    def _problems(self, behind: list[tuple[Head, ChainSource]]) -> list[str]:
        return [f"{source} {self._problem(head)}" for head, source in behind]

    def _take(self, head: Head, source: ChainSource, reasons: list[str]) -> Head:
        now = self._clock.monotonic()
        turn = self._turned.look(now, bad=source is not self._nodes[0].source)
        among_others = source not in {self._followed, self._nodes[0].source} and now - self._logged_at >= CALM
        if turn is not None or among_others:
            self._logged_at = now
            self._log.warning("another node is followed", action="chain_source", source=str(source), because=reasons)
            self._followed = source
        return head


async def _epoch_info_of(source: ChainSource) -> EpochInfo:
    assert isinstance(source, Gonka), "only the live network has epochs"
    return await source.epoch_info()


def _joined(errors: list[ChainError]) -> ChainError:
    absent = all(isinstance(error, BlockUnavailableError) for error in errors)
    return (BlockUnavailableError if absent else ChainError)("; ".join(str(error) for error in errors))
