"""The audit's statistics against plain ones, and against simulations (seeded, so they cannot fail by chance)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import stats

from pocd.lab.audit_statistics import (
    CHOICES,
    LEAST_CHOSEN,
    PENALTIES,
    detection,
    gain,
    mismatch,
    r_squared,
    ridge,
    share,
    winners,
    winners_among_best,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]


# Ridge regression.


def plain_ridge(features: Floats, outputs: Floats) -> Floats:
    """Fitted values, by normal equations and traces of hat matrices."""
    x, y = features - features.mean(axis=0), outputs - outputs.mean(axis=0)
    largest = np.linalg.eigvalsh(x.T @ x)[-1]
    found = []
    for penalty in PENALTIES:
        hat = x @ np.linalg.solve(x.T @ x + penalty * largest * np.eye(x.shape[1]), x.T)
        error = np.square(y - hat @ y).sum() / (len(x) - 1 - np.trace(hat)) ** 2
        found.append((error, hat @ y + outputs.mean(axis=0)))
    return np.asarray(min(found, key=lambda each: each[0])[1])


@pytest.mark.parametrize("noise", [0.01, 1, 30])
def test_ridge_is_that_of_the_normal_equations(noise: float) -> None:
    generator = np.random.default_rng(1)
    features = generator.normal(3, 1, (80, 10))
    outputs = features @ generator.normal(size=(10, 4)) + noise * generator.normal(size=(80, 4))
    weights, bias = ridge(features, outputs)
    assert features @ weights + bias == pytest.approx(plain_ridge(features, outputs), abs=1e-6 * (1 + noise))


def test_useless_features_leave_the_mean() -> None:
    generator = np.random.default_rng(2)
    outputs = generator.normal(size=(400, 20))
    weights, bias = ridge(generator.normal(size=(400, 100)), outputs)
    fresh = generator.normal(size=(1000, 100)) @ weights + bias
    assert np.square(fresh - outputs.mean(axis=0)).mean() < 0.01
    weights, bias = ridge(np.full((400, 5), 0.3) + 1e-9 * generator.normal(size=(400, 5)), outputs)
    assert not weights.any()
    assert bias == pytest.approx(outputs.mean(axis=0))


def test_more_features_than_nonces_do_not_blow_up() -> None:
    generator = np.random.default_rng(3)
    weights, _ = ridge(generator.normal(size=(50, 200)), generator.normal(size=(50, 4)))
    assert np.abs(weights).max() < 1


# R² and shares.


def test_r_squared_is_pearsons_with_fishers_interval() -> None:
    generator = np.random.default_rng(4)
    true = generator.normal(size=(1, 300))
    predicted = 0.4 * true + generator.normal(size=(1, 300))
    found, known = r_squared(predicted, true), stats.pearsonr(predicted[0], true[0])
    interval = known.confidence_interval()
    assert found.value == pytest.approx(known.statistic**2)
    assert (found.low, found.high) == pytest.approx((interval.low**2, interval.high**2))


def test_levels_of_blocks_are_no_prediction() -> None:
    generator = np.random.default_rng(5)
    levels = np.array([[0.0], [100.0], [200.0]])
    found = r_squared(generator.normal(size=(3, 400)) + levels, generator.normal(size=(3, 400)) + levels)
    assert (found.value < 0.01, found.low, found.high < 0.02) == (True, 0, True)
    true = generator.normal(size=(3, 400))
    assert r_squared(true - levels, true + levels).value == pytest.approx(1)


def test_r_squared_of_constants_and_of_the_truth_itself() -> None:
    true = np.random.default_rng(6).normal(size=(2, 100))
    assert r_squared(np.ones((2, 100)), true).value == 0
    assert r_squared(true, true).low == pytest.approx(1, abs=1e-9)


def test_a_shares_interval_is_scipys_exact_one() -> None:
    for hits, n in ((0, 20), (3, 20), (20, 20), (137, 1000)):
        interval = stats.binomtest(hits, n).proportion_ci(method="exact")
        found = share(hits, n)
        assert (found.value, found.low, found.high) == pytest.approx((hits / n, interval.low, interval.high))


def test_winners_are_the_nearest_of_each_block() -> None:
    distances = np.random.default_rng(7).normal(size=(3, 200)) + np.array([[0.0], [5.0], [-5.0]])
    valid = winners(distances, 0.1)
    for row, chosen in zip(distances, valid, strict=True):
        assert 19 <= chosen.sum() <= 21
        assert row[chosen].max() < row[~chosen].min()
    assert winners_among_best(distances, valid).value >= 0.95
    assert winners_among_best(-distances, valid).value == 0


# What a validator finds.


@pytest.mark.parametrize("tolerance", [0, 0.1, 1])
def test_a_mismatch_is_counted_proof_by_proof(tolerance: float) -> None:
    generator = np.random.default_rng(11)
    true = generator.normal(size=(3, 301)) + np.array([[0.0], [5.0], [-5.0]])
    claimed = true + 0.5 * generator.normal(size=true.shape)
    sent = invalid = 0
    for truths, claims in zip(true, claimed, strict=True):
        r_target = sorted(truths)[30]  # a tenth of the 300 others lie below
        for truth, claim in zip(truths, claims, strict=True):
            if claim < r_target:
                sent += 1
                invalid += truth > r_target + tolerance
    found = mismatch(claimed, true, 0.1, tolerance)
    assert found == share(invalid, sent)
    assert sent > invalid > 0


def test_a_mismatch_of_the_truth_is_none_and_of_guesses_is_that_of_chance() -> None:
    generator = np.random.default_rng(12)
    true = generator.normal(size=(2, 20000))
    assert mismatch(true, true, 0.1, 0).value == 0
    blind = mismatch(generator.normal(size=true.shape), true, 0.1, 0.5)
    chance = stats.norm.sf(stats.norm.ppf(0.1) + 0.5)
    assert blind.low < chance < blind.high
    assert mismatch(true + 10, true, 0.1, 0) == share(0, 0)  # nothing was sent


@pytest.mark.parametrize("proofs", [1, 100, 1000])
@pytest.mark.parametrize("mismatched", [0, 5e-4, 0.003, 0.05, 1])
def test_detection_is_that_of_the_binomial_test(mismatched: float, proofs: int) -> None:
    least = next(k for k in range(1, proofs + 1) if stats.binom.sf(k - 1, proofs, 5e-4) < 0.01)
    assert detection(mismatched, proofs) == pytest.approx(stats.binom.sf(least - 1, proofs, mismatched), abs=1e-12)


def test_detection_is_how_often_batches_are_judged_fraudulent() -> None:
    invalid = np.random.default_rng(13).binomial(1000, 0.003, size=4000)
    judged = [stats.binomtest(int(k), 1000, 5e-4, alternative="greater").pvalue < 0.01 for k in invalid]
    found = share(sum(judged), len(judged))
    assert found.low < detection(0.003, 1000) < found.high


# The gain.


def plain_gain(predicted: Floats, valid: Bools, cost: float, rest: float) -> float:
    """Two halves, each choosing for the other."""
    blocks, total = predicted.shape
    n = total // 2

    def hits(half: int, count: int) -> int:
        found = 0
        for guesses, truth in zip(predicted[:, half::2], valid[:, half::2], strict=True):
            found += sum(bool(truth[i]) for i in sorted(range(n), key=guesses.__getitem__)[:count])
        return found

    def gains(half: int, count: int) -> float:
        found: float = hits(half, count) / (blocks * n) / (cost + count / n * rest) / float(valid.mean())
        return found

    counts = sorted({round(c) for c in np.geomspace(math.ceil(LEAST_CHOSEN / blocks), n, CHOICES)})
    choices = [max(counts, key=lambda count: gains(half, count)) for half in range(2)]
    return sum(gains(1 - half, choice) for half, choice in enumerate(choices)) / 2


@pytest.mark.parametrize(("cost", "rest"), [(0, 1), (0.25, 1), (0.5, 0.5)])
def test_gain_is_the_plain_one(cost: float, rest: float) -> None:
    generator = np.random.default_rng(8)
    true = generator.normal(size=(2, 200))
    predicted = 0.7 * true + generator.normal(size=(2, 200))
    valid = winners(true, 0.1)
    assert gain(predicted, valid, cost=cost, rest=rest).value == pytest.approx(plain_gain(predicted, valid, cost, rest))


def test_who_knows_all_gains_what_a_prediction_saves() -> None:
    true = np.random.default_rng(9).normal(size=(2, 4000))
    found = gain(true, winners(true, 0.1), cost=0.25, rest=1)
    assert found.value == pytest.approx(1 / 0.35, rel=0.03)  # the valid tenth is all that is computed
    assert found.low < found.value < found.high


@pytest.mark.parametrize(("cost", "rest", "honest"), [(0, 1, 1), (0.5, 0.5, 1), (0.5, 1, 2 / 3)])
def test_who_knows_nothing_gains_nothing_on_average(cost: float, rest: float, honest: float) -> None:
    """Unbiased although the best share is chosen; and 95% intervals begin above the truth in 2.5% of cases."""
    generator = np.random.default_rng(10)
    found = [
        gain(generator.normal(size=(2, 300)), winners(generator.normal(size=(2, 300)), 0.1), cost=cost, rest=rest)
        for _ in range(1000)
    ]
    # To choose a small share costs the predictions too, so on average it is no more than at q = 1.
    assert np.mean([each.value for each in found]) < 1.03 * honest
    assert np.mean([each.low > honest for each in found]) < 0.035
