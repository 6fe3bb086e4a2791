"""The verdict by differences on a batch: how it is fed, what is shown of it, and that it decides on vectors alone."""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest

from pocd.protocol.differences import judge_differences
from pocd.protocol.vectors import rounding_variance
from pocd.validation.claim import AnyClaim, parse_json
from pocd.validation.verdict import Recomputed, judge
from tests.validation.test_verdict import TERMS, claim_of

if TYPE_CHECKING:
    from collections.abc import Sequence

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


# Vectors.

SIZE = 64  # of what is projected
VECTORS = replace(TERMS, scheme="poc4", r_target=None, dtype="bfloat16", tolerance=0.15)


class World:
    """Readouts with an honest error, and their projections, as the protocol makes them."""

    def __init__(self, noise: float = 0.01, seed: int = 3, count: int = COUNT) -> None:
        self._generator = np.random.default_rng(seed)
        self._noise = noise
        self.projections = self._generator.standard_normal((count, 12, SIZE))
        self.readouts = self._generator.standard_normal((count, SIZE)) / np.sqrt(SIZE)
        own = self.error()
        numbers = [self._project(self.readouts + own), self._project(self.readouts)]
        own_by_nonce, reference = (dict(enumerate(each.tolist())) for each in numbers)
        self.found = Recomputed(own_by_nonce, reference, dict(enumerate(np.square(own).sum(axis=1).tolist())))

    def error(self) -> Any:  # noqa: ANN401 - an array
        return self._noise * self._generator.standard_normal(self.readouts.shape) / np.sqrt(SIZE)

    def _project(self, readouts: Any) -> Any:  # noqa: ANN401 - as above
        return np.einsum("nkh,nh->nk", self.projections, readouts)

    def claims(self, factor: float = 1.0) -> list[tuple[int, bytes]]:
        numbers = self._project(self.readouts + factor * self.error())
        return [(nonce, row.astype("<f2").tobytes()) for nonce, row in enumerate(numbers)]


def judged(world: World, claims: Sequence[tuple[int, bytes | None]], **terms: Any) -> dict[str, Any]:  # noqa: ANN401 - any term
    artifacts = [
        {"nonce": nonce, "vector_b64": None if vector is None else b64encode(vector).decode()}
        for nonce, vector in claims
    ]
    said = {"public_key": "02ab", "block_hash": "9F2E", "block_height": 7, "artifacts": artifacts}
    claim = parse_json(AnyClaim, orjson.dumps(said)).root
    batch = judge(claim, replace(VECTORS, **terms), world.found, None, None)
    body: dict[str, Any] = orjson.loads(batch.to_json())
    return body


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "honest"), (1.3, "honest"), (4.0, "fraud")])
def test_vectors_are_judged_by_their_differences(factor: float, verdict: str) -> None:
    world = World()
    claims = world.claims(factor)
    body = judged(world, [*claims])
    assert (body["verdict"], body["fraud_detected"]) == (verdict, verdict == "fraud")
    assert body["differences"]["result"] == verdict
    assert (body["n_invalid"], body["probability_honest"]) == (0, 1.0)
    assert not {"dist", "received_dist", "reference_dist", "r_target"} & body.keys()
    lengths = {name: {len(b64decode(text)) for text in body[name]} for name in ("received_vectors", "vectors")}
    assert lengths == {"received_vectors": {24}, "vectors": {24}}
    assert [b64decode(text) for text in body["received_vectors"]] == [vector for _, vector in claims]
    exact = np.frombuffer(b64decode(body["reference_vectors"][5]), "<f4")
    assert world.found.reference is not None
    assert exact == pytest.approx(world.found.reference[5], abs=1e-5)


def test_vectors_that_hold_nothing_are_fraud_and_chaos_is_undecidable() -> None:
    world, other = World(), World(seed=4)
    zeros: list[tuple[int, bytes | None]] = [(nonce, bytes(24)) for nonce in range(COUNT)]
    assert judged(world, zeros)["verdict"] == "fraud"
    assert judged(world, [*other.claims()])["verdict"] == "fraud"
    chaos = World(noise=1.2)
    everything: list[list[tuple[int, bytes | None]]] = [[*chaos.claims()], zeros]
    for claims in everything:
        body = judged(chaos, claims)
        assert (body["verdict"], body["fraud_detected"]) == ("undecidable", False)


BAD = [None, b"", bytes(22), bytes(26), np.full(12, np.nan, "<f2").tobytes(), np.full(12, np.inf, "<f2").tobytes()]


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_vector_of_finite_numbers_counts_against_the_miner(bad: bytes | None) -> None:
    """Also beside good claims of the same nonce, and where the validator's own error decides nothing."""
    world = World()
    claims: list[tuple[int, bytes | None]] = [*world.claims()]
    one = judged(world, [*claims, (7, bad)])
    assert (one["verdict"], one["non_finite"], one["impossible_claims"], one["duplicates"]) == ("honest", 1, 1, 1)
    assert (one["n_invalid"], one["differences"]["malformed"]) == (1, 1)
    assert one["received_vectors"][-1] is None
    assert one["valid"].count(False) == 2
    assert set(one["suspicions"]) == {"impossible_claims", "duplicates"}
    for judging in (world, World(noise=1.2)):
        many = judged(judging, [(nonce, bad) for nonce in range(5)] + claims[5:])
        assert many["verdict"] == "fraud"


def test_in_float32_what_float16_leaves_of_vectors_decides() -> None:
    """An honest miner's float32 errs by nothing against the rounding of what travels; float16's errs by more."""
    world = World(noise=1e-6)
    assert judged(world, [*world.claims()], dtype="float32")["verdict"] == "honest"
    assert judged(world, [*world.claims(2e3)], dtype="float32")["verdict"] == "fraud"
