"""The verdict by counting on a mixture, against exact probabilities of nonces that differ in theirs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pocd.protocol.mixtures import BLANK, NEAR, judge_mixture
from pocd.protocol.proof import FRAUD_THRESHOLD, MISMATCH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

chances = st.sampled_from([0.0, NEAR, math.nextafter(NEAR, 1), 1.0]) | st.floats(0, 1) | st.floats(0, 0.01)


def tail(probabilities: Sequence[float]) -> NDArray[np.float64]:
    """Probability of at least 0, 1, …, n events of these probabilities: each event shifts the distribution."""
    law = np.array([1.0])
    for each in probabilities:
        law = np.append(law, 0) * (1 - each) + np.append(0, law) * each
    return law[::-1].cumsum()[::-1]


@given(nonces=st.lists(st.tuples(chances, st.booleans()), min_size=1, max_size=80))
def test_it_is_what_the_protocol_says(nonces: list[tuple[float, bool]]) -> None:
    turned, invalid = [chance for chance, _ in nonces], [is_bad for _, is_bad in nonces]
    found = judge_mixture(turned, invalid, MISMATCH, FRAUD_THRESHOLD)
    wide = [is_bad for chance, is_bad in nonces if chance <= NEAR]
    assert found.turned == tuple(turned)
    assert (found.near, found.near_invalid) == (len(nonces) - len(wide), sum(invalid) - sum(wide))
    each = [min(1.0, MISMATCH + chance) for chance in turned]
    assert found.mismatch == pytest.approx(sum(each) / len(each))

    def at_least(count: int, probabilities: list[float]) -> float:
        if count == 1:
            return float(tail(probabilities)[1])
        n = len(probabilities)
        return float(binomtest(count, n, math.fsum(probabilities) / n, alternative="greater").pvalue) if n else 1.0

    assert found.p_wide == pytest.approx(at_least(sum(wide), [MISMATCH] * len(wide)), rel=1e-9)
    assert found.p_all == pytest.approx(at_least(sum(invalid), each), rel=1e-9, abs=1e-300)
    assert found.p_quarter == pytest.approx(at_least(-(-len(nonces) // 4), each), rel=1e-9, abs=1e-300)
    assert found.decidable == (found.p_quarter < FRAUD_THRESHOLD)


@given(turned=st.lists(chances, min_size=1, max_size=60))
def test_the_mean_accuses_no_more_than_the_nonces_own_probabilities(turned: list[float]) -> None:
    exact = tail([min(1.0, MISMATCH + chance) for chance in turned])
    for bad in range(len(turned) + 1):
        found = judge_mixture(turned, [i < bad for i in range(len(turned))], MISMATCH, FRAUD_THRESHOLD)
        assert found.p_all > 0.1 or found.p_all >= exact[bad] * (1 - 1e-9) - 1e-15


@given(turned=st.lists(chances, min_size=1, max_size=80), data=st.data())
def test_no_claim_decides_what_is_near_or_decidable(turned: list[float], data: st.DataObject) -> None:
    verdicts = [
        judge_mixture(turned, data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), MISMATCH, FRAUD_THRESHOLD)
        for n in [len(turned)] * 2
    ]
    ours = ("turned", "near_above", "near", "mismatch", "p_quarter", "decidable")
    one, other = ([getattr(each, name) for name in ours] for each in verdicts)
    assert one == other


@pytest.mark.parametrize(("mean", "enough"), [(0.0, 1), (0.01, 5), (0.05, 13), (0.1, 33), (0.15, 89), (0.2, 389)])
def test_so_many_nonces_are_enough(mean: float, enough: int) -> None:
    """The table in docs/protocol.md: from so many on, and a batch that nobody computed is then fraud."""
    for n in range(enough, enough + 40):
        blank = judge_mixture([mean] * n, [i < math.ceil(BLANK * n) for i in range(n)], MISMATCH, FRAUD_THRESHOLD)
        assert blank.decidable
        assert min(blank.p_wide, blank.p_all) < FRAUD_THRESHOLD
    if enough > 1:
        fewer = [judge_mixture([mean] * n, [False] * n, MISMATCH, FRAUD_THRESHOLD) for n in range(1, enough)]
        assert not fewer[-1].decidable


@pytest.mark.parametrize("n", [1, 20, 1000, 100_000])
def test_where_every_nonce_turns_nothing_is_ever_decided(n: int) -> None:
    assert not judge_mixture([0.25] * n, [True] * n, MISMATCH, FRAUD_THRESHOLD).decidable
