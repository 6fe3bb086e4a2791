"""A proof server's callbacks as a relay reads them: what is passed on once, and what is no callback."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocd.relay.callbacks import CallbackError, Kind, read_callback, relayed

OF = {"public_key": "02b463", "block_hash": "9B4C", "block_height": 7, "node_id": 3}


def generated(*nonces: int, **changes: Any) -> bytes:  # noqa: ANN401 - any field
    artifacts = [{"nonce": nonce, "vector_b64": f"v{place}"} for place, nonce in enumerate(nonces)]
    return orjson.dumps({**OF, "artifacts": artifacts, "encoding": {"dtype": "f16"}, **changes})


def test_what_was_passed_on_is_left_out_and_all_else_is_kept() -> None:
    left = read_callback("generated", "/v2/a", generated(1, 2, 3)).without({2})
    assert left is not None
    kept = relayed(left)
    assert kept.size == 2
    assert orjson.loads(kept.body) == {
        **OF,
        "artifacts": [{"nonce": 1, "vector_b64": "v0"}, {"nonce": 3, "vector_b64": "v2"}],
        "encoding": {"dtype": "f16"},
    }


def test_other_forms_of_artifacts_are_passed_on_as_they_are() -> None:
    body = {**OF, "artifacts": [{"nonce": 1, "k_points_steps": [0, 15, 7]}]}
    assert orjson.loads(relayed(read_callback("generated", "", orjson.dumps(body))).body) == body


@given(st.lists(st.lists(st.integers(0, 30), min_size=1), max_size=8))
def test_of_any_callbacks_each_nonce_is_passed_on_once_in_order(bodies: list[list[int]]) -> None:
    passed: set[int | str] = set()
    told: list[int] = []
    for nonces in bodies:
        left = read_callback("generated", "", generated(*nonces)).without(passed)
        if left is not None:
            found = [artifact["nonce"] for artifact in orjson.loads(relayed(left).body)["artifacts"]]
            assert tuple(found) == left.numbers
            passed.update(found)
            told += found
    assert told == list(dict.fromkeys(nonce for nonces in bodies for nonce in nonces))


def test_rounds_are_told_apart_by_path_key_and_block() -> None:
    others: list[dict[str, Any]] = [{}, {"public_key": "03"}, {"block_hash": "9b4c"}, {"block_height": 8}]
    rounds = {read_callback("generated", "/a", generated(1, **each)).round for each in others}
    rounds.add(read_callback("generated", "/b", generated(1)).round)
    assert len(rounds) == len(others) + 1


def test_a_verdict_is_passed_on_once() -> None:
    verdict = {**OF, "request_id": "2f0c", "n_total": 200, "fraud_detected": False}
    one = read_callback("validated", "", orjson.dumps(verdict))
    again = read_callback("validated", "", orjson.dumps({**verdict, "p_value": 1.0}))
    other = read_callback("validated", "", orjson.dumps({**verdict, "request_id": "77aa"}))
    unnamed = read_callback("validated", "", orjson.dumps({**OF, "n_total": 200}))
    assert again.without(set(one.numbers)) is None
    assert other.without(set(one.numbers)) is other
    assert unnamed.without(set(one.numbers)) is unnamed
    assert unnamed.without(set(unnamed.numbers)) is None


@pytest.mark.parametrize(
    ("kind", "raw", "reason"),
    [
        ("generated", b"{", "the body is not JSON"),
        ("validated", b"[]", "the body has to be a JSON object"),
        ("generated", generated(), "artifacts: has to be a list of 1 to"),
        ("generated", generated(1, artifacts={}), "artifacts: has to be a list"),
        (
            "generated",
            generated(1, artifacts=[{"nonce": 1}, {"nonce": "2"}]),
            r"artifacts\[1\].nonce: has to be a whole",
        ),
        ("generated", generated(1, artifacts=[{"nonce": True}]), r"artifacts\[0\].nonce"),
        ("generated", generated(1, artifacts=[{"nonce": -1}]), r"artifacts\[0\].nonce"),
        ("generated", generated(1, artifacts=[{"nonce": 2**31}]), r"artifacts\[0\].nonce: .* 0 to 2147483647"),
        ("generated", generated(1, artifacts=[7]), r"artifacts\[0\].nonce"),
        ("generated", generated(1, public_key=None), "public_key: has to be text"),
        ("generated", generated(1, block_hash=7), "block_hash: has to be text"),
    ],
)
def test_what_is_no_callback_is_refused(kind: Kind, raw: bytes, reason: str) -> None:
    with pytest.raises(CallbackError, match=f"^{reason}"):
        read_callback(kind, "", raw)
