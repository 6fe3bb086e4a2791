"""Make sources of a chain from its nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp

from pocd.chain.cometbft import CometBFT
from pocd.chain.evm import EVM
from pocd.chain.gonka import Gonka

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.chain.rpc import Rpc
    from pocd.chain.source import ChainSource
    from pocd.protocol.names import ChainKind

CHAIN_TIMEOUT = aiohttp.ClientTimeout(total=60)  # far above what a call to a node takes with its own limits
CONFIRMATIONS = 12  # of an EVM chain, where the configuration names none


def make_sources(kind: ChainKind, nodes: Sequence[Rpc], *, confirmations: int) -> list[ChainSource]:
    """Return a source for each node, which speaks the RPC of a chain of that `kind`.

    Args:
        kind: Which RPC the nodes speak.
        nodes: The nodes' endpoints.
        confirmations: Blocks between the head that is followed and the newest one, see `confirmations_of`.
    """
    if kind == "evm":
        return [EVM(node, confirmations=confirmations) for node in nodes]
    if kind == "gonka":
        return [Gonka(node) for node in nodes]
    return [CometBFT(node) for node in nodes]


def confirmations_of(kind: ChainKind, configured: int | None) -> int:
    """Return how many blocks the head that is followed is behind the newest one."""
    if kind != "evm":
        return 0
    return CONFIRMATIONS if configured is None else configured
