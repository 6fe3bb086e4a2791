"""The live network's verdict: known ones, what counts as a mismatch, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from pocd.protocol.live_verdict import LiveTerms, judge_live

KNOWN: list[dict[str, Any]] = orjson.loads((Path(__file__).parent.parent / "data" / "live_verdicts.json").read_bytes())
OWN = np.full(12, 12**-0.5, dtype=np.float32)
FAR = -OWN


@pytest.mark.parametrize("entry", KNOWN, ids=lambda entry: f"{entry['n_mismatch']} of {entry['n_total']}")
def test_known_verdicts(entry: dict[str, Any]) -> None:
    claimed = [(nonce, FAR if nonce < entry["n_mismatch"] else OWN) for nonce in range(entry["n_total"])]
    terms = LiveTerms(entry["dist_threshold"], entry["p_mismatch"], entry["fraud_threshold"])
    found = judge_live(claimed, dict.fromkeys(range(entry["n_total"]), OWN), terms)
    assert found is not None
    assert found.p_value == pytest.approx(entry["p_value"], rel=1e-9)
    assert (found.n_total, found.n_mismatch) == (entry["n_total"], entry["n_mismatch"])
    assert found.fraud_detected is entry["fraud_detected"]
    assert found.mismatch_nonces == tuple(range(entry["n_mismatch"]))


@pytest.mark.parametrize(("distance", "is_mismatch"), [(0.0, False), (0.5, False), (0.5 + 2**-20, True), (1.5, True)])
def test_a_mismatch_lies_beyond_the_threshold(distance: float, *, is_mismatch: bool) -> None:
    own = np.zeros(12, dtype=np.float32)
    claimed = own.copy()
    claimed[3] = distance
    found = judge_live([(7, claimed)], {7: own}, LiveTerms(dist_threshold=0.5))
    assert found is not None
    assert found.distances == (distance,)
    assert found.mismatch_nonces == ((7,) if is_mismatch else ())


def test_what_is_no_vector_is_a_mismatch() -> None:
    found = judge_live([(0, None), (1, OWN)], {0: OWN, 1: OWN}, LiveTerms())
    assert found is not None
    assert (found.mismatch_nonces, found.distances) == ((0,), (None, 0.0))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.floats(0.001, 0.5))
def test_nonces_without_an_own_vector_are_left_out_up_to_a_tenth(good: int, bad: int, gone: int, p: float) -> None:
    claimed = [
        *((n, OWN) for n in range(good)),
        *((100 + n, FAR) for n in range(bad)),
        *((200 + n, OWN) for n in range(gone)),
    ]
    found = judge_live(claimed, {nonce: OWN for nonce, _ in claimed if nonce < 200}, LiveTerms(0.02, p))
    if gone > max(1, len(claimed) // 10):
        assert found is None
        return
    assert found is not None
    assert found.excluded_nonces == tuple(range(200, 200 + gone))
    assert found.n_total == good + bad
    assert found.p_value == pytest.approx(float(binom.sf(bad - 1, good + bad, p)), rel=1e-9)
