"""The live network's rounds: a pure function of what the chain says of its epoch, and of a height (docs/live.md).

Each epoch begins with a regular round. Confirmation rounds come at random heights between regular ones; the chain
announces each a few blocks ahead. Nothing here remembers anything, so a late start, a restart or a missed block needs
no catching up: each look says what should run now.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decimal import Decimal

WIND_DOWN = 0.8  # of a stage's blocks; after them it takes up nothing new


class Phase(StrEnum):
    """Phase of the epoch at a height."""

    INFERENCE = "inference"
    GENERATE = "generate"
    GENERATE_WIND_DOWN = "generation winds down"
    VALIDATE = "validate"
    VALIDATE_WIND_DOWN = "validation winds down"
    ANNOUNCED = "confirmation announced"
    CONFIRM = "confirmation: generate"
    CONFIRM_CLOSED = "confirmation: generation is over"
    CONFIRM_VALIDATE = "confirmation: validate"
    UNKNOWN = "unknown: what the chain says is of an earlier epoch"


class LiveScheme(StrEnum):
    """How nonces are computed, by the chain's name for it."""

    PREFILL = "POC_SCHEME_PREFILL"
    DECODE = "POC_SCHEME_DECODE"


@dataclass(frozen=True, slots=True)
class Windows:
    """Lengths of the parts of an epoch, in blocks; all together are at most `epoch`.

    Attributes:
        epoch: Blocks from the start of one regular round to the next one's.
        generation: Blocks of a round in which nonces are generated, at least 1.
        exchange: Blocks after those in which artifacts are still accepted.
        delay: Blocks from the end of generation to the start of validation.
        validation: Blocks of validation.
        new_validators: Blocks from the end of validation until the new weights hold.
    """

    epoch: int
    generation: int
    exchange: int
    delay: int
    validation: int
    new_validators: int


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A confirmation round that was announced and is not over.

    Attributes:
        sequence: Number of the round among those of the epoch, from 0.
        trigger: Height at which it was announced, and by which it is called.
        start: Height at which generation starts.
        seed: Block hash that its nonces depend on, exactly as the chain writes it; None until generation starts.
    """

    sequence: int
    trigger: int
    start: int
    seed: str | None


@dataclass(frozen=True, slots=True)
class StatTest:
    """Terms of the network's verdict on vectors.

    Attributes:
        dist_threshold: Two vectors that are further apart are a mismatch.
        p_mismatch: Probability of a mismatch between honest participants.
        p_value_threshold: Below this probability of honesty the verdict is fraud.
    """

    dist_threshold: Decimal
    p_mismatch: Decimal
    p_value_threshold: Decimal


@dataclass(frozen=True, slots=True)
class Recipe:
    """Parameters by which nonces of one model are computed and judged.

    Attributes:
        model: Name of the model.
        scheme: How nonces are computed.
        seq_len: Number of positions.
        stat_test: Terms of the verdict; None where the chain has none for this scheme.
    """

    model: str
    scheme: LiveScheme
    seq_len: int
    stat_test: StatTest | None


@dataclass(frozen=True, slots=True)
class EpochInfo:
    """What the chain says of its latest epoch.

    Attributes:
        height: The newest block's height when it was said.
        epoch: Number of the epoch; there is no regular round in epoch 0.
        start: Height at which the epoch's regular round starts.
        windows: Lengths of the epoch's parts, as they are now: they may be changed at any height.
        confirmation: The confirmation round that is under way.
        recipes: Parameters of all models and schemes.
        scheme: Scheme of regular rounds.
        confirmation_scheme: Scheme of the first confirmation rounds of an epoch; the others are as regular ones.
        confirmation_scheme_rounds: Number of those first confirmation rounds.
        stronger_rng: Whether inputs are drawn by all 256 bits of their seed.
    """

    height: int
    epoch: int
    start: int
    windows: Windows
    confirmation: Confirmation | None
    recipes: tuple[Recipe, ...]
    scheme: LiveScheme
    confirmation_scheme: LiveScheme
    confirmation_scheme_rounds: int
    stronger_rng: bool


@dataclass(frozen=True, slots=True)
class EpochRound:
    """A round of the live network.

    Attributes:
        height: Height that it is called by: its block's, or the one at which it was announced.
        seed: Block hash that its nonces depend on, exactly as the chain writes it; None: the hash of the block at
            `height`, which the chain's RPC writes in upper case.
        scheme: How its nonces are computed.
        accepted_through: The last height at which its artifacts are accepted.
    """

    height: int
    seed: str | None
    scheme: LiveScheme
    accepted_through: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What is due at a height.

    Attributes:
        phase: The phase.
        round: The round whose nonces are to be generated now; None where none are.
        until: First height that is in another phase; None where only a newer answer of the chain can tell.
        awaits: What comes then, or is missing until then.
    """

    phase: Phase
    round: EpochRound | None
    until: int | None
    awaits: str


def stage_at(info: EpochInfo, height: int) -> Stage:
    """Return what is due at `height`, by what the chain said at that height or shortly before."""
    next_start = info.start + info.windows.epoch
    regular_next = "the next regular round"
    if height >= next_start:
        return Stage(Phase.UNKNOWN, None, None, "the chain's word on the epoch that has begun")
    if height < info.start:
        return Stage(Phase.INFERENCE, None, info.start, "the regular round")
    if info.epoch > 0 and (regular := _regular(info, height)):
        return regular
    if info.confirmation and (confirming := _confirming(info, info.confirmation, height)):
        cut = confirming.until is not None and confirming.until > next_start
        return replace(confirming, until=next_start, awaits=regular_next) if cut else confirming
    return Stage(Phase.INFERENCE, None, next_start, f"{regular_next}, or a confirmation round at any height")


def accepted_at(info: EpochInfo, height: int) -> dict[int, int]:
    """Return the rounds whose artifacts are accepted at `height`: the last such height, by that of the round's name."""
    if height >= info.start + info.windows.epoch:
        return {}  # whatever was accepted is of an earlier epoch
    windows = {info.start: _regular_accepted(info)} if info.epoch > 0 else {}
    if event := info.confirmation:
        windows[event.trigger] = _confirmation_accepted(info, event)
    return {start: through for start, through in windows.items() if start <= height <= through}


def _regular_accepted(info: EpochInfo) -> int:
    return info.start + info.windows.generation + info.windows.exchange


def _confirmation_accepted(info: EpochInfo, event: Confirmation) -> int:
    """Return the last height; unlike a regular round's it counts from the last block of generation."""
    return event.start + info.windows.generation - 1 + info.windows.exchange


def _regular(info: EpochInfo, height: int) -> Stage | None:
    """Return what the regular round asks for at `height`, which is in the epoch; None once it is over."""
    start, windows = info.start, info.windows
    end = start + windows.generation
    validation = end + windows.delay
    round_ = EpochRound(start, None, info.scheme, accepted_through=_regular_accepted(info))
    parts = (
        (start + _before_wind_down(windows.generation), Phase.GENERATE, round_, "the end of generation"),
        (validation, Phase.GENERATE_WIND_DOWN, None, "validation"),
        (validation + _before_wind_down(windows.validation), Phase.VALIDATE, None, "the end of validation"),
        (validation + windows.validation, Phase.VALIDATE_WIND_DOWN, None, "the next round"),
    )
    for until, phase, running, awaits in parts:
        if height < until:
            return Stage(phase, running, until, awaits)
    return None


def _confirming(info: EpochInfo, event: Confirmation, height: int) -> Stage | None:
    """Return what a confirmation round asks for at `height`, between regular ones; None where it asks for nothing."""
    windows = info.windows
    end = event.start + windows.generation  # of generation
    accepted_through = _confirmation_accepted(info, event)
    validation = accepted_through + windows.delay
    over = max(end, validation + windows.validation)  # without a delay, validation counts from the last block before
    if height < event.trigger or height >= over:
        return None
    if height < event.start:
        return Stage(Phase.ANNOUNCED, None, event.start, "the round's block hash, and generation")
    if height < end:
        if event.seed is None:
            return Stage(Phase.CONFIRM, None, end, "the round's block hash, which the chain does not tell yet")
        round_ = EpochRound(event.trigger, event.seed, scheme_of(info, event), accepted_through)
        return Stage(Phase.CONFIRM, round_, end, "the end of generation")
    if height < validation:
        return Stage(Phase.CONFIRM_CLOSED, None, validation, "validation")
    return Stage(Phase.CONFIRM_VALIDATE, None, validation + windows.validation, "the next round")


class NotComputedError(Exception):
    """The chain asks for what pocd does not compute; the message names it."""


def recipe_of(info: EpochInfo, scheme: LiveScheme, *names: str) -> Recipe:
    """Return the parameters by which nonces of a model are computed in rounds of a scheme.

    Args:
        info: What the chain says.
        scheme: Scheme of the round.
        names: Names of the model; the first that the chain knows counts.

    Raises:
        NotComputedError: pocd does not compute the scheme, or the chain has no such parameters of the model.
    """
    if scheme is not LiveScheme.PREFILL:
        raise NotComputedError(f"the chain asks for {scheme}, which pocd does not compute: only {LiveScheme.PREFILL}")
    for name in names:
        for recipe in info.recipes:
            if (recipe.model, recipe.scheme) == (name, scheme):
                return recipe
    known = ", ".join(sorted({recipe.model for recipe in info.recipes})) or "none"
    asked = " or ".join(map(repr, names))
    raise NotComputedError(f"the chain has no {scheme} of model {asked}; it has models {known}")


def scheme_of(info: EpochInfo, event: Confirmation) -> LiveScheme:
    """Return the scheme of a confirmation round: the first ones of an epoch may have one of their own."""
    return info.confirmation_scheme if event.sequence < info.confirmation_scheme_rounds else info.scheme


def _before_wind_down(blocks: int) -> int:
    return int(blocks * WIND_DOWN)  # in 64-bit floating point, as the chain counts
