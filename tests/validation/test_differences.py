"""The verdict by differences on a batch: how it is fed, what is shown of it, and that it decides on vectors alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest

from pocd.protocol.differences import judge_differences
from pocd.protocol.vectors import rounding_variance
from pocd.validation.verdict import Recomputed, judge
from tests.validation.test_verdict import TERMS, claim_of

COUNT = 60
HALF = replace(TERMS, r_target=2.0, dtype="bfloat16", tolerance=2e-3)
RNG = np.random.default_rng(4)
REFERENCE = RNG.normal(1.41, 0.01, COUNT)
OWN = REFERENCE + RNG.normal(0, 2e-4, COUNT)
FOUND = Recomputed(
    {nonce: (float(value),) for nonce, value in enumerate(OWN)},
    {nonce: (float(value),) for nonce, value in enumerate(REFERENCE)},
    dict.fromkeys(range(COUNT), 4e-8),
)


def body_of(claims: list[tuple[int, float | None]], sample: int | None = None, **terms: Any) -> dict[str, Any]:  # noqa: ANN401 - any term
    claim = claim_of([nonce for nonce, _ in claims], [claimed for _, claimed in claims])
    batch = judge(claim, replace(HALF, **terms), FOUND, sample, None if sample is None else "seed")
    body: dict[str, Any] = orjson.loads(batch.to_json())
    return body


def honest(scale: float = 2e-4) -> list[tuple[int, float | None]]:
    noise = np.random.default_rng(9).normal(0, scale, COUNT)
    return [(nonce, float(value)) for nonce, value in enumerate(REFERENCE + noise)]


def test_distances_are_judged_by_the_count_and_their_differences_are_shown_beside_it() -> None:
    for scale, result in ((2e-4, "honest"), (2e-3, "fraud")):
        body = body_of(honest(scale))
        assert (body["verdict"], body["fraud_detected"]) == ("honest", False)
        assert body["differences"]["result"] == result
        assert body["reference_dist"] == REFERENCE.tolist()
        assert "vectors" not in body
        assert len(body["differences"]["own_errors"]) == COUNT


def test_a_sample_is_judged_by_its_nonces_in_their_order() -> None:
    body = body_of(honest()[::-1], sample=25)
    assert body["n"] == 25
    found = body["differences"]
    for nonce, claimed, error in zip(body["nonces"], body["received_dist"], found["claimed_errors"], strict=True):
        assert error == pytest.approx((claimed - REFERENCE[nonce]) ** 2)


@pytest.mark.parametrize("other", [1.5, 1e308, None])
def test_of_a_nonce_that_is_claimed_repeatedly_the_worst_claim_counts(other: float | None) -> None:
    good = honest()
    expected = body_of([(0, other), *good[1:]])["differences"]
    for claims in ([(0, other), *good], [*good, (0, other)], [*good, (0, other), good[0]]):
        found = body_of(claims)["differences"]
        assert len(found["claimed_errors"]) == COUNT
        assert found["claimed"] == expected["claimed"]
    assert expected["malformed"] == (other != 1.5)


def test_what_one_target_does_to_all_errors_of_a_block_is_allowed_for() -> None:
    """The own distances err twice as much as their vectors foretell: so may a miner's."""
    foretold = replace(FOUND, errors=dict.fromkeys(range(COUNT), 1e-8))
    claim = claim_of(list(range(COUNT)), [claimed for _, claimed in honest()])
    batch = judge(claim, HALF, foretold, None, None)
    assert batch.differences is not None
    assert batch.differences.own_errors[0] == pytest.approx(np.square(OWN - REFERENCE).mean(), rel=1e-6)
    assert batch.differences.result == "honest"
    generous = judge(claim, HALF, replace(FOUND, errors=dict.fromkeys(range(COUNT), 1e-4)), None, None)
    assert generous.differences is not None
    assert generous.differences.own_errors[0] == pytest.approx(1e-4)


def test_the_allowance_is_the_networks() -> None:
    results = [body_of(honest(8e-4), allowance=allowance)["differences"] for allowance in (1.0, 1.5, 4.0)]
    assert [found["allowance"] for found in results] == [1.0, 1.5, 4.0]
    assert [found["result"] for found in results] == ["fraud", "fraud", "honest"]


def test_where_distances_are_chaos_the_differences_say_nothing() -> None:
    chaos = replace(FOUND, errors=dict.fromkeys(range(COUNT), 1e-4))
    batch = judge(claim_of(list(range(COUNT)), [1.41] * COUNT), HALF, chaos, None, None)
    assert batch.differences is not None
    assert batch.differences.result == "undecidable"
    assert batch.verdict == "honest"


def test_float16_adds_a_twelfth_of_its_squared_steps() -> None:
    exact = np.random.default_rng(1).normal(0, 1, (20_000, 12))
    rounded = exact.astype(np.float16).astype(np.float64)
    expected = rounding_variance(exact)
    assert np.square(rounded - exact).mean() == pytest.approx(expected.mean(), rel=0.02)
    assert rounding_variance(np.zeros((1, 12)))[0] == pytest.approx(2.0**-48 / 12)
    assert np.isfinite(rounding_variance(np.full((1, 12), 1e30))).all()
    assert judge_differences([[1.0] * 12], np.ones((1, 12)), rounding_variance(np.ones((1, 12)))).malformed == 0
