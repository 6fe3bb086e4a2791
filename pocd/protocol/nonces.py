"""Arithmetic of a node's nonces: which are done, being worked on, or free.

Positions x = 0, 1, 2, … count this node's nonces; position x is nonce `node_id + node_count · x`
(docs/protocol.md section 5). Everything here counts positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from math import gcd
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LARGEST_NONCE = 2**63 - 1


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Positions `start` to `stop - 1`, at least one."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.stop, f"not a span: {self.start}:{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Progress:
    """The positions that are done: all below `cursor`, and the `islands` above it, ascending and apart."""

    cursor: int = 0
    islands: tuple[Span, ...] = ()

    def add(self, done: Span) -> Self:
        """Return the progress after `done`, which must not have been done before."""
        spans = sorted((*self.islands, done))
        cursor, islands = self.cursor, list[Span]()
        for span in spans:
            assert span.start >= (islands[-1].stop if islands else cursor), f"{done} was done before"
            if not islands and span.start == cursor:
                cursor = span.stop
            elif islands and islands[-1].stop == span.start:
                islands[-1] = Span(islands[-1].start, span.stop)
            else:
                islands.append(span)
        return type(self)(cursor, tuple(islands))

    @property
    def end(self) -> int:
        """The first position above everything that is done."""
        return self.islands[-1].stop if self.islands else self.cursor

    @property
    def spans(self) -> tuple[Span, ...]:
        """All that is done, ascending and apart."""
        return (Span(0, self.cursor), *self.islands) if self.cursor else self.islands

    def gaps(self) -> list[Span]:
        """The spans below `end` that are not done, ascending."""
        starts = [self.cursor, *(island.stop for island in self.islands)]
        return [Span(start, island.start) for start, island in zip(starts, self.islands, strict=False)]


@dataclass(frozen=True, slots=True)
class Node:
    """A node's share of all nonces: position x is nonce `id + count · x`.

    The id may be as large as the count, and larger, where an orchestrator gives it.
    """

    id: int
    count: int

    def size(self, largest_nonce: int) -> int:
        """How many positions there are, up to a largest nonce."""
        return max(0, (largest_nonce - self.id) // self.count + 1)

    def has(self, nonce: int) -> bool:
        """Tell whether a nonce is in this share."""
        return nonce >= self.id and (nonce - self.id) % self.count == 0

    def nonces(self, span: Span) -> range:
        """The nonces at the positions of `span`."""
        first = self.id + self.count * span.start
        return range(first, first + self.count * len(span), self.count)

    def positions(self, nonces: range) -> range:
        """The positions of this node's nonces that are among `nonces`, which ascend."""
        common = gcd(self.count, nonces.step)
        if not nonces or (nonces.start - self.id) % common:
            return range(0)
        step = nonces.step // common
        residue = (nonces.start - self.id) // common * pow(self.count // common, -1, step)
        lowest = max(0, -((self.id - nonces.start) // self.count))
        return range(lowest + (residue - lowest) % step, (nonces[-1] - self.id) // self.count + 1, step)


def unskipped(span: Span, skipped: Sequence[range]) -> Sequence[int]:
    """Return the positions of `span` that are in none of the ranges `skipped`."""
    if not skipped:
        return range(span.start, span.stop)
    positions = _unskipped_from(span.start, skipped)
    found = []
    while (position := next(positions)) < span.stop:
        found.append(position)
    return found


def _unskipped_from(position: int, skipped: Sequence[range]) -> Iterator[int]:
    while True:
        inside = next((positions for positions in skipped if position in positions), None)
        if inside is None:
            yield position
        position = inside.stop if inside and inside.step == 1 else position + 1


class Ledger:
    """Hands out every position once, lowest first, and takes back what was not finished.

    What could not be checked is handed out once more after `retry`, and then no more by this ledger.

    Attributes:
        skipped: Positions that are passed over: their nonces were checked as another node's.
    """

    def __init__(
        self, progress: Progress, skipped: Sequence[range] = (), *, size: int = Node(0, 1).size(LARGEST_NONCE)
    ) -> None:
        self.skipped = skipped
        self._size = size  # no position from here on
        self._aside: list[Span] = []
        self._retried: list[Span] = []
        self._free = progress.gaps()
        self._next = progress.end

    @property
    def is_used_up(self) -> bool:
        """Whether no position is known to be free: all are leased, done or set aside."""
        return not self._free and self._next >= self._size

    def take(self, count: int) -> Span | None:
        """Lease the lowest free positions: `count`, and those skipped between, or fewer where there are no more.

        Returns:
            The positions; None where none is free.
        """
        while self._free:
            gap = self._free.pop(0)
            stop = self._stop(gap.start, count)
            if stop < gap.stop:
                self._free.insert(0, Span(stop, gap.stop))
                return Span(gap.start, stop)
            if unskipped(gap, self.skipped):
                return gap
        start, self._next = self._next, min(self._stop(self._next, count), self._size)
        if start >= self._next or not unskipped(Span(start, self._next), self.skipped):
            return None
        return Span(start, self._next)

    def _stop(self, start: int, count: int) -> int:
        """Return the position after the next `count` that are not skipped."""
        if not self.skipped:
            return start + count
        *_, last = islice(_unskipped_from(start, self.skipped), count)
        return last + 1

    def give_back(self, span: Span) -> None:
        """Free a leased span again."""
        self._free = sorted((*self._free, span))

    def set_aside(self, span: Span) -> None:
        """Keep a leased span that could not be checked from being leased again; the second time for good."""
        if not any(earlier.start <= span.start < earlier.stop for earlier in self._retried):
            self._aside.append(span)

    def retry(self) -> None:
        """Free the spans that were set aside for the first time."""
        self._free = sorted((*self._free, *self._aside))
        self._retried += self._aside
        self._aside = []
