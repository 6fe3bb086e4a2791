"""Valid rates of one block and of many: what theory expects of them, and how sure a measured one is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import betainc, betaincinv, ndtri, stdtrit

from pocd.protocol.theory import r_target_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

CONFIDENCE = 0.95  # of every interval here
DRAWS = 10_000  # of the null distribution: a p-value of 0.05 is then known to ±0.002


# One block: a head W of [D, H] and a target t that stay, and a hidden state h uniform on the sphere.


def head_valid_rate(r_target: float, gram: Floats, aim: Floats) -> float:
    """Return the share of valid nonces within one block, were hidden states uniform on their sphere.

    With g normal in H dimensions, c = a·g / ‖W g‖ exceeds x > 0 in half of the cases in which the
    quadratic form Q = g'(aa' − x²W'W)g is positive; in the other half, at −g, c < −x. With λ the
    eigenvalues of x²W'W/‖a‖² and β² the squares of a/‖a‖ along its eigenvectors, E exp(iuQ/2‖a‖²) is
    (∏(1 + iuλ) · (1 − iu Σ β²/(1 + iuλ)))^−½, and P(Q > 0) follows by inversion (Gil-Pelaez 1951; Imhof
    1961). Q has one positive eigenvalue, so below the real axis there is one cut, from u = −iw₀. The
    contour folded onto it gives an integral of positive numbers over w > w₀, taken here with w = w₀ cosh² s.

    Args:
        r_target: A distance, 0 to 2.
        gram: W'W, [H, H].
        aim: a = W't, [H], not 0, where t has unit length.
    """
    x = 1 - r_target**2 / 2
    eigenvalues, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
    # Where D < H some are 0 but for rounding.
    eigenvalues = np.maximum(eigenvalues, eigenvalues[-1] * np.finfo(np.float64).eps)
    squares = (np.asarray(aim, np.float64) @ vectors) ** 2
    largest_square = (squares / eigenvalues).sum()  # of c, over all h
    total = squares.sum()
    tail = _folded_integral(x * x * eigenvalues / total, squares / total) if x * x < largest_square else 0.0
    return tail if x > 0 else 1 - tail


def _folded_integral(lambdas: Floats, squares: Floats) -> float:
    """P(Q > 0)/2 of `head_valid_rate`."""
    w0 = 1.0
    for _ in range(50):  # Newton's; the function is concave and rises, so from the left it never overshoots
        w0 += (1 - (w0 * squares / (1 + w0 * lambdas)).sum()) / (squares / (1 + w0 * lambdas) ** 2).sum()
    step = 1 / 8  # of the trapezoid rule: exact to rounding wherever the answer is above 1e-8
    cosh = np.cosh(np.arange(0, 40, step))
    factors = 1 + w0 * cosh[:, None] ** 2 * lambdas
    last = (squares / (factors * (1 + w0 * lambdas))).sum(axis=1)
    values = np.exp(-(np.log(factors).sum(axis=1) + np.log(last)) / 2) / cosh
    return float(values.sum() - values[0] / 2) * step / (math.pi * math.sqrt(w0))


def block_rates(rate: float, hidden_size: int, dimension: int, share: Floats) -> Floats:
    """Return the valid rates of blocks with a random head, by what head and target alone decide.

    Very nearly c = s·u, with u one coordinate of a uniform unit vector in H dimensions and
    s² = H ‖W't‖²/‖W‖², so a block's rate follows from that share of squares.

    Args:
        rate: The rate over all blocks, which fixes `r_target`.
        hidden_size: H, at least 2.
        dimension: D.
        share: ‖W't‖²/‖W‖² of each block, any shape. For normal W it follows Beta(H/2, H(D − 1)/2).

    Returns:
        Rates in 0 to 1, in the shape of `share`.
    """
    x = 1 - r_target_for(rate, dimension) ** 2 / 2
    u = np.clip(x / np.sqrt(hidden_size * share), -1, 1)
    half = (hidden_size - 1) / 2
    return np.asarray(betainc(half, half, (1 - u) / 2))


def geometry_std(rate: float, hidden_size: int, dimension: int) -> float:
    """Return the standard deviation over blocks of the valid rate that head and target alone cause.

    No scheme with a random head per block can be more even. About x φ(x)/√(2H), where the normal
    tail beyond x is `rate`: at 10%, 1.4 points for H = 128 and 0.5 for H = 1024. By quadrature over `block_rates`.
    """
    nodes = (np.arange(1000) + 0.5) / 1000
    share = betaincinv(hidden_size / 2, hidden_size * (dimension - 1) / 2, nodes)
    return float(block_rates(rate, hidden_size, dimension, share).std())


# Tests and intervals.


def quantile_interval(distances: Floats, rate: float) -> tuple[float, float]:
    """Return a 95% confidence interval of the `rate` quantile over all blocks of a kind.

    Woodruff's (1952) for samples in clusters: an interval of the rate at the pooled quantile, by
    Student's t over the blocks' own rates, read off the pooled distances. Simulated with 5 blocks,
    from alike to very different, it covers 98% to 92%, where the percentiles of a two-level
    bootstrap cover 98% to 64%. It cannot reach beyond the distances found: of 2 or 3 very different
    blocks it covers 75% and 87%.

    Args:
        distances: [blocks, nonces], at least 2 blocks.
        rate: Above 0 and below 1.
    """
    blocks = len(distances)
    rates = (distances < np.quantile(distances, rate)).mean(axis=1)
    tail = (1 + CONFIDENCE) / 2
    between = stdtrit(blocks - 1, tail) * rates.std(ddof=1) / math.sqrt(blocks)
    # A few blocks can agree by chance: never less than what independent nonces would give.
    within = ndtri(tail) * math.sqrt(rate * (1 - rate) / distances.size)
    error = max(between, within)
    low, high = np.quantile(distances, np.clip([rate - error, rate + error], 0, 1))
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Spread:
    """How far valid rates of blocks lie apart: the largest less the smallest. All but `p_value` are shares, 0 to 1.

    Attributes:
        spread: The spread that was measured.
        low: Lower end of the 95% confidence interval of the true rates' spread.
        high: Upper end of that interval.
        floor_mean: The spread that blocks of one common rate show on average, from sampling noise, head and target.
        floor_95: The spread that such blocks stay below in 95% of cases.
        p_value: Probability of the measured spread, or a larger one, under one common rate.
        exceeds_floor: Whether `spread` lies above `floor_95`, as `p_value` is below 5%.
    """

    spread: float
    low: float
    high: float
    floor_mean: float
    floor_95: float
    p_value: float
    exceeds_floor: bool


def rate_intervals(valid: NDArray[np.int64], checked: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return bounds [blocks] that hold all the true rates at once with 95% confidence.

    Clopper and Pearson's (1934) exact intervals, each at the confidence 0.95^(1/blocks) (Šidák 1967).
    """
    tail = (1 - CONFIDENCE ** (1 / len(valid))) / 2
    invalid = checked - valid
    low = np.where(valid > 0, betaincinv(np.maximum(valid, 1), invalid + 1, tail), 0.0)
    high = np.where(invalid > 0, betaincinv(valid + 1, np.maximum(invalid, 1), 1 - tail), 1.0)
    return low, high


def spread_of_rates(
    valid: NDArray[np.int64],
    checked: NDArray[np.int64],
    *,
    hidden_size: int | None,
    dimension: int,
    generator: np.random.Generator,
) -> Spread:
    """Judge how far the valid rates of blocks lie apart.

    The interval is the widest and the narrowest spread within simultaneous `rate_intervals`: the
    largest of several noisy rates is biased upwards, a bootstrap would add the noise once
    more, and this holds for any counts. The floor is simulated: a rate per block by
    `block_rates`, or one for all where targets are drawn per nonce, then a binomial count.

    Args:
        valid: Valid nonces of each block, [blocks], at least 2 blocks.
        checked: Nonces of each block, [blocks], above 0.
        hidden_size: H; None where no block has a head and a target of its own.
        dimension: D.
        generator: Draws the floor's distribution.
    """
    rates = valid / checked
    spread = float(np.ptp(rates))
    low, high = rate_intervals(valid, checked)
    common = float(valid.sum() / checked.sum())
    by_block = np.full((DRAWS, len(valid)), common)
    if hidden_size is not None:
        share = generator.beta(hidden_size / 2, hidden_size * (dimension - 1) / 2, size=by_block.shape)
        by_block = block_rates(common, hidden_size, dimension, share)
    drawn = generator.binomial(checked, by_block)
    floor = np.ptp(drawn / checked, axis=1)
    as_far = int((floor > spread - 1e-12).sum())  # equal spreads may differ by rounding
    p_value = (1 + as_far) / (1 + DRAWS)
    return Spread(
        spread=spread,
        low=max(0.0, float(low.max() - high.min())),
        high=float(high.max() - low.min()),
        floor_mean=float(floor.mean()),
        floor_95=float(np.quantile(floor, CONFIDENCE)),
        p_value=p_value,
        exceeds_floor=p_value < 1 - CONFIDENCE,
    )
