"""The interface of a chain's node, its blocks, and its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from datetime import datetime


STALE_AFTER = 600.0
"""Seconds; a newest block older than this means a node that lags without saying so, or a chain that stands."""

GREATEST_HEIGHT = 2**63 - 1
"""Heights are 64-bit integers with a sign, by CometBFT and in the store."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block, as far as mining needs it.

    Attributes:
        chain_id: The network's name.
        height: Block number, at least 1.
        hash: Block hash in the one spelling of its kind of chain; never empty.
        time: Time of the block by the chain, in UTC.
    """

    chain_id: str
    height: int
    hash: str
    time: datetime


@dataclass(frozen=True, slots=True)
class Head:
    """A node's newest block that counts.

    Attributes:
        block: The block.
        catching_up: Whether the node is still catching up.
        corrects: Whether a higher head that was believed before is proven to have been a lie by this one.
    """

    block: Block
    catching_up: bool
    corrects: bool = False


class ChainError(Exception):
    """The chain could not be read; the message says which node, what it answered, and what to do."""


class BlockUnavailableError(ChainError):
    """The node has no block at the height: it is not there yet, pruned, or its data is lost."""


class SlowDownError(ChainError):
    """The node asks to be left alone.

    Attributes:
        seconds: For how long; None where it did not say.
    """

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class RefusedError(ChainError):
    """The node answered, and does not do what it was asked: a JSON-RPC error, or an HTTP status that says so."""


class UnreachableError(ChainError):
    """The node did not answer at all."""


def same_hash(one: str, other: str) -> bool:
    """Tell whether two spellings are one block hash: hex is the same in either case."""
    return one.lower() == other.lower()


class ChainSource(Protocol):
    """A node of some chain, or several that stand in for one another."""

    @property
    def reorganises(self) -> bool:
        """Tell whether the chain may replace a block that was seen before, as chains without finality do."""

    async def head(self) -> Head:
        """Return the newest block.

        Raises:
            ChainError: The node cannot be reached, or its answer makes no sense.
        """

    async def block(self, height: int) -> Block:
        """Return the block at `height` (at least 1).

        Raises:
            BlockUnavailableError: The node has no block at that height.
            ChainError: The node cannot be reached, or its answer makes no sense.
        """
