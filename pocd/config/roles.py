"""What a daemon may be, and which keys each role needs: the one place that says so."""

from __future__ import annotations

from enum import StrEnum
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pocd.config.listeners import OrchestratorSettings


class Role(StrEnum):
    """Role of a daemon; its value is what messages call it."""

    MINER = "miner"
    """Mines the rounds that it reads from a chain."""
    ENGINE = "proof engine"
    """Mines the rounds that an orchestrator gives it, each with its own key, and judges for it."""


NEEDED: dict[Role, tuple[str, ...]] = {Role.MINER: ("node.public_key", "chain.urls"), Role.ENGINE: ()}
"""The keys without a default that each role needs."""


def role_of(orchestrator: OrchestratorSettings) -> Role:
    """Return the role of a daemon: with `orchestrator.port` it is a proof engine."""
    return Role.ENGINE if orchestrator.is_on else Role.MINER


def missing(role: Role, settings: BaseModel) -> list[str]:
    """Return the keys that a role needs and that are not set."""
    return [key for key in NEEDED[role] if not attrgetter(key)(settings)]


def why_missing(role: Role, settings: BaseModel) -> str | None:
    """Return the message about keys that are missing; None where none is."""
    keys = missing(role, settings)
    if not keys:
        return None
    named = " and ".join(keys)
    return (
        f"{named} {'is' if len(keys) == 1 else 'are'} missing: a {role} reads its rounds from a chain; "
        f"with orchestrator.port pocd is a {Role.ENGINE}, which needs neither"
    )
