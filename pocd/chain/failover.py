"""Several nodes that stand in for one another, as long as they tell the same story."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, TypeVar

from pocd.chain.source import Block, BlockUnavailableError, ChainError, ChainSource, Head

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

Answer = TypeVar("Answer", Block, Head)

KNOWN_HASHES = 256
"""How many heights' hashes are remembered, those seen last."""


class Failover:
    """Asks `sources` in order, from the one that answered last, until one answers and agrees with what is known.

    The first answer fixes the chain's id, and each height's first answer its hash. A node on another chain, or with
    another hash at a known height, is refused: these chains do not reorganise (docs/protocol.md section 8). Which of
    two nodes is right cannot be known from here, so the first stays believed until a restart.

    Args:
        sources: At least one; `str(source)` is how messages name it.

    Raises:
        ValueError: No sources.
    """

    def __init__(self, sources: Sequence[ChainSource]) -> None:
        if not sources:
            raise ValueError("at least one chain source is needed")
        self._sources = tuple(sources)
        self._last_good = 0
        self._chain_id: str | None = None
        self._hashes: OrderedDict[int, str] = OrderedDict()

    def __str__(self) -> str:
        """The sources' names, in order."""
        return ", ".join(str(source) for source in self._sources)

    async def head(self) -> Head:
        """Return the newest block of the first source that answers.

        Raises:
            ChainError: None answered, or none agreed; the message joins what each said.
        """
        return await self._first(lambda source: source.head(), lambda head: head.block)

    async def block(self, height: int) -> Block:
        """Return the block at `height` (at least 1) of the first source that has it.

        Raises:
            BlockUnavailableError: Every source answered that it does not hold it.
            ChainError: None answered, or none agreed; the message joins what each said.
        """
        return await self._first(lambda source: source.block(height), lambda block: block)

    async def _first(
        self, ask: Callable[[ChainSource], Awaitable[Answer]], block_of: Callable[[Answer], Block]
    ) -> Answer:
        errors: list[ChainError] = []
        start = self._last_good  # a call at the same time may move it
        for step in range(len(self._sources)):
            index = (start + step) % len(self._sources)
            source = self._sources[index]
            try:
                answer = await ask(source)
                self._check(block_of(answer), source)
            except ChainError as error:
                errors.append(error)
            else:
                self._last_good = index
                return answer
        absent = all(isinstance(error, BlockUnavailableError) for error in errors)
        kind = BlockUnavailableError if absent else ChainError
        raise kind("; ".join(str(error) for error in errors))

    def _check(self, block: Block, source: ChainSource) -> None:
        if self._chain_id is not None and block.chain_id != self._chain_id:
            raise ChainError(f"{source} is on chain {block.chain_id}, expected {self._chain_id}")
        known = self._hashes.get(block.height, block.hash)
        if block.hash != known:
            raise ChainError(f"{source} has hash {block.hash} at height {block.height}, but {known} was seen before")
        self._chain_id = block.chain_id
        self._hashes[block.height] = block.hash
        self._hashes.move_to_end(block.height)
        if len(self._hashes) > KNOWN_HASHES:
            self._hashes.popitem(last=False)
