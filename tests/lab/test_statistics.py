"""Theory against scipy.stats, against itself, and against simulation (seeded, so it cannot fail by chance)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from pocd.lab.statistics import (
    block_rates,
    geometry_std,
    head_valid_rate,
    quantile_interval,
    rate_intervals,
    spread_of_rates,
)
from pocd.protocol.proof import MISMATCH
from pocd.protocol.theory import distance_moments, expected_valid_rate, probability_honest, r_target_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

dimensions = st.sampled_from([2, 3, 32, 256, 8192, 151_936])
rates = st.floats(1e-6, 1 - 1e-6)


def unit(vectors: Floats) -> Floats:
    norms: Floats = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / norms


def random_head(generator: np.random.Generator, hidden_size: int, dimension: int) -> tuple[Floats, Floats]:
    """W [D, H] of standard normals and a unit target [D]."""
    return generator.standard_normal((dimension, hidden_size)), unit(generator.standard_normal(dimension))


def simulated(head: Floats, target: Floats, count: int, generator: np.random.Generator) -> Floats:
    """Distances of uniform hidden states."""
    # ‖W h‖ = ‖L'h‖ with WᵀW = L L': [H, H] in place of [D, H].
    root = np.linalg.cholesky(head.T @ head)
    h = generator.standard_normal((count, head.shape[1]))
    cosines = h @ (head.T @ target) / np.linalg.norm(h @ root, axis=1)
    distances: Floats = np.sqrt(2 - 2 * cosines)
    return distances


# Uniformly random outputs.


@given(dimension=dimensions, rate=rates)
def test_the_target_of_a_rate_gives_that_rate(dimension: int, rate: float) -> None:
    r_target = r_target_for(rate, dimension)
    assert expected_valid_rate(r_target, dimension) == pytest.approx(rate, rel=1e-9)
    beta = stats.beta((dimension - 1) / 2, (dimension - 1) / 2)
    assert r_target == pytest.approx(2 * math.sqrt(beta.ppf(rate)), rel=1e-9)


def test_the_known_target() -> None:
    assert r_target_for(0.1, 8192) == pytest.approx(1.4042, abs=5e-5)
    assert (r_target_for(0, 8192), r_target_for(1, 8192)) == (0, 2)


@pytest.mark.parametrize("dimension", [3, 32, 8192])
def test_mean_and_deviation_of_the_distance(dimension: int) -> None:
    half = (dimension - 1) / 2
    quantiles = np.sqrt(stats.beta(half, half).ppf((np.arange(200_000) + 0.5) / 200_000)) * 2
    assert distance_moments(dimension) == pytest.approx((quantiles.mean(), quantiles.std()), rel=2e-4)


def test_the_deviation_in_many_dimensions() -> None:
    """A difference of nearly equal numbers, where digits could be lost."""
    assert distance_moments(151_936)[1] == pytest.approx(1 / math.sqrt(2 * 151_936), rel=1e-5)


def test_behind_random_heads_any_hidden_state_is_as_good_as_uniform_outputs() -> None:
    generator = np.random.default_rng(1)
    h = np.ones(8)
    heads = generator.standard_normal((4000, 32, 8))
    targets = unit(generator.standard_normal((4000, 32)))
    distances = np.linalg.norm(unit(heads @ h) - targets, axis=1)
    assert stats.kstest(distances, np.vectorize(lambda d: expected_valid_rate(d, 32))).pvalue > 0.05


# Within a block.


@pytest.mark.parametrize(("hidden_size", "dimension"), [(3, 5), (32, 64), (128, 256), (128, 8192)])
def test_a_heads_rate_is_what_simulation_finds(hidden_size: int, dimension: int) -> None:
    generator = np.random.default_rng(2)
    head, target = random_head(generator, hidden_size, dimension)
    count = 100_000
    distances = simulated(head, target, count, generator)
    for rate in (0.02, 0.1, 0.7):
        r_target = r_target_for(rate, dimension)
        exact = head_valid_rate(r_target, head.T @ head, head.T @ target)
        error = math.sqrt(exact * (1 - exact) / count)
        assert (distances < r_target).mean() == pytest.approx(exact, abs=3.5 * error)


def test_a_trained_heads_rate_is_what_simulation_finds() -> None:
    """Singular values over three decades: no approximation by ‖W't‖ alone would do."""
    generator = np.random.default_rng(3)
    head, _ = random_head(generator, 24, 96)
    head *= np.geomspace(1, 1000, 24)
    target = unit(head.sum(axis=1))
    distances = simulated(head, target, 100_000, generator)
    for r_target in (0.5, 1.0, 1.3):
        exact = head_valid_rate(r_target, head.T @ head, head.T @ target)
        assert 0.01 < exact < 0.6
        assert (distances < r_target).mean() == pytest.approx(exact, abs=0.005)


@given(
    hidden_size=st.integers(2, 100), rate=st.floats(1e-3, 1 - 1e-3), aim=st.floats(0.1, 1), scale=st.floats(0.01, 100)
)
def test_an_orthogonal_heads_rate_is_a_beta_distribution(
    hidden_size: int, rate: float, aim: float, scale: float
) -> None:
    """W'W = 1 makes c = ‖W't‖ u, with u one coordinate of a uniform unit vector."""
    half = (hidden_size - 1) / 2
    cosine = aim * (1 - 2 * stats.beta(half, half).ppf(rate))
    r_target = math.sqrt(2 - 2 * cosine)
    vector = np.zeros(hidden_size)
    vector[0] = aim * scale
    assert head_valid_rate(r_target, np.eye(hidden_size) * scale**2, vector) == pytest.approx(rate, rel=1e-8)


def test_a_wide_heads_rate() -> None:
    """With D < H every output can be reached, and W'W is singular."""
    generator = np.random.default_rng(4)
    head, target = random_head(generator, 64, 16)
    h = generator.standard_normal((100_000, 64))
    distances = np.linalg.norm(unit(h @ head.T) - target, axis=1)
    exact = head_valid_rate(1.1, head.T @ head, head.T @ target)
    assert (distances < 1.1).mean() == pytest.approx(exact, abs=0.004)


def test_a_heads_rate_at_the_ends() -> None:
    generator = np.random.default_rng(5)
    head, target = random_head(generator, 16, 64)
    gram, aim = head.T @ head, head.T @ target
    nearest = math.sqrt(2 - 2 * math.sqrt(aim @ np.linalg.solve(gram, aim)))
    assert [head_valid_rate(r, gram, aim) for r in (0.0, nearest - 1e-9, 2.0)] == [0, 0, 1]
    assert head_valid_rate(nearest + 1e-3, gram, aim) > 0
    assert head_valid_rate(math.sqrt(2), gram, aim) == pytest.approx(0.5)


# Over blocks.


@pytest.mark.parametrize(("hidden_size", "dimension", "rate"), [(16, 64, 0.1), (16, 64, 0.8), (24, 96, 0.02)])
def test_the_geometry_floor_is_what_random_heads_give(hidden_size: int, dimension: int, rate: float) -> None:
    generator = np.random.default_rng(6)
    r_target = r_target_for(rate, dimension)
    found = np.empty(600)
    for i in range(len(found)):
        head, target = random_head(generator, hidden_size, dimension)
        found[i] = head_valid_rate(r_target, head.T @ head, head.T @ target)
    # The deviation of 600 rates is known to about 3%.
    assert found.std() == pytest.approx(geometry_std(rate, hidden_size, dimension), rel=0.1)
    assert found.mean() == pytest.approx(rate, abs=4 * found.std() / math.sqrt(len(found)))


def test_the_geometry_floor_of_a_vocabularys_head() -> None:
    """H = 128 and D = 256: W'W spreads widely, and ‖W't‖ still tells a block's rate."""
    generator = np.random.default_rng(7)
    exact, near = np.empty(40), np.empty(40)
    for i in range(len(exact)):
        head, target = random_head(generator, 128, 256)
        gram, aim = head.T @ head, head.T @ target
        exact[i] = head_valid_rate(r_target_for(0.1, 256), gram, aim)
        near[i] = block_rates(0.1, 128, 256, aim @ aim / np.trace(gram))
    assert near == pytest.approx(exact, abs=0.001)


@pytest.mark.parametrize(("hidden_size", "points"), [(128, 1.4), (1024, 0.5)])
def test_the_geometry_floor_is_the_known_one(hidden_size: int, points: float) -> None:
    assert 100 * geometry_std(0.1, hidden_size, 8192) == pytest.approx(points, abs=0.03)
    assert geometry_std(0.5, hidden_size, 8192) == pytest.approx(0, abs=1e-12)


# Honest or not.


@given(n=st.integers(0, 5000), share=st.floats(0, 1), mismatch=st.floats(1e-5, 0.2))
def test_the_probability_of_honesty_is_the_binomial_test(n: int, share: float, mismatch: float) -> None:
    n_invalid = round(n * share**4)  # small counts above all
    expected = stats.binomtest(n_invalid, n, mismatch, alternative="greater").pvalue if n else 1
    assert probability_honest(n_invalid, n, mismatch) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_the_probability_of_honesty_by_default() -> None:
    assert probability_honest(0, 1000, MISMATCH) == 1
    assert probability_honest(1, 1, MISMATCH) == pytest.approx(5e-4)
    assert probability_honest(1, 1000, MISMATCH) == pytest.approx(1 - (1 - 5e-4) ** 1000)


@pytest.mark.parametrize(("n_invalid", "n", "mismatch"), [(-1, 5, 0.1), (6, 5, 0.1), (1, 5, 1.5), (1, 5, math.nan)])
def test_impossible_counts_are_refused(n_invalid: int, n: int, mismatch: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        probability_honest(n_invalid, n, mismatch)


# Intervals.


@pytest.mark.parametrize("between", [0.0, 0.3, 2.0])
def test_the_quantiles_interval_holds_the_truth_as_often_as_it_says(between: float) -> None:
    """Normal distances whose blocks' means differ by `between` standard deviations."""
    generator = np.random.default_rng(8)
    truth = stats.norm.ppf(0.1) * math.sqrt(1 + between**2)
    held = 0
    for _ in range(400):
        distances = generator.standard_normal((5, 300)) + between * generator.standard_normal((5, 1))
        low, high = quantile_interval(distances, 0.1)
        held += low <= truth <= high
    assert 0.915 <= held / 400 < 1


def test_blocks_that_agree_by_chance_leave_an_interval() -> None:
    low, high = quantile_interval(np.tile(np.linspace(1, 2, 100), (2, 1)), 0.5)
    assert low < 1.45
    assert high > 1.55


@given(n=st.integers(1, 3000), share=st.floats(0, 1))
def test_one_blocks_interval_is_clopper_and_pearsons(n: int, share: float) -> None:
    k = round(n * share)
    low, high = rate_intervals(np.array([k]), np.array([n]))
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_intervals_of_many_blocks_hold_all_at_once() -> None:
    generator = np.random.default_rng(9)
    checked, truth = np.full(20, 400), np.linspace(0.02, 0.3, 20)
    held = 0
    for _ in range(1000):
        low, high = rate_intervals(generator.binomial(checked, truth), checked)
        held += bool(((low <= truth) & (truth <= high)).all())
    assert 950 <= held < 995


# The spread.

counts = st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 1)), min_size=2, max_size=8)


@settings(max_examples=40)
@given(counts)
def test_a_spread_lies_in_its_interval_and_all_are_shares(blocks: list[tuple[int, float]]) -> None:
    checked = np.array([n for n, _ in blocks])
    valid = np.array([round(n * share) for n, share in blocks])
    found = spread_of_rates(valid, checked, hidden_size=64, dimension=8192, generator=np.random.default_rng(0))
    by_hand = [k / n for k, n in zip(valid, checked, strict=True)]
    assert found.spread == pytest.approx(max(by_hand) - min(by_hand))
    assert 0 <= found.low <= found.spread + 1e-9
    assert found.spread <= found.high + 1e-9 <= 1 + 1e-9
    assert 0 <= found.floor_mean <= 1
    assert 0 <= found.floor_95 <= 1
    assert 0 < found.p_value <= 1


@settings(max_examples=20)
@given(counts)
def test_what_exceeds_the_floor_lies_above_its_95th_percentile(blocks: list[tuple[int, float]]) -> None:
    checked = np.array([n for n, _ in blocks])
    valid = np.array([round(n * (0.1 + share / 20)) for n, share in blocks])
    found = spread_of_rates(valid, checked, hidden_size=64, dimension=8192, generator=np.random.default_rng(0))
    assume(abs(found.spread - found.floor_95) > 1e-3)
    assert found.exceeds_floor == (found.spread > found.floor_95)


def test_without_a_head_the_floor_is_sampling_noise_alone() -> None:
    generator = np.random.default_rng(11)
    for n in (100, 200_000):
        k = np.full(2, n // 10)
        found = spread_of_rates(k, np.full(2, n), hidden_size=None, dimension=128, generator=generator)
        assert found.floor_mean == pytest.approx(2 / math.sqrt(math.pi) * math.sqrt(0.09 / n), rel=0.03)


def test_the_floor_is_sampling_noise_and_geometry() -> None:
    """Of two blocks: the mean of |difference| is 2/√π of one's deviation."""
    generator = np.random.default_rng(10)
    for n in (100, 2000, 200_000):
        k = np.full(2, n // 10)
        found = spread_of_rates(k, np.full(2, n), hidden_size=128, dimension=8192, generator=generator)
        deviation = math.hypot(math.sqrt(0.09 / n), geometry_std(0.1, 128, 8192))
        assert found.floor_mean == pytest.approx(2 / math.sqrt(math.pi) * deviation, rel=0.03)
        assert found.floor_95 == pytest.approx(1.96 * math.sqrt(2) * deviation, rel=0.06)
        assert (found.spread, found.p_value, found.exceeds_floor) == (0, 1, False)


def test_with_a_target_per_nonce_the_floor_is_sampling_noise_alone() -> None:
    k, n = np.full(2, 20_000), np.full(2, 200_000)
    found = spread_of_rates(k, n, hidden_size=None, dimension=128, generator=np.random.default_rng(10))
    assert found.floor_mean == pytest.approx(2 / math.sqrt(math.pi) * math.sqrt(0.09 / 200_000), rel=0.03)
