"""Which rounds the daemon mines, and until when what they found is worth something, made from its settings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from pocd.config.roles import Role
from pocd.delivery.late import EpochWindows, LateArtifacts, OrchestratedWindows
from pocd.mining.epochs import EpochScheduler, EpochWatcher
from pocd.mining.scheduler import RoundScheduler
from pocd.protocol.proof import Round
from pocd.protocol.rounds import RoundPolicy
from pocd.protocol.schemes import with_stronger_rng

if TYPE_CHECKING:
    from pocd.admin.parts import Parts
    from pocd.chain.failover import Failover
    from pocd.chain.source import Block
    from pocd.config.settings import Settings
    from pocd.delivery.late import Windows
    from pocd.protocol.epochs import Recipe


def make_scheduler(parts: Parts, source: Failover) -> RoundScheduler | EpochScheduler | EpochWatcher | None:
    """Return the scheduler of the chain's rounds; of a proof engine what tells the chain's epoch, if it has any."""
    settings, is_engine = parts.settings, parts.settings.role is Role.ENGINE
    if settings.chain.kind == "gonka":
        watcher = EpochWatcher(source, health=parts.chain, models=settings.names_of_model, log=parts.log)
        if is_engine:
            return watcher
        return EpochScheduler(
            source,
            watcher,
            parts.control,
            parts.outbox,
            make_round=partial(make_epoch_round, parts),
            clock=parts.clock,
            log=parts.log,
        )
    if is_engine:
        return None
    return RoundScheduler(
        source,
        parts.control,
        parts.outbox,
        policy=RoundPolicy(settings.round.every, settings.round.offset, settings.round.duration),
        make_round=partial(make_round, parts),
        withdraw=withdraws(settings),
        queued=parts.miner.batchable,
        clock=parts.clock,
        log=parts.log,
    )


def make_round(parts: Parts, block: Block) -> Round:
    """Return the round that a block starts, by the settings as they are now: r_target may have changed."""
    settings = parts.settings
    assert settings.node.public_key is not None, "a miner has one"
    return Round(
        block_hash=block.hash,
        block_height=block.height,
        public_key=settings.node.public_key,
        r_target=settings.round.target,
        scheme=settings.round.scheme,
        model=settings.model.name,
        seq_len=settings.round.seq_len,
    )


def make_epoch_round(parts: Parts, block: Block, recipe: Recipe, stronger_rng: bool) -> Round:  # noqa: FBT001 - as the chain says
    """Return the round of the live network that a block starts, by the chain's parameters."""
    scheme = parts.settings.round.scheme
    return replace(
        make_round(parts, block),
        scheme=with_stronger_rng(scheme) if stronger_rng else scheme,
        seq_len=recipe.seq_len,
    )


def withdraws(settings: Settings) -> bool:
    """Tell whether what a replaced block's round found, and no receiver has yet, is not to be sent."""
    return settings.chain.replaced_blocks != "deliver"


def make_late(parts: Parts) -> LateArtifacts | None:
    """Return what sets aside artifacts that are late; None where rounds have no window."""
    settings = parts.settings
    windows: Windows | None = None
    if settings.orchestrator.is_on:
        seconds = settings.orchestrator.late_seconds
        windows = OrchestratedWindows(parts.control, seconds=seconds, clock=parts.clock)
    elif settings.chain.kind == "gonka":
        windows = EpochWindows(parts.chain)
    return LateArtifacts(windows, parts.outbox, clock=parts.clock, log=parts.log) if windows else None
