"""The bytes and ids of rounds and batches: receivers and other hosts rely on every bit of them."""

import dataclasses
import hashlib
import json
import math
from base64 import b64encode
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocd.protocol.proof import (
    ProofBatch,
    Proofs,
    Round,
    ValidatedBatch,
    canonical_json,
    content_id,
    nonces_in,
    results_in,
)
from tests.support.stored import proofs_of, vector_of

PROTOCOL = Path(__file__).resolve().parent.parent.parent / "docs" / "protocol.md"
ROUND = Round(
    block_hash="9F2E", block_height=4_100_000, public_key="02ab", r_target=1.4, scheme="poc2", model="tiny", seq_len=16
)
BATCH = ProofBatch(
    ROUND, node_id=3, model_fingerprint="f00d", dtype="float16", proofs=Proofs.of_distances([(11, 1.25), (3, 1.390625)])
)

ROUND_FIELDS = {
    "block_hash": "9F2E",
    "block_height": 4_100_000,
    "public_key": "02ab",
    "r_target": 1.4,
    "scheme": "poc2",
    "model": "tiny",
    "seq_len": 16,
}
BATCH_FIELDS = {
    **ROUND_FIELDS,
    "node_id": 3,
    "model_fingerprint": "f00d",
    "dtype": "float16",
    "nonces": [11, 3],
    "dist": [1.25, 1.390625],
}

VALIDATED = ValidatedBatch(
    round=ROUND,
    node_id=3,
    node_count=8,
    model_fingerprint="f00d",
    dtype="float16",
    nonces=(11, 3),
    received_dist=(1.25, None),
    dist=(1.25, 1.390625),
    reference_dist=None,
    received_vectors=None,
    vectors=None,
    reference_vectors=None,
    valid=(True, False),
    n=2,
    n_invalid=1,
    n_batch=2,
    impossible_claims=1,
    duplicates=0,
    non_finite=1,
    density=1.5,
    sparse=False,
    shifted=0,
    largest_difference=0.0,
    tolerance=0.0005,
    mismatch=0.0005,
    fraud_threshold=0.01,
    probability_honest=0.001,
    differences=None,
    verdict="fraud",
    fraud_detected=True,
    sample=2,
    seed="é",
    suspicions=("impossible_claims",),
)
VALIDATED_FIELDS = {
    **BATCH_FIELDS,
    "node_count": 8,
    "received_dist": [1.25, None],
    "valid": [True, False],
    "n": 2,
    "n_invalid": 1,
    "n_batch": 2,
    "impossible_claims": 1,
    "duplicates": 0,
    "non_finite": 1,
    "density": 1.5,
    "sparse": False,
    "shifted": 0,
    "largest_difference": 0.0,
    "tolerance": 0.0005,
    "mismatch": 0.0005,
    "fraud_threshold": 0.01,
    "probability_honest": 0.001,
    "differences": None,
    "verdict": "fraud",
    "fraud_detected": True,
    "sample": 2,
    "seed": "é",
    "suspicions": ["impossible_claims"],
}

# Written down once: if they change, every store and every receiver sees other ids.
ROUND_ID = "40f41c29c1ff8bef376677a0376213a9"
BATCH_ID = "4c20921eb43341ab315826d821601b6d"
VALIDATED_ID = "9a2bf05b2f3da72b7cb419cf65e12d37"


def reference_json(value: object) -> bytes:
    """Canonical JSON by the standard library; its floats agree unless they need an exponent."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def reference_id(value: object) -> str:
    return hashlib.sha256(reference_json(value)).hexdigest()[:32]


def test_a_rounds_id_is_the_literal_one_and_the_hash_of_its_fields() -> None:
    assert ROUND.id == ROUND_ID
    assert reference_id(ROUND_FIELDS) == ROUND_ID


def test_a_batchs_id_is_the_literal_one_and_the_hash_of_its_content() -> None:
    assert BATCH.id == BATCH_ID
    assert reference_id(BATCH_FIELDS) == BATCH_ID


def test_a_batch_is_sent_as_canonical_json_of_the_protocols_fields() -> None:
    assert BATCH.to_json() == reference_json({**BATCH_FIELDS, "batch_id": BATCH_ID})


def test_a_verdict_is_sent_as_canonical_json_of_the_protocols_fields_under_its_id() -> None:
    assert VALIDATED.id == VALIDATED_ID == reference_id(VALIDATED_FIELDS)
    assert VALIDATED.to_json() == reference_json({**VALIDATED_FIELDS, "batch_id": VALIDATED_ID})
    assert dataclasses.replace(VALIDATED, seed="other").id != VALIDATED_ID


def test_the_protocol_names_every_field_of_a_verdict() -> None:
    text = PROTOCOL.read_text(encoding="utf-8").partition("### Verdict")[2].partition("### ")[0]
    assert not [name for name in VALIDATED_FIELDS if f"`{name}`" not in text]


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("block_hash", "9F2F"),
        ("block_hash", "9f2e"),
        ("block_height", 4_100_001),
        ("public_key", ""),
        ("r_target", math.nextafter(1.4, 2)),
        ("scheme", "trained"),
        ("model", "tiny2"),
        ("seq_len", 17),
    ],
)
def test_another_value_of_any_field_is_another_round_and_another_batch(field: str, other: str | float) -> None:
    changed = dataclasses.replace(ROUND, **{field: other})  # type: ignore[arg-type] # any field by its name
    assert changed.id != ROUND.id
    assert dataclasses.replace(BATCH, round=changed).id != BATCH.id


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(BATCH, node_id=4),
        dataclasses.replace(BATCH, proofs=Proofs.joined([BATCH.proofs[1:], BATCH.proofs[:1]])),
        dataclasses.replace(BATCH, proofs=BATCH.proofs[:1]),
        dataclasses.replace(BATCH, proofs=Proofs.of_distances([(11, 1.25), (3, 1.375)])),
    ],
    ids=["node", "order", "fewer", "distance"],
)
def test_other_proofs_are_another_batch(changed: ProofBatch) -> None:
    assert changed.id != BATCH.id


def test_an_id_may_travel_as_a_webhook_id() -> None:
    for name in (ROUND.id, BATCH.id):
        assert len(name) == 32
        assert set(name) <= set("0123456789abcdef")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(value=st.dictionaries(st.text(), json_values, max_size=6), data=st.data())
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, object], data: st.DataObject) -> None:
    shuffled = dict(data.draw(st.permutations(list(value.items()))))
    assert canonical_json(shuffled) == canonical_json(value)
    assert content_id(shuffled) == content_id(value)


def test_canonical_json_has_no_white_space_and_plain_utf_8() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": "é x"}) == '{"a":"é x","b":[1,2.5,null,true]}'.encode()


@given(distance=st.floats(0, 2), nonce=st.integers(0, 2**63 - 1))
def test_nonces_and_distances_come_out_of_the_bytes_bit_for_bit(distance: float, nonce: int) -> None:
    batch = ProofBatch(ROUND, 0, "f00d", "float16", Proofs.of_distances([(nonce, distance)]))
    body = orjson.loads(batch.to_json())
    assert (body["nonces"], body["dist"]) == ([nonce], [distance])
    assert json.loads(batch.to_json()) == body
    assert body["batch_id"] == batch.id


def test_rounds_and_batches_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROUND.r_target = 2.0  # type: ignore[misc] # that is what is refused
    with pytest.raises(dataclasses.FrozenInstanceError):
        BATCH.node_id = 0  # type: ignore[misc] # that is what is refused


def test_a_batch_of_vectors_has_the_live_networks_body_and_no_target() -> None:
    round_ = dataclasses.replace(ROUND, scheme="poc4", r_target=None)
    batch = ProofBatch(round_, 3, "f00d", "float16", proofs_of(round_, [11, 2**63 - 1]))
    fields = {name: value for name, value in BATCH_FIELDS.items() if name not in {"r_target", "nonces", "dist"}}
    vectors = {nonce: b64encode(vector_of(nonce)).decode() for nonce in (11, 2**63 - 1)}
    content = fields | {
        "scheme": "poc4",
        "artifacts": [{"nonce": nonce, "vector_b64": vector} for nonce, vector in vectors.items()],
        "encoding": {"dtype": "f16", "k_dim": 12, "endian": "le"},
    }
    assert orjson.loads(batch.to_json()) == content | {"batch_id": batch.id}
    assert batch.id == content_id(content)
    assert batch.size == 2
    assert (nonces_in(content), results_in(content)) == (list(vectors), list(vectors.items()))


@given(found=st.lists(st.tuples(st.integers(0, 2**63 - 1), st.floats(0, 2))), cut=st.integers(0, 9), data=st.data())
def test_proofs_are_cut_joined_and_chosen_with_their_results(
    found: list[tuple[int, float]], cut: int, data: st.DataObject
) -> None:
    proofs = Proofs.of_distances(found)
    assert list(zip(proofs.nonces, proofs.distances, strict=True)) == found
    assert Proofs.joined([proofs[:cut], proofs[cut:]]) == proofs
    assert proofs[cut:] == Proofs.of_distances(found[cut:])
    wanted = data.draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found)))
    kept = [pair for pair, keep in zip(found, wanted, strict=True) if keep]
    assert proofs.only(wanted) == Proofs.of_distances(kept)
