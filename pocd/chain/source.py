"""What every chain gives, and what can go wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from datetime import datetime


STALE_AFTER = 600.0
"""Seconds; a newest block older than this means a node that lags without saying so, or a chain that stands."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block, as far as mining needs it.

    Attributes:
        chain_id: The network's name.
        height: Its number, at least 1.
        hash: Its hash exactly as the node wrote it; never empty.
        time: When the chain says that it was made, in UTC.
    """

    chain_id: str
    height: int
    hash: str
    time: datetime


@dataclass(frozen=True, slots=True)
class Head:
    """The newest block of a node that counts, and whether the node is still catching up."""

    block: Block
    catching_up: bool


class ChainError(Exception):
    """The chain could not be read; the message says which node, what it answered, and what to do."""


class BlockUnavailableError(ChainError):
    """The node does not hold that height: not there yet, pruned, or its data is gone."""


class ChainSource(Protocol):
    """A node of some chain, or several that stand in for one another."""

    @property
    def reorganises(self) -> bool:
        """Whether another block may take the place of one that was seen before, as on chains without finality."""

    async def head(self) -> Head:
        """Return the newest block.

        Raises:
            ChainError: The node cannot be reached, or its answer makes no sense.
        """

    async def block(self, height: int) -> Block:
        """Return the block at `height` (at least 1).

        Raises:
            BlockUnavailableError: The node does not hold it.
            ChainError: The node cannot be reached, or its answer makes no sense.
        """
