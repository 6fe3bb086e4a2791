"""The chain in the daemon's status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from pocd.mining.follower import ChainHealth, EpochState


class EpochStatus(BaseModel):
    """The live network's epoch, by the chain's newest answer."""

    number: int = Field(description="Number of the epoch.")
    phase: str = Field(description="Phase of the epoch.")
    until: int | None = Field(description="First height in another phase; null where that is not known.")
    awaits: str = Field(description="What comes then, or is missing until then.")
    due: int | None = Field(description="Height by which the round is called that is due; null where none is.")
    accepted_through: int | None = Field(
        description="Last height at which artifacts of the newest round are accepted; null once it is over. What no "
        "receiver has accepted by then is late: it is set aside, and counted as expired."
    )
    refused: str | None = Field(description="Why the round that is due is not mined; null where it is.")


class ChainStatus(BaseModel):
    """The newest block that the chain's node reported.

    All fields but `problem` are null until one did, and in a proof engine that follows no chain.
    """

    chain_id: str | None
    height: int | None
    hash: str | None
    block_time: str | None = Field(description="Time of the block by the chain, ISO 8601.")
    epoch: EpochStatus | None = Field(description="Epoch of the live network; null on other chains.")
    problem: str | None = Field(description="Why the chain is not followed as it should; null when it is.")


def chain_status(chain: ChainHealth, problem: str | None) -> ChainStatus:
    """Return the status of a chain with this `problem`."""
    block = chain.head.block if chain.head else None
    return ChainStatus(
        chain_id=block.chain_id if block else None,
        height=block.height if block else None,
        hash=block.hash if block else None,
        block_time=block.time.isoformat() if block else None,
        epoch=_epoch(chain.epoch) if chain.epoch else None,
        problem=problem,
    )


def _epoch(epoch: EpochState) -> EpochStatus:
    stage = epoch.stage
    return EpochStatus(
        number=epoch.number,
        phase=stage.phase,
        until=stage.until,
        awaits=stage.awaits,
        due=stage.round.height if stage.round else None,
        accepted_through=max(epoch.accepted.values(), default=None),
        refused=epoch.refused,
    )
