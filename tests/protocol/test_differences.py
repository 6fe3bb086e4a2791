"""The verdict by differences: its law, whom it accuses, whom it catches, and where it says nothing.

Against exact distributions where there are any, and else against simulation (seeded, so it cannot fail by chance).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.fft import irfft, next_fast_len, rfft
from scipy.integrate import quad

from pocd.protocol.differences import (
    LEAST_FOR_MEAN,
    RARE,
    SPREAD,
    THRESHOLD,
    HonestLaw,
    compare,
    honest_law,
    judge_differences,
    measures,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pocd.protocol.verdicts import DifferenceVerdict

    Floats = NDArray[np.float64]

HIDDEN = 32  # numbers of the vectors that are projected
NOISE = 0.03  # an honest result's error, as a share of the vector's length


# The law.


@pytest.mark.parametrize(
    ("numbers", "median", "rare", "mean", "deviation"),
    [(12, 0.923, 6.98, 0.763, 0.499), (1, 0.416, 11.02, 0.594, 0.667)],
)
def test_all_constants_follow_from_one_number(
    numbers: int, median: float, rare: float, mean: float, deviation: float
) -> None:
    law = honest_law(numbers)
    assert law.median == pytest.approx(median, abs=5e-4)
    assert law.rare == pytest.approx(rare, abs=5e-3)
    assert law.mean == pytest.approx(mean, abs=5e-4)
    assert law.deviation == pytest.approx(deviation, abs=5e-4)


@pytest.mark.parametrize("numbers", [1, 2, 12, 200])
def test_errors_of_one_size_leave_the_law_of_chi_square(numbers: int) -> None:
    law, plain = honest_law(numbers, 0.0), stats.chi2(numbers, scale=1 / numbers)
    assert law.median == pytest.approx(plain.median(), rel=1e-9)
    assert law.rare == pytest.approx(plain.isf(RARE), rel=1e-9)
    assert law.ceiling == pytest.approx(plain.isf(1e-4), rel=1e-9)
    moments = [
        quad(lambda x, power=power: math.log1p(min(x, law.ceiling)) ** power * plain.pdf(x), 0, 60, limit=300)[0]
        for power in (1, 2)
    ]
    assert law.mean == pytest.approx(moments[0], abs=1e-5)
    assert law.deviation == pytest.approx(math.sqrt(moments[1] - moments[0] ** 2), abs=1e-5)


@pytest.mark.parametrize("numbers", [1, 3, 12])
def test_the_law_is_that_of_simulated_ratios(numbers: int) -> None:
    law, ratios = honest_law(numbers), edge(np.random.default_rng(1), (400_000,), numbers)
    counted = np.log1p(np.minimum(ratios, law.ceiling))
    assert np.mean(ratios > law.median) == pytest.approx(0.5, abs=0.004)  # five standard errors, as below
    assert np.mean(ratios > law.rare) == pytest.approx(RARE, abs=0.0011)
    assert np.mean(ratios > law.ceiling) == pytest.approx(1e-4, abs=8e-5)
    assert counted.mean() == pytest.approx(law.mean, abs=5 * law.deviation / 632)
    assert counted.std() == pytest.approx(law.deviation, rel=0.01)
    assert stats.skew(counted) == pytest.approx(law.skewness, abs=0.03)


def edge(generator: np.random.Generator, shape: tuple[int, ...], numbers: int) -> Floats:
    """Ratios of an honest miner whose errors are as large as is allowed, by the law's words."""
    sizes = np.exp(SPREAD * generator.standard_normal(shape))
    return sizes * generator.chisquare(numbers, shape) / numbers


# Whom it accuses.


def mean_exceeds(law: HonestLaw, numbers: int, n: int, limit: float) -> float:
    """Probability that the mean of `n` nonces at the edge is `limit` or more, by convolution on a fine lattice."""
    steps = 500
    step = math.log1p(law.ceiling) / steps
    ratios = np.expm1((np.arange(steps + 1) + 0.5) * step)
    along = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    below = np.mean([stats.chi2.cdf(numbers * ratios / math.exp(SPREAD * z), numbers) for z in along], axis=0)
    below[-1] = 1.0
    masses = np.diff(below, prepend=0.0)  # each value counts as the nearest of the lattice
    size = n * steps + 1
    length = next_fast_len(size, real=True)
    total = irfft(rfft(masses, length) ** n, length)[:size]
    return float(total[math.ceil(limit * n / step) :].sum())


def least_accused_mean(law: HonestLaw, n: int) -> float:
    """The least mean that the test of the mean alone accuses."""
    low, high = 0.0, law.ceiling
    for _ in range(60):
        middle = (low + high) / 2
        p_mean = compare(np.full(n, middle), law).p_mean
        assert p_mean is not None
        low, high = (low, middle) if 2 * p_mean < THRESHOLD else (middle, high)
    return math.log1p(high)


@pytest.mark.parametrize("numbers", [1, 12])
@pytest.mark.parametrize("n", [20, 100, 300, 1000])
def test_at_the_edge_of_the_allowance_at_most_one_honest_batch_in_ten_thousand_is_accused(n: int, numbers: int) -> None:
    law = honest_law(numbers)
    by_mean = mean_exceeds(law, numbers, n, least_accused_mean(law, n))
    above = next(i for i in range(n) if 2 * stats.binom.sf(i - 1, n, RARE) < THRESHOLD)
    by_rare = float(stats.binom.sf(above - 1, n, RARE))
    assert 0.2 * THRESHOLD < by_mean + by_rare <= THRESHOLD


@pytest.mark.parametrize("n", range(1, LEAST_FOR_MEAN))
def test_of_few_nonces_the_counts_are_exact(n: int) -> None:
    law = honest_law(12)
    for above in range(n + 1):
        tests = compare(np.array([law.median * 1.01] * above + [law.median] * (n - above)), law)
        assert (tests.above_median, tests.above_rare, tests.p_mean, tests.p_rare) == (above, 0, None, 1.0)
        assert tests.p_median == pytest.approx(stats.binom.sf(above - 1, n, 0.5), rel=1e-9)
        tests = compare(np.array([law.rare * 1.01] * above + [law.rare] * (n - above)), law)
        assert tests.p_rare == pytest.approx(stats.binom.sf(above - 1, n, RARE), rel=1e-9)
        assert tests.probability == min(1.0, 2 * min(tests.p_median, tests.p_rare))


class World:
    """Vectors with errors that differ in size from nonce to nonce, alike for a miner and a validator."""

    def __init__(self, n: int, numbers: int, seed: int, *, noise: float = NOISE) -> None:
        self.generator = np.random.default_rng(seed)
        self.projections = self.generator.standard_normal((n, numbers, HIDDEN))
        self.vectors = self.directions()
        self.sizes = noise * np.exp(self.generator.normal(0, 0.5, n))
        self.reference = self.project(self.vectors)
        self.own_errors = np.square(self.error()).sum(axis=1)

    def directions(self) -> Floats:
        vectors: Floats = self.generator.standard_normal((len(self.projections), HIDDEN))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def error(self) -> Floats:
        """An honest result's error; two of one nonce differ in their squares' logarithm by SPREAD."""
        own = np.exp(self.generator.normal(0, SPREAD / math.sqrt(8), len(self.sizes)))
        error: Floats = (self.sizes * own)[:, None] * self.directions()
        return error

    def project(self, vectors: Floats) -> Floats:
        projected: Floats = np.einsum("nkh,nh->nk", self.projections, vectors)
        return projected

    def claims(self, factor: float = 1.0, share: float = 1.0) -> Floats:
        """Claims of a miner of whose results a share has errors `factor` times an honest one's."""
        cheap = self.generator.random(len(self.sizes)) < share
        return self.project(self.vectors + np.where(cheap, factor, 1.0)[:, None] * self.error())

    def judge(self, claims: Floats, allowance: float = 1.5) -> DifferenceVerdict:
        return judge_differences(claims.tolist(), self.reference, self.own_errors, allowance=allowance)


def accused(
    make: Callable[[World], Floats], n: int, *, numbers: int = 12, allowance: float = 1.5, batches: int = 100
) -> int:
    """Of 100 batches, how many are called fraud."""
    worlds = (World(n, numbers, seed) for seed in range(batches))
    return sum(world.judge(make(world), allowance).result == "fraud" for world in worlds)


@pytest.mark.parametrize("n", [20, 100, 300])
def test_honest_miners_are_not_accused(n: int) -> None:
    """Though their errors are 1.2 times the validator's."""
    assert accused(lambda world: world.claims(1.2), n) == 0
    assert accused(World.claims, n, numbers=1) == 0


def test_without_an_allowance_they_would_be() -> None:
    assert accused(lambda world: world.claims(1.8), 100, allowance=1.0) > 90


# Whom it catches.


def caught(*, n: int, factor: float, share: float = 1.0, allowance: float = 1.5, numbers: int = 12) -> float:
    """The share of batches called fraud where a share of nonces has errors `factor` times an honest one's."""
    generator = np.random.default_rng(n)
    law, ratios = honest_law(numbers), edge(generator, (200, n), numbers) / allowance**2
    ratios[generator.random(ratios.shape) < share] *= factor**2
    return float(np.mean([compare(batch, law).probability < THRESHOLD for batch in ratios]))


@pytest.mark.parametrize(
    ("numbers", "factor", "share", "allowance", "n"),
    [
        (12, 4, 1.0, 1.5, 20),
        (12, 2, 1.0, 1.5, 150),
        (12, 1.3, 1.0, 1.0, 150),
        (12, 4, 0.25, 1.5, 200),
        (12, 4, 0.1, 1.5, 1500),
        (12, 8, 0.25, 1.5, 100),
        (12, 8, 0.1, 1.5, 400),
        (1, 4, 1.0, 1.5, 50),
        (1, 2, 1.0, 1.5, 500),
        (1, 1.3, 1.0, 1.0, 500),
        (1, 4, 0.25, 1.5, 700),
        (1, 8, 0.25, 1.5, 200),
        (1, 8, 0.1, 1.5, 1000),
    ],
)
def test_so_many_nonces_catch_a_cheater_in_97_of_100_batches(
    numbers: int, factor: float, share: float, allowance: float, n: int
) -> None:
    assert caught(n=n, factor=factor, share=share, allowance=allowance, numbers=numbers) >= 0.97


def test_what_the_allowance_allows_is_never_called_fraud() -> None:
    assert caught(n=1000, factor=1.3) == 0
    assert caught(n=1000, factor=1.45, numbers=1) == 0


FREE: dict[str, Callable[[World], Floats]] = {
    "another miner's": lambda world: world.project(world.directions()),
    "the mean": lambda world: np.broadcast_to(world.reference.mean(axis=0), world.reference.shape),
    "zeros": lambda world: np.zeros_like(world.reference),
}


@pytest.mark.parametrize("claims", FREE.values(), ids=FREE)
def test_what_needs_no_computing_is_caught_by_a_few_nonces(claims: Callable[[World], Floats]) -> None:
    assert accused(claims, 3) == 100
    assert accused(claims, 20, numbers=1) == 100


def test_noise_on_top_gains_a_cheater_nothing() -> None:
    def noisier(amount: float) -> Callable[[World], Floats]:
        return lambda world: world.project(world.vectors + 1.8 * world.error() + amount * world.error())

    found = [accused(noisier(amount), 50) for amount in (0, 0.5, 1, 2)]
    assert found == sorted(found)
    assert found[0] < 90 < found[-1]


def test_noise_makes_no_verdict_undecidable() -> None:
    world = World(50, 12, 0)
    verdicts = [world.judge(world.claims(factor)) for factor in (1, 4, 1e3, 1e30)]
    assert len({verdict.probability_blank for verdict in verdicts}) == 1
    assert [verdict.result for verdict in verdicts] == ["honest", "fraud", "fraud", "fraud"]


MALFORMED: list[list[float | None] | None] = [
    None,
    [],
    [0.0] * 11,
    [0.0] * 13,
    [math.nan, *[0.0] * 11],
    [*[0.0] * 11, math.inf],
    [-math.inf, *[0.0] * 11],
    [*[0.0] * 5, None, *[0.0] * 6],
    [1e200] * 12,
]


@pytest.mark.parametrize("claim", MALFORMED)
def test_a_claim_that_is_no_vector_counts_as_the_largest_difference(claim: list[float | None] | None) -> None:
    world = World(30, 12, 7)
    good = world.claims().tolist()
    before = world.judge(world.claims(0))
    one = judge_differences([claim, *good[1:]], world.reference, world.own_errors)
    assert (one.malformed, one.claimed_errors[0], one.result) == (1, None, "honest")
    assert one.claimed.above_rare == before.claimed.above_rare + 1
    many = judge_differences([claim] * 6 + good[6:], world.reference, world.own_errors)
    assert (many.malformed, many.result) == (6, "fraud")


def test_one_wild_claim_accuses_nobody() -> None:
    """A bit of memory that flipped: it counts for no more than the 1 in 10,000 of the honest law."""
    for n in range(3, 40):
        world = World(n, 12, n)
        claims = world.claims()
        claims[0] = 6e4
        assert world.judge(claims).result == "honest"


# Where it says nothing.


@pytest.mark.parametrize(
    ("error", "results"),
    [(0.034, "honest"), (0.1, "honest"), (1.12, "undecidable"), (1.41, "undecidable")],
)
def test_where_the_validators_own_error_hides_all_it_is_undecidable(error: float, results: str) -> None:
    """Errors of a unit vector by bfloat16 at 8, 14 and 28 layers of `poc2`, and of vectors that nothing connects."""
    for n in (20, 100, 300):
        world = World(n, 12, n, noise=error)
        assert world.judge(world.claims()).result == results
        blank = {"honest": "fraud", "undecidable": "undecidable"}[results]
        assert world.judge(FREE["the mean"](world)).result == blank
        assert world.judge(100 * world.claims()).result == blank


def test_between_the_two_more_nonces_decide() -> None:
    few, many = (World(n, 12, 1, noise=0.15) for n in (3, 300))
    assert [few.judge(claims).result for claims in (FREE["zeros"](few), few.claims())] == ["undecidable"] * 2
    assert [many.judge(claims).result for claims in (FREE["zeros"](many), many.claims())] == ["fraud", "honest"]


def test_honest_results_that_nothing_connects_are_never_fraud() -> None:
    """Chaos: the miner's and the validator's results are as far from the reference as another nonce's."""
    for seed in range(200):
        world = World(100, 12, seed)
        own = world.project(world.directions())
        errors = np.square(own - world.reference).mean(axis=1)
        claims = world.project(world.directions()).tolist()
        assert judge_differences(claims, world.reference, errors).result == "undecidable"


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_nonces_decide_nothing(n: int) -> None:
    world = World(n, 12, 1)
    assert world.judge(1e6 * world.claims()).result == "undecidable"


def test_own_errors_above_a_quarter_of_the_scatter_of_the_whole_batch_measure_nothing() -> None:
    blank = np.array([1.0, 3.0, 8.0])
    found = [measures(share**2 * blank[[2, 0, 1]], blank) for share in (0.0, 0.001, 0.249, 0.251, 2.0)]
    assert found == [False, True, True, False, False]


def test_a_validator_whose_result_is_the_reference_has_no_measure() -> None:
    world = World(30, 12, 1)
    verdict = judge_differences((world.reference + 1e-9).tolist(), world.reference, np.zeros(30))
    assert verdict.result == "undecidable"
    once = np.where(np.arange(30) == 7, 0.0, world.own_errors)
    assert judge_differences(world.claims().tolist(), world.reference, once).result == "honest"


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("n", [20, 100, 300, 1000])
def test_who_chooses_another_expert_at_some_nonces_is_not_accused(n: int, share: float) -> None:
    """A router at its boundary makes a few errors ten times as large, not at the same nonces for a miner."""

    def claims(world: World) -> Floats:
        def sometimes() -> Floats:
            return np.where(world.generator.random(n) < share, 10.0, 1.0)

        own = sometimes()[:, None] * world.error()
        world.own_errors = np.square(own).sum(axis=1)
        return world.project(world.vectors + sometimes()[:, None] * world.error())

    assert accused(claims, n, batches=40) <= 1


# Properties.

worlds = st.builds(World, st.integers(1, 40), st.sampled_from([1, 3, 12]), st.integers(0, 2**32 - 1))
factors = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 5.0])


@given(world=worlds, factor=factors, data=st.data())
@settings(max_examples=50)
def test_the_order_of_nonces_does_not_matter(world: World, factor: float, data: st.DataObject) -> None:
    claims = world.claims(factor)
    order = data.draw(st.permutations(range(len(claims))))
    there = judge_differences(claims[order].tolist(), world.reference[order], world.own_errors[order])
    here = world.judge(claims)
    assert there.claimed == here.claimed
    assert there.probability_blank == pytest.approx(here.probability_blank, rel=1e-6)


@given(world=worlds, factor=factors, more=st.lists(st.floats(1, 1e6), min_size=40, max_size=40))
@settings(max_examples=50)
def test_a_larger_difference_never_looks_more_honest(world: World, factor: float, more: list[float]) -> None:
    differences = world.claims(factor) - world.reference
    stretched = np.array(more[: len(differences)])[:, None] * differences
    less, larger = (world.judge(world.reference + each) for each in (differences, stretched))
    assert larger.probability_honest <= less.probability_honest
    assert larger.probability_blank == less.probability_blank


@given(world=worlds, factor=factors, power=st.integers(-20, 20))
@settings(max_examples=50)
def test_units_do_not_matter(world: World, factor: float, power: int) -> None:
    claims, scale = world.claims(factor), 2.0**power
    scaled = judge_differences((scale * claims).tolist(), scale * world.reference, scale**2 * world.own_errors)
    here = world.judge(claims)
    assert (scaled.claimed, scaled.blank, scaled.result) == (here.claimed, here.blank, here.result)


@given(world=worlds, factor=factors, data=st.data())
@settings(max_examples=50)
def test_a_verdict_holds_all_it_follows_from(world: World, factor: float, data: st.DataObject) -> None:
    claims: list[list[float | None] | None] = [*world.claims(factor).tolist()]
    claims[data.draw(st.integers(0, len(claims) - 1))] = data.draw(st.sampled_from(MALFORMED))
    verdict = judge_differences(claims, world.reference, world.own_errors, allowance=1.25, threshold=1e-3)
    read = orjson.loads(orjson.dumps(asdict(verdict)))
    assert orjson.loads(orjson.dumps(verdict)) == read
    law = honest_law(read["numbers"], read["spread"])
    own = np.array(read["own_errors"])
    allowed = read["allowance"] ** 2 * np.maximum(own, np.quantile(own, 0.98) / 16)
    for name, probability in (("claimed", "probability_honest"), ("blank", "probability_blank")):
        errors = np.array([math.inf if each is None else each for each in read[f"{name}_errors"]])
        again = compare(errors / allowed, law)
        assert asdict(again) == read[name]
        assert again.probability == read[probability]
    if read["result"] != "undecidable":
        assert read["probability_blank"] < read["threshold"] == 1e-3
        assert (read["result"] == "fraud") == (read["probability_honest"] < read["threshold"])
