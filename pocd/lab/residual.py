"""How many nonces catch a miner who claims what a cheap way computes, and what that gains it: without torch.

The miner is judged by differences (docs/protocol.md section 5, "Verdict by differences"). Batches are drawn: of each
nonce's expected squared error random projections make χ²ₖ/k times as much.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pocd.lab.audit import LEAST_SEQ_LEN
from pocd.lab.calibration import WIDTH
from pocd.lab.rendering import rendered
from pocd.protocol.differences import SPREAD, THRESHOLD, allowed_errors, compare, honest_law, measures
from pocd.protocol.errors import InputError
from pocd.protocol.schemes import SCHEMES, VECTOR_SIZE
from pocd.protocol.verdicts import ALLOWANCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pocd.lab.calibration import Plan
    from pocd.lab.cheap import Measured
    from pocd.protocol.differences import HonestLaw

    Floats = NDArray[np.float64]

ALLOWANCES = (1.25, ALLOWANCE)
POWER = 0.99  # of the batches of so many nonces are called fraud
BATCHES = 300  # that are drawn
LADDER = (
    *(2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32, 40, 50, 65, 80),
    *(100, 130, 160, 200, 250, 320, 400, 500, 650, 800, 1000),
)
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.06, 0.03)  # of cheap nonces among honest ones
SAMPLE = 1000  # nonces of a batch that are judged, against which a mixture has to pass
LEAST_NONCES = 16  # of a block
MIXED = 40  # batches that are drawn of each mixture
LEAST_COST = 0.001  # that a free way is counted with


@dataclass(frozen=True, slots=True)
class Row:
    """What is found of one way.

    Attributes:
        name: Name of the way.
        cost: Cost of a nonce, as a share of a full forward pass.
        residual: Root mean square of its error, as a multiple of the validator's own.
        caught_by: Nonces that catch it with 99% power, by each of `ALLOWANCES`; None where 1,000 do not.
        gain: Nonces per unit of compute, against an honest miner, of whoever mixes it with honest ones as is best: by
            the batches that pass a verdict on 1,000 nonces.
    """

    name: str
    cost: float
    residual: float
    caught_by: tuple[int | None, ...]
    gain: float


@dataclass(frozen=True, slots=True)
class Residuals:
    """The report on claims by cheap ways.

    Attributes:
        plan: Plan of the audit.
        nonces: Nonces of all blocks.
        own_error: Root mean square of the validator's own error, as a share of that of a blank claim.
        decidable: Share of batches of 1,000 nonces on which the verdict by differences says anything; of the others it
            says undecidable, whatever is claimed.
        rows: What is found of each way.
    """

    plan: Plan
    nonces: int
    own_error: float
    decidable: float
    rows: tuple[Row, ...]


def check_claims(plan: Plan) -> None:
    """Raise an InputError for a plan whose claims cannot be judged by their differences."""
    if plan.blocks < 1:
        raise InputError(f"blocks must be 1 or more, got {plan.blocks}")
    if plan.nonces < LEAST_NONCES:
        raise InputError(f"nonces must be {LEAST_NONCES} or more, got {plan.nonces}")
    if plan.seq_len < LEAST_SEQ_LEN:
        raise InputError(f"seq_len must be {LEAST_SEQ_LEN} or more, got {plan.seq_len}: shortcuts keep eighths of it")
    scheme = SCHEMES.get(plan.scheme)
    if plan.dtype == "float32" and scheme is not None and scheme.output == "distance":
        raise InputError("dtype must be float16 or bfloat16: in float32 the reference rounds as much as the result")


def judge_residuals(plan: Plan, blocks: Sequence[Measured]) -> Residuals:
    """Return the report on measured blocks."""
    numbers = VECTOR_SIZE if SCHEMES[plan.scheme].output == "vector" else 1
    own = np.concatenate([block.own for block in blocks])
    blank = np.concatenate([np.full(len(block.own), block.blank) for block in blocks])
    drawing = Drawing(own, blank, numbers)
    rows = []
    for index, way in enumerate(blocks[0].ways):
        errors = np.concatenate([block.ways[index].errors for block in blocks])
        caught = tuple(drawing.least_that_catch(errors, allowance) for allowance in ALLOWANCES)
        residual = float(np.sqrt(errors.mean() / own.mean()))
        rows.append(Row(way.name, way.cost, residual, caught, drawing.gain(errors, way.cost)))
    return Residuals(plan, len(own), float(np.sqrt(own.mean() / blank.mean())), drawing.decidable(), tuple(rows))


class Drawing:
    """Draws batches of nonces with replacement, and judges them."""

    def __init__(self, own: Floats, blank: Floats, numbers: int) -> None:
        self._own = own
        self._blank = blank
        self._numbers = numbers
        self._law: HonestLaw = honest_law(numbers)

    def least_that_catch(self, errors: Floats, allowance: float) -> int | None:
        """Return the least number of the ladder with which batches are called fraud with 99% power."""
        low, high = 0, len(LADDER)  # power rises with the number
        while low < high:
            middle = (low + high) // 2
            if self._catches(errors, allowance, LADDER[middle]):
                high = middle
            else:
                low = middle + 1
        return LADDER[low] if low < len(LADDER) else None

    def _catches(self, errors: Floats, allowance: float, size: int) -> bool:
        generator, missed = np.random.default_rng(size), 0
        for _ in range(BATCHES):
            missed += not self.is_fraud(errors, allowance, size, generator)
            if missed > (1 - POWER) * BATCHES:
                return False
        return True

    def is_fraud(
        self, errors: Floats, allowance: float, size: int, generator: np.random.Generator, share: float = 1.0
    ) -> bool:
        """Draw a batch, and judge it; of its nonces a share is cheap, and the others err as the validator does."""
        some = generator.integers(0, len(self._own), size)
        made = errors[some]
        if share < 1:
            honest = self._own[some] * np.exp(SPREAD * generator.standard_normal(size))
            made = np.where(generator.random(size) < share, made, honest)
        allowed = allowed_errors(self._own[some], allowance)
        projected = generator.chisquare(self._numbers, size) / self._numbers
        if compare(projected * made / allowed, self._law).probability >= THRESHOLD:
            return False
        return self._is_decidable(some, allowed, generator)

    def decidable(self) -> float:
        """Return the share of batches on which there is a verdict, whatever is claimed."""
        generator, decided = np.random.default_rng(SAMPLE), 0
        for _ in range(BATCHES):
            some = generator.integers(0, len(self._own), SAMPLE)
            decided += self._is_decidable(some, allowed_errors(self._own[some], ALLOWANCE), generator)
        return decided / BATCHES

    def _is_decidable(
        self, some: NDArray[np.int64], allowed: NDArray[np.floating[Any]], generator: np.random.Generator
    ) -> bool:
        blank = self._blank[some] * generator.chisquare(self._numbers, len(some)) / self._numbers
        return measures(self._own[some], blank) and compare(blank / allowed, self._law).probability < THRESHOLD

    def gain(self, errors: Floats, cost: float) -> float:
        """Return the largest gain of a mixture, by the share of its batches that pass; 1 is none."""
        best, generator = 1.0, np.random.default_rng(SAMPLE)
        for share in SHARES:
            passed = 1 - np.mean([self.is_fraud(errors, ALLOWANCE, SAMPLE, generator, share) for _ in range(MIXED)])
            best = max(best, float(passed) / (1 - share + share * max(cost, LEAST_COST)))
        return best


def as_text(report: Residuals) -> str:
    """Return what `pocd audit` prints of claims, in 80 columns unless names are long."""
    plan, table = report.plan, Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("claimed", no_wrap=True)
    for head in ("cost", "residual", *(f"caught, a = {allowance:g}" for allowance in ALLOWANCES), "gain"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in report.rows:
        caught = ("–" if each is None else str(each) for each in row.caught_by)
        table.add_row(row.name, f"{100 * row.cost:.0f}%", f"{row.residual:.3g}", *caught, _brief(row.gain))
    head = (
        f"{plan.model}, scheme {plan.scheme}, {plan.dtype} on {plan.device}, {plan.seq_len} positions, {report.nonces} "
        f"nonces; the validator's own error is {report.own_error:.2%} of a result's size"
    )
    legend = (
        "A miner who claims what a cheap way computes, judged by differences. Residual: its error, as a multiple of "
        "the validator's own. Caught: nonces that call it fraud in 99 of 100 batches, by the allowance a; –: more than "
        f"1,000, or never. Gain: results per unit of compute, against an honest miner, of the best mixture with "
        f"honest results that passes on {SAMPLE} nonces, a = {ALLOWANCE:g}; 8 bits cost half, and nothing counts as "
        f"costing less than {LEAST_COST:.1%}."
    )
    verdict = (
        f"The verdict by differences says undecidable of {1 - report.decidable:.0%} of batches of {SAMPLE} nonces, "
        "whatever is claimed: the validator's own result is not near enough to the reference. Who is not caught here "
        "is not honest for it: this scheme proves nothing of this model in this dtype."
    )
    paragraphs = [legend] if report.decidable > 1 / 2 else [legend, verdict]
    return "\n\n".join(
        [textwrap.fill(head, WIDTH), rendered(table), *(textwrap.fill(each, WIDTH) for each in paragraphs)]
    )


def _brief(gain: float) -> str:
    """Return a gain as it is shown: of a way that costs nothing, and passes, it is 1000."""
    return f"{gain:.2f}" if gain < 100 else f"{gain:.0f}"
