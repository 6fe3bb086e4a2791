"""Statistics of the audit: how good a cheater's predictions of distances are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtri

from pocd.lab.statistics import CONFIDENCE, rate_intervals
from pocd.protocol.proof import FRAUD_THRESHOLD, MISMATCH
from pocd.protocol.theory import probability_honest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

Z = float(ndtri((1 + CONFIDENCE) / 2))
BEST = 0.1  # the share of predictions that `winners_among_best` looks at
LEAST_CHOSEN = 50  # nonces that a cheater's choice is judged by at least, on each half
CHOICES = 60  # how many shares q the cheater tries
PENALTIES = np.logspace(-9, 5, 57)  # that the ridge regression tries, times the largest square


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate and its 95% confidence interval."""

    value: float
    low: float
    high: float


def ridge(features: Floats, outputs: Floats) -> tuple[Floats, Floats]:
    """Fit outputs = features @ weights + bias by ridge regression.

    The penalty is the one with the least generalised cross-validation error (Golub, Heath and Wahba 1979).

    Args:
        features: Features [n, P]; constant ones have no effect.
        outputs: Outputs [n, K].

    Returns:
        Weights [P, K] and bias [K].
    """
    x, y = np.asarray(features, np.float64), np.asarray(outputs, np.float64)
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    u, s, v = np.linalg.svd(x - x_mean, full_matrices=False)
    if s[0] <= 1e-6 * np.linalg.norm(x):  # nothing but rounding
        return np.zeros((x.shape[1], y.shape[1])), y_mean
    y = y - y_mean
    along = u.T @ y
    squares = np.square(along).sum(axis=1)
    kept = s**2 / (s**2 + PENALTIES[:, None] * s[0] ** 2)
    errors = np.square(y).sum() - ((1 - np.square(1 - kept)) * squares).sum(axis=1)
    freedom = len(x) - 1 - kept.sum(axis=1)
    scores = np.where(freedom > 0, errors / np.square(np.maximum(freedom, 1e-9)), np.inf)
    best = kept[scores.argmin()]
    weights = v.T @ ((best / np.maximum(s, np.finfo(np.float64).tiny))[:, None] * along)
    return weights, y_mean - x_mean @ weights


def r_squared(predicted: Floats, true: Floats) -> Estimate:
    """Return R² of the best line from predicted to true distances, within blocks.

    Each block's means are taken out, so that blocks of different levels show no correlation that is
    of no use within one. The interval is Fisher's (1921), by z = artanh r.

    Args:
        predicted: Predicted distances [blocks, n].
        true: True distances [blocks, n], n of 4 or more.
    """
    a = predicted - predicted.mean(axis=1, keepdims=True)
    b = true - true.mean(axis=1, keepdims=True)
    length = math.sqrt(float(np.square(a).sum() * np.square(b).sum()))
    r = float((a * b).sum()) / length if length > 0 else 0.0
    r = min(max(r, -1 + 1e-12), 1 - 1e-12)
    error = Z / math.sqrt(true.size - len(true) - 2)
    low, high = math.tanh(math.atanh(r) - error), math.tanh(math.atanh(r) + error)
    return Estimate(r * r, 0.0 if low < 0 < high else min(low * low, high * high), max(low * low, high * high))


def share(hits: int, n: int) -> Estimate:
    """Return hits/n with Clopper and Pearson's (1934) exact interval; of nothing, 0 with all from 0 to 1."""
    low, high = rate_intervals(np.array([hits]), np.array([n]))
    return Estimate(hits / max(1, n), float(low[0]), float(high[0]))


def winners(distances: Floats, rate: float) -> NDArray[np.bool_]:
    """Tell which nonces are valid at their block's own r_target for `rate`, [blocks, n] like `distances`."""
    return np.asarray(distances <= np.quantile(distances, rate, axis=1, keepdims=True, method="lower"))


def _found(predicted: Floats, valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Count the valid nonces among the best 0, 1, ... n of each block's predictions, all blocks together [n + 1]."""
    order = np.argsort(predicted, axis=1, kind="stable")
    per_place = np.take_along_axis(valid, order, axis=1).sum(axis=0)
    return np.concatenate([[0], np.cumsum(per_place)])


def winners_among_best(predicted: Floats, valid: NDArray[np.bool_]) -> Estimate:
    """Return the share of valid nonces among the best tenth of each block's predictions."""
    best = max(1, round(BEST * predicted.shape[1]))
    return share(int(_found(predicted, valid)[best]), best * len(predicted))


def mismatch(claimed: Floats, true: Floats, rate: float, tolerance: float) -> Estimate:
    """Return the share of proofs that a validator finds invalid when a miner claims false distances.

    Args:
        claimed: Claimed distances [blocks, n]; the miner sends those valid at the block's own r_target for `rate`.
        true: True distances [blocks, n].
        rate: Share of valid nonces.
        tolerance: How far above r_target a recomputed distance still counts as valid.
    """
    r_target = np.quantile(true, rate, axis=1, keepdims=True)
    sent = claimed < r_target
    return share(int((sent & (true > r_target + tolerance)).sum()), int(sent.sum()))


def detection(mismatched: float, proofs: int) -> float:
    """Return the probability that a batch is judged fraudulent, given the share of its proofs that is invalid.

    Args:
        mismatched: Share of the proofs that are invalid.
        proofs: Number of proofs in the batch, all recomputed.
    """
    honest = (probability_honest(invalid, proofs, MISMATCH) for invalid in range(proofs + 1))
    least = next(invalid for invalid, probability in enumerate(honest) if probability < FRAUD_THRESHOLD)
    return probability_honest(least, proofs, mismatched)


def gain(predicted: Floats, valid: NDArray[np.bool_], *, cost: float, rest: float) -> Estimate:
    """Return the valid nonces per unit of compute that a cheater finds, against an honest miner (1 = no gain).

    The cheater predicts every nonce, computes the best share q of them in full, and so finds
    P(valid and among the best q) per cost + q · rest; the honest miner P(valid) per 1. The best q is chosen on one
    half of the nonces and judged on the other, and the other way round: what is best by chance gains
    nothing. The interval joins the exact ones of the two halves (Zou and Donner 2008); it takes the two q as
    given. Simulated with guesses at no cost and no worth, it begins above 1 in 2.5% of cases. (Wilson's would in 4%.)

    Args:
        predicted: Predicted distances [blocks, n], in an order independent of the distances.
        valid: True where a nonce is valid [blocks, n].
        cost: Cost of a prediction, as a share of a full forward pass.
        rest: Cost of then computing the nonce in full, as a share of a full forward pass.
    """
    halves = [(predicted[:, i::2], valid[:, i::2]) for i in range(2)]
    parts = []
    for chosen_on, judged_on in (halves, halves[::-1]):
        chosen = _best_share(*chosen_on, cost=cost, rest=rest)
        blocks, n = judged_on[0].shape
        best = max(1, round(chosen * n))
        worth = best / n / (cost + best / n * rest) / float(valid.mean())  # of a choice that is always valid
        hits = share(int(_found(*judged_on)[best]), best * blocks)
        parts.append((worth * hits.value / 2, worth * hits.low / 2, worth * hits.high / 2))
    value = sum(part[0] for part in parts)
    below = math.hypot(*(found - low for found, low, _ in parts))
    above = math.hypot(*(high - found for found, _, high in parts))
    return Estimate(value, max(0.0, value - below), value + above)


def _best_share(predicted: Floats, valid: NDArray[np.bool_], *, cost: float, rest: float) -> float:
    """Return the share q with the largest gain."""
    blocks, n = predicted.shape
    least = min(n, math.ceil(LEAST_CHOSEN / blocks))
    counts = np.unique(np.geomspace(least, n, CHOICES).round().astype(int))
    gains = _found(predicted, valid)[counts] / (cost + counts / n * rest)
    return float(counts[gains.argmax()] / n)
