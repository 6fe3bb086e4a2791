"""The verdict on a batch, against a plain implementation of docs/protocol.md section 5."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pocd.protocol.proof import FRAUD_THRESHOLD, MISMATCH
from pocd.validation.claim import Claim, VectorClaim, parse_json
from pocd.validation.conditions import MismatchError
from pocd.validation.verdict import Recomputed, Terms, check, judge, round_of, sampled

if TYPE_CHECKING:
    from pocd.protocol.proof import ValidatedBatch

R, TOLERANCE = 1.4, 0.001
TERMS = Terms(
    r_target=R,
    fraud_threshold=FRAUD_THRESHOLD,
    mismatch=MISMATCH,
    tolerance=TOLERANCE,
    scheme="poc2",
    model="tiny",
    model_fingerprint="f00d",
    dtype="float16",
    seq_len=16,
    node_count=1,
)


def claim_of(nonces: list[int], dist: list[float | None], **said: Any) -> Claim:  # noqa: ANN401 - any field
    body = {"public_key": "02ab", "block_hash": "9F2E", "block_height": 7, "nonces": nonces, "dist": dist, **said}
    return parse_json(Claim, json.dumps(body).encode())


def of_distances(distances: dict[int, float]) -> Recomputed:
    return Recomputed({nonce: (distance,) for nonce, distance in distances.items()})


def verdict(
    nonces: list[int],
    dist: list[float | None],
    distances: dict[int, float] | None = None,
    **said: Any,  # noqa: ANN401 - any field
) -> ValidatedBatch:
    """Judge by `TERMS`; distances are as claimed unless given."""
    true = {nonce: 1.39 if claimed is None else claimed for nonce, claimed in zip(nonces, dist, strict=True)}
    return judge(claim_of(nonces, dist, **said), TERMS, of_distances(true | (distances or {})), None, None)


# The whole against a plain implementation, which knows nothing of sets.


def plain(
    nonces: list[int],
    dist: list[float | None],
    distances: dict[int, float],
    terms: Terms,
    *,
    node: tuple[int, int | None],
    drawn: list[int],
) -> dict[str, Any]:
    """Every field that a verdict counts."""
    r_target = terms.r_target
    assert r_target is not None
    entries = list(range(len(nonces)))
    claims = [value if value is not None and math.isfinite(value) else None for value in dist]
    distinct = [nonce for i, nonce in enumerate(nonces) if nonce not in nonces[:i]]
    mine = {nonce: [claims[i] for i in entries if nonces[i] == nonce] for nonce in distinct}

    def impossible(nonce: int) -> bool:
        return any(value is None or value < 0 or value >= r_target for value in mine[nonce])

    def invalid(nonce: int) -> bool:
        return impossible(nonce) or distances[nonce] >= r_target + terms.tolerance

    def differences(nonce: int) -> list[float]:
        return [abs(value - distances[nonce]) for value in mine[nonce] if value is not None]

    shown = [i for i in entries if nonces[i] in drawn]
    bad, worst = sum(map(invalid, drawn)), sum(map(impossible, distinct))
    probability = min(
        binomtest(count, total, terms.mismatch, alternative="greater").pvalue
        for count, total in ((bad, len(drawn)), (worst, len(distinct)))
    )
    node_id, said_count = node
    node_count = said_count or terms.node_count
    farthest = max(nonces)
    found: dict[str, Any] = {
        "nonces": [nonces[i] for i in shown],
        "received_dist": [claims[i] for i in shown],
        "dist": [distances[nonces[i]] for i in shown],
        "valid": [not invalid(nonces[i]) for i in shown],
        "n": len(drawn),
        "n_invalid": bad,
        "n_batch": len(distinct),
        "impossible_claims": worst,
        "duplicates": sum(nonces[i] in nonces[:i] for i in entries),
        "non_finite": sum(value is None for value in claims),
        "node_id": node_id,
        "node_count": node_count,
        "density": len(distinct) * node_count / farthest if farthest else 1.0,
        "sparse": Fraction(farthest, node_count) / len(distinct) >= 100,
        "shifted": sum(any(each > terms.tolerance for each in differences(nonce)) for nonce in drawn),
        "largest_difference": max((each for nonce in drawn for each in differences(nonce)), default=None),
        "probability_honest": pytest.approx(probability, rel=1e-9),
        "fraud_detected": probability < terms.fraud_threshold,
    }
    odd = {
        "impossible_claims": worst > 0,
        "duplicates": found["duplicates"] > 0,
        "sparse": found["sparse"],
        "shifted": found["shifted"] > 0,
        "other_node": said_count is not None
        and any(nonce not in range(node_id, 2**63, said_count) for nonce in nonces),
    }
    return found | {"suspicions": [word for word, is_so in odd.items() if is_so]}


EDGES = [R, math.nextafter(R, 0), R + TOLERANCE, math.nextafter(R + TOLERANCE, 0), 0.0, math.nextafter(0, -1)]
claimed = st.none() | st.sampled_from([*EDGES, math.nan, math.inf, -math.inf, 1e308]) | st.floats(1.3, 1.5)
recomputed = st.sampled_from(EDGES[:5]) | st.floats(1.3, 1.5)
nonces = st.integers(0, 12) | st.sampled_from([199, 200, 10_000, 2**53 + 1, 2**63 - 1])


@given(
    entries=st.lists(st.tuples(nonces, claimed), min_size=1, max_size=30),
    data=st.data(),
    mismatch=st.sampled_from([MISMATCH, 0.07]),
    threshold=st.sampled_from([FRAUD_THRESHOLD, 0.3]),
    node=st.tuples(st.integers(0, 3), st.none() | st.integers(1, 4) | st.just(2**63 - 1)),
    sample=st.none() | st.integers(1, 32),
)
def test_a_verdict_is_what_the_protocol_says(
    entries: list[tuple[int, float | None]],
    data: st.DataObject,
    mismatch: float,
    threshold: float,
    node: tuple[int, int | None],
    sample: int | None,
) -> None:
    theirs, dist = [nonce for nonce, _ in entries], [value for _, value in entries]
    distances = {nonce: data.draw(recomputed) for nonce in theirs}
    terms = replace(TERMS, mismatch=mismatch, fraud_threshold=threshold, node_count=3)
    seed = None if sample is None else "tomorrow's block"
    claim = claim_of(theirs, dist, node_id=node[0], node_count=node[1])
    drawn = sampled(theirs, sample, seed)
    only_drawn = {nonce: distances[nonce] for nonce in drawn}
    body = orjson.loads(judge(claim, terms, of_distances(only_drawn), sample, seed).to_json())

    expected = plain(theirs, dist, distances, terms, node=node, drawn=list(drawn))
    assert {name: body[name] for name in expected} == expected
    assert {name: body[name] for name in body.keys() - expected.keys() - {"batch_id"}} == {
        "public_key": "02ab",
        "block_hash": "9F2E",
        "block_height": 7,
        "r_target": R,
        "scheme": "poc2",
        "model": "tiny",
        "model_fingerprint": "f00d",
        "dtype": "float16",
        "seq_len": 16,
        "tolerance": TOLERANCE,
        "mismatch": mismatch,
        "fraud_threshold": threshold,
        "differences": None,
        "verdict": "fraud" if expected["fraud_detected"] else "honest",
        "sample": sample,
        "seed": seed,
    }


@given(entries=st.lists(st.tuples(nonces, claimed), min_size=1, max_size=30), sample=st.integers(1, 30))
def test_a_sample_misses_nothing_that_claims_alone_show(entries: list[tuple[int, float | None]], sample: int) -> None:
    claim = claim_of([nonce for nonce, _ in entries], [value for _, value in entries])
    distances = dict.fromkeys(claim.nonces, 1.39)
    whole = judge(claim, TERMS, of_distances(distances), None, None)
    part = judge(claim, TERMS, of_distances(distances), sample, "seed")
    assert part.probability_honest <= whole.probability_honest
    assert part.fraud_detected >= whole.fraud_detected
    same = ("n_batch", "impossible_claims", "duplicates", "non_finite", "density", "sparse")
    assert [getattr(part, name) for name in same] == [getattr(whole, name) for name in same]


# What is valid.


@pytest.mark.parametrize(
    ("claimed", "distance", "valid"),
    [
        (1.39, 1.39, True),
        (0.0, 1.39, True),
        (math.nextafter(R, 0), math.nextafter(R + TOLERANCE, 0), True),
        (math.nextafter(R, 0), R + TOLERANCE, False),
        (R, 1.39, False),
        (math.nextafter(0, -1), 1.39, False),
        (math.nan, 1.39, False),
        (math.inf, 1.39, False),
        (-math.inf, 1.39, False),
        (None, 1.39, False),
    ],
)
def test_where_valid_ends(claimed: float | None, distance: float, valid: bool) -> None:  # noqa: FBT001 - the expectation
    batch = verdict([7], [claimed], {7: distance})
    assert (batch.valid, batch.n_invalid) == ((valid,), int(not valid))


def test_a_repeated_nonce_counts_once_and_its_worst_claim_decides() -> None:
    batch = verdict([7, 8, 7, 7], [1.3, 1.35, 1.3, 1.45], {7: 1.3})
    assert (batch.n, batch.n_batch, batch.n_invalid, batch.duplicates) == (2, 2, 1, 2)
    assert batch.nonces == (7, 8, 7, 7)
    assert batch.valid == (False, True, False, False)
    assert batch.suspicions == ("impossible_claims", "duplicates", "shifted")


def test_repeating_a_good_nonce_hides_no_bad_ones() -> None:
    good, bad = [1.3] * 1000, [1.39] * 3
    alone = verdict([0, *range(1, 4)], [1.3, *bad], dict.fromkeys(range(1, 4), 1.45))
    hidden = verdict([*[0] * 1000, *range(1, 4)], [*good, *bad], dict.fromkeys(range(1, 4), 1.45))
    assert hidden.probability_honest == alone.probability_honest < 1e-8
    assert hidden.fraud_detected


def test_the_smallest_batch_in_which_one_bad_nonce_is_no_fraud() -> None:
    """1 − (1 − 5e-4)²⁰ = 0.00995 and 1 − (1 − 5e-4)²¹ = 0.01045."""
    for count, is_fraud in ((20, True), (21, False)):
        batch = verdict(list(range(count)), [1.3] * count, {5: 1.45})
        assert (batch.n_invalid, batch.fraud_detected) == (1, is_fraud)


def test_the_limits_themselves_are_allowed() -> None:
    """A probability that equals the threshold is no fraud, a difference that equals the tolerance is no shift."""
    terms = replace(TERMS, fraud_threshold=1.0, tolerance=2**-10)
    batch = judge(claim_of([7], [1.0]), terms, of_distances({7: 1 + 2**-10}), None, None)
    assert (batch.probability_honest, batch.fraud_detected) == (1.0, False)
    assert (batch.largest_difference, batch.shifted) == (2**-10, 0)


# Density.


@pytest.mark.parametrize(
    ("nonces", "node_count", "density", "sparse"),
    [
        ([0], 1, 1.0, False),
        ([99], 1, 1 / 99, False),
        ([100], 1, 0.01, True),
        ([3, 100], 1, 0.02, False),
        ([3, 200], 1, 0.01, True),
        ([3, 200, 200, 3], 1, 0.01, True),
        ([3, 399], 2, 4 / 399, False),
        ([3, 400], 2, 0.01, True),
        (list(range(0, 1000, 10)), 10, 1000 / 990, False),
    ],
)
def test_sparse_is_a_hundredth_of_the_nodes_nonces(
    nonces: list[int],
    node_count: int,
    density: float,
    sparse: bool,  # noqa: FBT001 - the expectation
) -> None:
    claim = claim_of(nonces, [1.3] * len(nonces))
    terms = replace(TERMS, node_count=node_count)
    batch = judge(claim, terms, of_distances(dict.fromkeys(nonces, 1.3)), None, None)
    assert (batch.density, batch.sparse, "sparse" in batch.suspicions) == (density, sparse, sparse)
    assert (batch.fraud_detected, batch.node_count) == (False, node_count)


def test_a_batch_cannot_hide_that_it_is_sparse_behind_a_node_count() -> None:
    """Nonces that are picked at will do not all belong to one node of many."""
    assert verdict([3, 1017], [1.3, 1.3]).suspicions == ("sparse",)
    assert verdict([3, 1017], [1.3, 1.3], node_id=3, node_count=10).suspicions == ("other_node",)
    assert verdict([1, 2, 3], [1.3] * 3, node_id=1, node_count=1).suspicions == (), "a node alone may be number 1"
    assert verdict([0, 1, 2], [1.3] * 3, node_id=1, node_count=1).suspicions == ("other_node",)
    assert verdict([3, 1013], [1.3, 1.3], node_id=3, node_count=10).suspicions == ()


# Which nonces are recomputed.


def test_a_sample_can_be_drawn_by_hand() -> None:
    """for n in 3 5 8 9; do printf 'seed_sample_%s' $n | sha256sum; done."""
    hashes = {nonce: hashlib.sha256(f"seed_sample_{nonce}".encode()).hexdigest()[:4] for nonce in (3, 5, 8, 9)}
    assert hashes == {3: "766d", 5: "f5ae", 8: "97b8", 9: "7277"}
    assert sampled([8, 3, 5, 9, 3, 8], 2, "seed") == (3, 9)


@given(
    theirs=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 20), min_size=1, max_size=60),
    count=st.integers(1, 70),
    data=st.data(),
)
def test_a_sample_is_reproducible(theirs: list[int], count: int, data: st.DataObject) -> None:
    drawn = sampled(theirs, count, "s")
    first_seen = list(dict.fromkeys(theirs))
    assert len(drawn) == min(count, len(first_seen))
    assert list(drawn) == [nonce for nonce in first_seen if nonce in drawn]
    assert set(drawn) <= set(sampled(theirs, count + 1, "s"))
    assert set(sampled(data.draw(st.permutations(theirs)), count, "s")) == set(drawn)


def test_another_seed_draws_others_and_all_are_about_as_likely() -> None:
    counts = dict.fromkeys(range(20), 0)
    for seed in range(1000):
        for nonce in sampled(range(20), 5, str(seed)):
            counts[nonce] += 1
    assert all(190 < count < 310 for count in counts.values())  # 250 ± 13.7, so beyond 4 standard deviations


def test_without_a_sample_every_distinct_nonce_is_recomputed() -> None:
    assert sampled([5, 3, 5], None, None) == (5, 3)


# What a batch says of itself.


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("scheme", "trained"),
        ("model_fingerprint", "beef"),
        ("model", "other"),
        ("dtype", "float32"),
        ("seq_len", 17),
        ("revision", "r1"),
        ("r_target", math.nextafter(R, 2)),
    ],
)
def test_another_way_of_computing_is_refused_and_not_called_fraud(field: str, said: str | float) -> None:
    with pytest.raises(MismatchError) as caught:
        check(claim_of([7], [1.3], **{field: said}), TERMS)
    error = caught.value
    assert (error.code, error.field) == ("mismatch", field)
    held = getattr(TERMS, field)
    held = "none" if held is None else repr(held)
    message, _, _ = str(error).partition(". Names")
    assert message == f"{field}: the batch says {said!r}, but it is held to {held}; nothing was judged"


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"model": "tiny"},
        {"model": "/models/tiny", "revision": "r1", "model_fingerprint": "f00d"},
        {"model": "/models/tiny", "params": {"fingerprint": "f00d", "seq_len": 16, "batch_size": 8}},
        {"scheme": "poc2", "model_fingerprint": "f00d", "dtype": "float16", "seq_len": 16, "r_target": R},
        {"node_count": 5, "node_id": 3, "batch_id": "b"},
    ],
)
def test_what_agrees_or_is_not_said_is_judged(said: dict[str, Any]) -> None:
    check(claim_of([7], [1.3], **said), TERMS)


def test_a_nonce_that_the_scheme_lacks_is_refused_by_name() -> None:
    terms = replace(TERMS, scheme="artifacts", r_target=None)
    vector = base64.b64encode(bytes(24)).decode()

    def claim(nonce: int) -> VectorClaim:
        body = {"block_hash": "9F2E", "block_height": 7, "public_key": "02ab"}
        artifacts = [{"nonce": each, "vector_b64": vector} for each in (3, nonce)]
        return parse_json(VectorClaim, orjson.dumps(body | {"artifacts": artifacts}))

    check(claim(2**31 - 1), terms)
    with pytest.raises(MismatchError) as caught:
        check(claim(2**31), terms)
    assert caught.value.field == "artifacts"
    assert "scheme 'artifacts' has nonces from 0 to 2147483647, and the batch claims 2147483648" in str(caught.value)
    check(claim(2**31), replace(terms, scheme="poc4"))


def test_a_verdict_belongs_to_the_miners_own_round() -> None:
    mine = claim_of([7], [1.3], model="/models/tiny", model_fingerprint="f00d")
    assert round_of(mine, TERMS).model == "/models/tiny"
    silent = round_of(claim_of([7], [1.3]), TERMS)
    assert (silent.block_hash, silent.block_height, silent.public_key) == ("9F2E", 7, "02ab")
    assert (silent.r_target, silent.scheme, silent.model, silent.seq_len) == (R, "poc2", "tiny", 16)


def test_terms_and_verdicts_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TERMS.r_target = 2.0  # type: ignore[misc] # that is what is refused
    with pytest.raises(AttributeError):
        verdict([7], [1.3]).fraud_detected = True  # type: ignore[misc] # that is what is refused
