"""`pocd audit`: how much a cheater could save. This module judges and prints, without torch; `cheater.py` attacks."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pocd.lab.audit_statistics import BEST, Estimate, detection, gain, mismatch, r_squared, winners, winners_among_best
from pocd.lab.calibration import LEAST_EXPECTED, WIDTH, Plan
from pocd.lab.rendering import rendered
from pocd.protocol.errors import InputError
from pocd.protocol.names import DTYPES, default_tolerance
from pocd.protocol.schemes import SCHEMES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_SEQ_LEN = 8  # a shorter sequence has no eighths
LEAST_NONCES = 100  # of a block; half of them are judged
PROOFS = (100, 1000)  # in the batches of a miner who claims what is not true


@dataclass(frozen=True, slots=True)
class Attack:
    """Predictions of one shortcut.

    Attributes:
        name: Name of the shortcut.
        cost: Cost of predicting a nonce, as a share of a full forward pass.
        rest: Cost of then computing the nonce in full, as a share of a full forward pass.
        predicted: Predicted distances [blocks, nonces] of nonces that the cheater was not trained on.
        claimed: Distances [blocks, nonces] that a miner might claim as honest ones; None if the shortcut gives none.
    """

    name: str
    cost: float
    rest: float
    predicted: NDArray[np.float64]
    claimed: NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class Attacks:
    """Predictions of all shortcuts, and the `true` distances [blocks, nonces] of the same nonces."""

    fingerprint: str
    hidden_size: int
    true: NDArray[np.float64]
    attacks: list[Attack]


@dataclass(frozen=True, slots=True)
class ShortcutScore:
    """Score of one shortcut: a row of the report.

    Attributes:
        name: Name of the shortcut.
        cost: Cost of a prediction, as a share of a full forward pass.
        rest: Cost of then computing the nonce in full, as a share of a full forward pass.
        r_squared: R² between predicted and true distances, within blocks.
        winners: Share of valid nonces among the best tenth of predictions.
        gain: Valid nonces per unit of compute, relative to an honest miner.
    """

    name: str
    cost: float
    rest: float
    r_squared: Estimate
    winners: Estimate
    gain: Estimate


@dataclass(frozen=True, slots=True)
class Caught:
    """Outcome of claiming a shortcut's distances as they are.

    Attributes:
        name: Name of the shortcut.
        dtype: Precision whose tolerance the validator grants.
        tolerance: Tolerance of that precision, as a difference of distances.
        mismatch: Share of the miner's proofs that the validator finds invalid.
        detection: Probability that a batch is judged fraudulent, by its number of proofs.
    """

    name: str
    dtype: str
    tolerance: float
    mismatch: Estimate
    detection: dict[str, float]


@dataclass(frozen=True, slots=True)
class Audit:
    """The report of an audit; `judged` is the number of nonces per block that the cheater was not trained on."""

    plan: Plan
    fingerprint: str
    hidden_size: int
    judged: int
    rows: tuple[ShortcutScore, ...]
    caught: tuple[Caught, ...]


def check_audit(plan: Plan) -> None:
    """Raise an InputError for a plan that cannot be judged."""
    if not 0 < plan.rate < 1:
        raise InputError(f"rate must be above 0 and below 1, got {plan.rate:g}")
    if plan.blocks < 1:
        raise InputError(f"blocks must be 1 or more, got {plan.blocks}")
    if plan.seq_len < LEAST_SEQ_LEN:
        raise InputError(f"seq_len must be {LEAST_SEQ_LEN} or more, got {plan.seq_len}: shortcuts keep eighths of it")
    # The cheater is trained on half of them, and chooses on half of the rest.
    least = max(LEAST_NONCES, int(-(-4 * LEAST_EXPECTED // min(plan.rate, 1 - plan.rate))))
    if plan.nonces < least:
        raise InputError(f"nonces must be {least} or more for a rate of {plan.rate:g}, got {plan.nonces}")


def audit(plan: Plan, found: Attacks) -> Audit:
    """Return the report on the measured attacks."""
    valid = winners(found.true, plan.rate)
    return Audit(
        plan=plan,
        fingerprint=found.fingerprint,
        hidden_size=found.hidden_size,
        judged=found.true.shape[1],
        rows=tuple(
            ShortcutScore(
                name=attack.name,
                cost=attack.cost,
                rest=attack.rest,
                r_squared=r_squared(attack.predicted, found.true),
                winners=winners_among_best(attack.predicted, valid),
                gain=gain(attack.predicted, valid, cost=attack.cost, rest=attack.rest),
            )
            for attack in found.attacks
        ),
        caught=tuple(
            _caught(attack.name, attack.claimed, found, plan, dtype)
            for attack in found.attacks
            if attack.claimed is not None
            for dtype in DTYPES
        ),
    )


def _caught(name: str, claimed: NDArray[np.float64], found: Attacks, plan: Plan, dtype: str) -> Caught:
    tolerance = default_tolerance(dtype, SCHEMES[plan.scheme], found.hidden_size)
    wrong = mismatch(claimed, found.true, plan.rate, tolerance)
    return Caught(name, dtype, tolerance, wrong, {str(n): detection(wrong.value, n) for n in PROOFS})


def as_text(report: Audit) -> str:
    """Return what `pocd audit` prints, in 80 columns unless names are long."""
    plan = report.plan
    model = plan.model if plan.revision is None else f"{plan.model}, revision {plan.revision}"
    facts = (
        ("model", f"{model}, {plan.dtype} on {plan.device}, hidden size H = {report.hidden_size}"),
        ("scheme", f"{plan.scheme}, valid rate {100 * plan.rate:g}% in each block"),
        ("sample", f"{plan.blocks} blocks × {plan.nonces} nonces, {plan.seq_len} positions each;"),
        ("", f"the cheater is trained on {plan.nonces - report.judged} of a block, judged on {report.judged}"),
    )
    legend = (
        "Cost: multiply-adds of the model's layers, as a share of a full pass (b-bit ones count b/16). R²: between "
        f"predicted and true distances. Winners: valid nonces among the best {100 * BEST:g}% of predictions. Gain: "
        "valid nonces per unit of compute, against an honest miner (1 = none), of one who predicts all and then "
        "computes the best. Brackets: 95% intervals; one in 40 lies above the truth by chance."
    )
    gainful = [row.name for row in report.rows if row.gain.low > 1]
    verdict = (
        f"A cheater gains (the interval lies above 1) by: {', '.join(gainful)}."
        if gainful
        else "No shortcut gains: every interval reaches 1 or lies below."
    )
    head = "\n".join(f"{name:9} {text}" for name, text in facts)
    claims = (
        "A miner who claims a shortcut's distances as they are, before a validator who grants a dtype's tolerance. "
        "Invalid: share of its proofs that are. Fraud: how likely a batch of so many proofs is judged so."
    )
    parts = (_table(report), textwrap.fill(legend, WIDTH), textwrap.fill(verdict, WIDTH))
    return "\n\n".join([head, *parts, _table_of_claims(report), textwrap.fill(claims, WIDTH)])


def _table(report: Audit) -> str:
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("shortcut", no_wrap=True)
    for name in ("cost", "R²", "", "", "winners", "gain", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            row.name,
            f"{100 * row.cost:.0f}%",
            *_interval(row.r_squared, 1, 3),
            *_interval(row.winners, 100, 0, "%"),
            *_interval(row.gain, 1, 2),
        )
    return rendered(table)


def _table_of_claims(report: Audit) -> str:
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("claimed", no_wrap=True)
    for name in ("tolerance", "", "", "invalid", *(f"fraud of {n}" for n in PROOFS)):
        table.add_column(name, justify="right", no_wrap=True)
    for each in report.caught:
        table.add_row(
            each.name,
            each.dtype,
            f"{each.tolerance:.1g}",
            *_interval(each.mismatch, 100, 1, "%"),
            *(f"{100 * probability:.0f}%" for probability in each.detection.values()),
        )
    return rendered(table)


def _interval(found: Estimate, scale: float, places: int, sign: str = "") -> tuple[str, str]:
    value, low, high = (f"{scale * number:.{places}f}" for number in (found.value, found.low, found.high))
    return f"{value}{sign}", f"[{low}–{high}]"
