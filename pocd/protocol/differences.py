"""Verdict on claimed numbers by the size of their differences (docs/protocol.md section 5, "Verdict by differences").

A validator computes each sampled nonce twice: a reference, in float32 arithmetic on the weights of the dtype, and its
own result, as a miner computes it. How far its own result lies from the reference foretells how far an honest miner's
lies. Pure and exact; scipy makes it costly to import, so import it where a batch is judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, gammaincc, roots_hermitenorm, roots_legendre

from pocd.protocol.verdicts import ALLOWANCE, DifferenceVerdict, RatioTests

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pocd.protocol.verdicts import Result

    Floats = NDArray[np.floating[Any]]

THRESHOLD = 1e-4  # a batch is fraud when an honest miner is less probable than this
SPREAD = (
    0.9  # standard deviation of ln(squared error of a miner / that of a validator), both honest; 0.69 to 0.88 found
)
RARE = 0.02  # the share of honest nonces above `HonestLaw.rare`
CEILING = 1e-4  # the share of honest nonces above `HonestLaw.ceiling`
LEAST_FOR_MEAN = 20  # nonces: from here on the mean says more than the count above the median
LARGEST = 0.98  # quantile of the validator's own errors that is taken for the largest
JUMP = 16  # times as much as allowed may a nonce err at which rounding turned a choice
CHAOS = 0.25  # of results' scatter: where the validator's own error is larger, it depends on chance which nonces err
NODES = 400  # of each quadrature


@dataclass(frozen=True, slots=True)
class HonestLaw:
    """Law of an honest nonce's ratio, claimed error / allowed error, at the edge of the allowance.

    It is R·χ²ₖ/k with ln R normal around 0: χ²ₖ/k is what k random projections make of an error's square, and R how
    the sizes of two honest errors of one nonce differ.

    Attributes:
        median: Median of the ratio.
        rare: The ratio that the share `RARE` of honest nonces exceeds.
        ceiling: The ratio that the share `CEILING` exceeds. A larger one counts as this in the mean, so that no single
            nonce, however wrong, decides.
        mean: Mean of ln(1 + min(ratio, ceiling)).
        deviation: Standard deviation of ln(1 + min(ratio, ceiling)).
        skewness: Skewness of ln(1 + min(ratio, ceiling)).
    """

    median: float
    rare: float
    ceiling: float
    mean: float
    deviation: float
    skewness: float


@lru_cache(maxsize=8)
def honest_law(numbers: int, spread: float = SPREAD) -> HonestLaw:
    """Return the law for k = `numbers` claimed numbers per nonce, by quadrature.

    Args:
        numbers: k, at least 1.
        spread: Standard deviation of ln R; 0 where two honest errors have the same size.
    """
    along, weights = roots_hermitenorm(NODES // 4)
    sizes, weights = np.exp(spread * along), weights / weights.sum()

    def above(ratios: Floats) -> Floats:
        share: Floats = gammaincc(numbers / 2, numbers * ratios[:, None] / sizes / 2) @ weights
        return share

    def exceeded_by(share: float) -> float:
        return math.exp(brentq(lambda log: float(above(np.array([math.exp(log)]))[0]) - share, -20, 20))

    ceiling = exceeded_by(CEILING)
    top = math.log1p(ceiling)
    nodes, lengths = roots_legendre(NODES)
    # With u² in place of the value the integrand is smooth at 0, for one number too.
    roots, lengths = (nodes + 1) / 2 * math.sqrt(top), lengths / 2 * math.sqrt(top)
    tail = above(np.expm1(roots**2)) * lengths * 2 * roots
    first, second, third = (float(power * (roots ** (2 * power - 2) * tail).sum()) for power in (1, 2, 3))
    deviation = math.sqrt(second - first**2)
    skewness = (third - 3 * first * second + 2 * first**3) / deviation**3
    return HonestLaw(exceeded_by(0.5), exceeded_by(RARE), ceiling, first, deviation, skewness)


def compare(ratios: Floats, law: HonestLaw) -> RatioTests:
    """Test ratios [n] against the law; infinity is a ratio too.

    The mean's tail is that of a gamma distribution of the same mean, deviation and skewness (Pearson's type III): a
    normal one accuses honest miners five times as often as it says, where nonces are few.
    """
    n = len(ratios)
    above_median, above_rare = int((ratios > law.median).sum()), int((ratios > law.rare).sum())
    mean = math.fsum(np.log1p(np.minimum(ratios, law.ceiling))) / n
    p_median, p_rare = _at_least(above_median, n, 0.5), _at_least(above_rare, n, RARE)
    p_mean = None
    if n >= LEAST_FOR_MEAN:
        shape = 4 * n / law.skewness**2
        deviations = (mean - law.mean) * math.sqrt(n) / law.deviation
        p_mean = float(gammaincc(shape, max(0.0, shape + math.sqrt(shape) * deviations)))
    least = min(p_rare, p_median if p_mean is None else p_mean)
    return RatioTests(above_median, above_rare, mean, p_median, p_rare, p_mean, min(1.0, 2 * least))


def _at_least(count: int, n: int, share: float) -> float:
    return float(betainc(count, n - count + 1, share)) if count else 1.0


def judge_differences(
    claims: Sequence[Sequence[float | None] | None],
    reference: Floats,
    own_errors: Floats,
    *,
    allowance: float = ALLOWANCE,
    threshold: float = THRESHOLD,
) -> DifferenceVerdict:
    """Judge the claims of some nonces, at least one.

    Args:
        claims: What a miner claims of each nonce; not k finite numbers count against it.
        reference: Numbers of the validator's reference, [n, k], finite.
        own_errors: The expected squared error, per number, of the validator's own result, [n], finite and 0 or more:
            ‖x_own − x_ref‖² where a number is a projection of x by a normal vector of variance 1.
        allowance: How many times a validator's own error an honest miner's may be, 1 or more.
        threshold: The batch is fraud when the probability of an honest miner is below this.
    """
    expected, own = np.asarray(reference, np.float64), np.asarray(own_errors, np.float64)
    n, numbers = expected.shape
    assert len(claims) == len(own) == n >= 1, "every nonce has a claim, a reference and an error"
    assert np.isfinite(expected).all(), "the reference is finite"
    assert (np.isfinite(own) & (own >= 0)).all(), "the validator's own errors are finite"
    assert allowance >= 1, "an honest miner may differ as much as the validator does"
    law = honest_law(numbers)
    claimed = np.array([_squared_error(claim, row) for claim, row in zip(claims, expected, strict=True)])
    blank = np.square(expected - expected.mean(axis=0)).mean(axis=1)
    of_claims, of_blank = (compare(_ratios(each, allowed_errors(own, allowance)), law) for each in (claimed, blank))
    is_decidable = measures(own, blank) and of_blank.probability < threshold
    verdict: Result = "fraud" if of_claims.probability < threshold else "honest"
    return DifferenceVerdict(
        numbers=numbers,
        allowance=allowance,
        threshold=threshold,
        spread=SPREAD,
        claimed_errors=tuple(error if math.isfinite(error) else None for error in claimed.tolist()),
        own_errors=tuple(own.tolist()),
        blank_errors=tuple(blank.tolist()),
        malformed=int(np.isinf(claimed).sum()),
        claimed=of_claims,
        blank=of_blank,
        probability_honest=of_claims.probability,
        probability_blank=of_blank.probability,
        result=verdict if is_decidable else "undecidable",
    )


def measures(own: Floats, blank: Floats) -> bool:
    """Tell whether a validator's own errors measure a miner's: they are not 0, nor those of chaos."""
    return bool(own.any()) and math.fsum(own) <= CHAOS**2 * math.fsum(blank)


def allowed_errors(own: Floats, allowance: float) -> Floats:
    """Return the squared errors that are allowed, by nonce, at the median of an honest miner's.

    At least a sixteenth of the validator's largest: where rounding turns a choice, as of an expert, some nonces err far
    more than the others, and those of the miner are not the validator's.
    """
    return allowance**2 * np.maximum(own, np.quantile(own, LARGEST) / JUMP)


def _squared_error(claim: Sequence[float | None] | None, expected: Floats) -> float:
    """Return the mean squared difference of a claim; infinity where it is not as many finite numbers."""
    if claim is None or len(claim) != len(expected):
        return math.inf
    numbers = np.array([math.nan if value is None else value for value in claim], np.float64)
    with np.errstate(over="ignore"):
        error = float(np.square(numbers - expected).mean())
    return error if math.isfinite(error) else math.inf


def _ratios(errors: Floats, allowed: Floats) -> Floats:
    """Return errors / allowed [n]; where nothing is allowed, 0 for no error and infinity for any."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(errors > 0, errors / allowed, 0.0)
