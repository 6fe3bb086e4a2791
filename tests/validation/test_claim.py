"""Batches as they come from outside: what is taken, and how the rest is refused."""

from __future__ import annotations

import json
import math
from struct import unpack
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocd.protocol.proof import MOST_NONCES, ProofBatch, Proofs, Round
from pocd.validation.claim import LARGEST_CLAIM, AnyClaim, BodyError, Claim, VectorClaim, parse_json
from tests.support.stored import VECTORS, proofs_of

BODY: dict[str, Any] = {
    "public_key": "02ab",
    "block_hash": "9F2E",
    "block_height": 7,
    "nonces": [3, 5],
    "dist": [1.25, 1.375],
    "node_id": 0,
}
LARGEST = 2**63 - 1


def refusal(raw: bytes | str) -> BodyError:
    with pytest.raises(BodyError) as caught:
        parse_json(Claim, raw.encode() if isinstance(raw, str) else raw)
    return caught.value


@given(
    text=st.text(min_size=1, max_size=50),
    proofs=st.lists(st.tuples(st.integers(0, LARGEST), st.floats(0, 2)), min_size=1, max_size=20),
    known=st.sampled_from([("f00d", "bfloat16"), (None, None)]),
)
def test_what_pocd_sends_is_taken_bit_for_bit(
    text: str, proofs: list[tuple[int, float]], known: tuple[str | None, str | None]
) -> None:
    fingerprint, dtype = known
    round_ = Round(text, 7, text, 1.4042, "poc2", "tiny", 256)
    batch = ProofBatch(round_, 3, fingerprint, dtype, Proofs.of_distances(proofs))
    claim = parse_json(Claim, batch.to_json())
    said = orjson.loads(batch.to_json())
    assert claim.model_dump(exclude_none=True) == {name: value for name, value in said.items() if value is not None}
    assert claim.batch_id == batch.id


def test_a_client_that_sends_the_six_fields_is_understood() -> None:
    claim = parse_json(Claim, orjson.dumps(BODY | {"whatever": {"else": 1}}))
    assert claim.model_dump(exclude_none=True) == BODY
    nameless = {name: value for name, value in BODY.items() if name != "node_id"}
    assert parse_json(Claim, orjson.dumps(nameless)).node_id == 0


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "null", "1e999", "-1e999", "1" + "0" * 400])
def test_what_is_no_finite_number_is_one_and_the_same(literal: str) -> None:
    raw = json.dumps(BODY).replace("1.25", literal)
    assert parse_json(Claim, raw.encode()).dist == [None, 1.375]


def test_whole_numbers_are_distances_too() -> None:
    claim = parse_json(Claim, orjson.dumps(BODY | {"dist": [1, -3]}))
    assert claim.dist == [1.0, -3.0]
    assert all(isinstance(value, float) for value in claim.dist)


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"dist": [1.25]}, "dist", "dist: 1 values for 2 nonces"),
        ({"dist": [1.25, 1.3, 1.35]}, "dist", "dist: 3 values for 2 nonces"),
        ({"dist": []}, "dist", "dist: 0 values for 2 nonces"),
        ({"nonces": [], "dist": []}, "nonces", "nonces: List should have at least 1 item"),
        ({"nonces": None}, "nonces", "nonces: Input should be a valid array"),
        ({"nonces": [3, -1]}, "nonces", "nonces.1: Input should be greater than or equal to 0"),
        ({"nonces": [3, LARGEST + 1]}, "nonces", f"nonces.1: Input should be less than or equal to {LARGEST}"),
        ({"nonces": [3, 5.0]}, "nonces", "nonces.1: Input should be a valid integer"),
        ({"nonces": [3, "5"]}, "nonces", "nonces.1: Input should be a valid integer"),
        ({"nonces": [3, True]}, "nonces", "nonces.1: Input should be a valid integer"),
        ({"dist": [1.25, "1.3"]}, "dist", "dist.1: Input should be a valid number"),
        ({"dist": [1.25, True]}, "dist", "dist.1: Input should be a valid number"),
        ({"dist": 1.25}, "dist", "dist: Input should be a valid array"),
        ({"public_key": ""}, "public_key", "public_key: String should have at least 1 character"),
        ({"public_key": "k" * 1025}, "public_key", "public_key: String should have at most 1024 characters"),
        ({"block_hash": "h" * 257}, "block_hash", "block_hash: String should have at most 256 characters"),
        ({"block_hash": 7}, "block_hash", "block_hash: Input should be a valid string"),
        ({"block_height": -1}, "block_height", "block_height: Input should be greater than or equal to 0"),
        ({"block_height": "7"}, "block_height", "block_height: Input should be a valid integer"),
        ({"block_height": LARGEST + 1}, "block_height", "block_height: Input should be less than or equal"),
        ({"node_id": -1}, "node_id", "node_id: Input should be greater than or equal to 0"),
        ({"node_count": 0}, "node_count", "node_count: Input should be greater than or equal to 1"),
        ({"r_target": 0}, "r_target", "r_target: Input should be greater than 0"),
        ({"r_target": 2.5}, "r_target", "r_target: Input should be less than or equal to 2"),
        ({"seq_len": 0}, "seq_len", "seq_len: Input should be greater than or equal to 1"),
        ({"dtype": 16}, "dtype", "dtype: Input should be a valid string"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], field: str, message: str) -> None:
    error = refusal(orjson.dumps(BODY | change))
    assert (error.code, error.field) == ("invalid_request", field)
    assert str(error).startswith(message)


def test_a_target_that_is_no_number_is_refused() -> None:
    error = refusal(json.dumps(BODY | {"r_target": math.nan}))
    assert (error.code, error.field) == ("invalid_request", "r_target")


@pytest.mark.parametrize("field", ["public_key", "block_hash", "block_height", "nonces", "dist"])
def test_a_missing_field_is_named(field: str) -> None:
    error = refusal(orjson.dumps({name: value for name, value in BODY.items() if name != field}))
    assert (error.code, error.field, str(error)) == ("invalid_request", field, f"{field}: Field required")


@pytest.mark.parametrize("raw", ["[]", "3", "null", '"{}"', f"[{json.dumps(BODY)}]"])
def test_what_is_no_object_is_refused(raw: str) -> None:
    error = refusal(raw)
    assert (error.code, str(error), error.field) == ("invalid_request", "it has to be one JSON object", None)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff", b'{"public_key": "\\ud800"}', b"[" * 10_000, b"{}\n{}", b"{'a': 1}"]
)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    error = refusal(raw)
    assert (error.code, error.field) == ("malformed_json", None)
    assert str(error).startswith("Invalid JSON: ")


@given(raw=st.binary(max_size=60) | st.recursive(st.none() | st.floats(), st.lists, max_leaves=5).map(orjson.dumps))
def test_nothing_else_is_raised(raw: bytes) -> None:
    refusal(raw)


def test_the_most_nonces_in_their_longest_form_fit_and_one_more_is_refused() -> None:
    count = MOST_NONCES + 1
    body = BODY | {"nonces": [LARGEST] * count, "dist": [-1.2345678901234567e-300] * count}
    error = refusal(orjson.dumps(body))
    assert (error.code, error.field) == ("invalid_request", "nonces")
    raw = json.dumps(body | {"nonces": body["nonces"][1:], "dist": body["dist"][1:]}, indent=1).encode()
    assert len(parse_json(Claim, raw).nonces) == MOST_NONCES
    assert len(raw) <= LARGEST_CLAIM


# Vectors


VECTOR = "zLE+LOqw86RaJ9S4BTThM8Ssorhis5Iz"
OF_VECTORS = {name: value for name, value in BODY.items() if name not in {"nonces", "dist"}} | {
    "artifacts": [{"nonce": 11, "vector_b64": VECTOR}]
}


@given(nonces=st.lists(st.integers(0, LARGEST), min_size=1, max_size=20))
def test_vectors_that_pocd_sends_are_taken_bit_for_bit(nonces: list[int]) -> None:
    batch = ProofBatch(VECTORS, 3, "f00d", "bfloat16", proofs_of(VECTORS, nonces))
    claim = parse_json(AnyClaim, batch.to_json()).root
    assert isinstance(claim, VectorClaim)
    assert (claim.nonces, claim.batch_id, claim.r_target) == (nonces, batch.id, None)
    assert claim.outputs == [unpack("<12e", vector) for vector in batch.proofs.vectors]
    assert AnyClaim.model_validate(claim.model_dump()).root == claim, "as the queue of validations stores it"


def test_the_kind_of_a_claim_follows_from_its_fields() -> None:
    of_distances, of_vectors = (parse_json(AnyClaim, orjson.dumps(body)).root for body in (BODY, OF_VECTORS))
    assert (of_distances.output, of_vectors.output) == ("distance", "vector")
    assert of_distances.outputs == [None if distance is None else (distance,) for distance in BODY["dist"]]


@pytest.mark.parametrize(
    "vector", [None, "", "AAAA", VECTOR + "AAAA", "AH4A" + VECTOR[4:], "AHwA" + VECTOR[4:], "APwA" + VECTOR[4:]]
)
def test_a_vector_of_another_length_or_without_finite_numbers_is_a_claim_that_counts_against_the_miner(
    vector: str | None,
) -> None:
    body = OF_VECTORS | {"artifacts": [{"nonce": 11, "vector_b64": vector}, {"nonce": 12, "vector_b64": VECTOR}]}
    first, second = parse_json(AnyClaim, orjson.dumps(body)).root.outputs
    assert first is None
    assert second is not None


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"artifacts": []}, "artifacts: "),
        ({"artifacts": [{"nonce": 1}]}, "artifacts.0.vector_b64: Field required"),
        ({"artifacts": [{"nonce": "1", "vector_b64": VECTOR}]}, "artifacts.0.nonce: "),
        ({"artifacts": [{"nonce": -1, "vector_b64": VECTOR}]}, "artifacts.0.nonce: "),
        ({"artifacts": [{"nonce": 1, "vector_b64": "not base64!"}]}, "artifacts.0.vector_b64: it has to be base64"),
        ({"artifacts": [{"nonce": 1, "vector_b64": 7}]}, "artifacts.0.vector_b64: "),
        ({"artifacts": {}}, "artifacts: "),
        ({"encoding": {"dtype": "f32", "k_dim": 12, "endian": "le"}}, "encoding.dtype: "),
        ({"encoding": {"dtype": "f16", "k_dim": 8, "endian": "le"}}, "encoding.k_dim: "),
    ],
)
def test_what_is_no_claim_of_vectors_is_refused_by_its_field(change: dict[str, object], where: str) -> None:
    with pytest.raises(BodyError) as caught:
        parse_json(AnyClaim, orjson.dumps(OF_VECTORS | change))
    assert str(caught.value).startswith(where)
    assert caught.value.field == where.partition(".")[0].partition(":")[0]
