"""The answers to an orchestrator's job, and the body of its verdict."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest

from pocd.protocol.live_jobs import LiveJob, computed, failed
from pocd.protocol.live_verdict import LiveTerms
from pocd.protocol.proof import Round

ROUND = Round("9B4C", 6450112, "02b4", None, "artifacts", "tiny", 16)
OWN = [np.full(12, 12**-0.5, dtype="<f2"), np.eye(12, dtype="<f2")[3], np.full(12, np.nan, dtype="<f2")]
VECTORS = b"".join(each.tobytes() for each in OWN)
TEXTS = [b64encode(each.tobytes()).decode() for each in OWN]
JOB = LiveJob(
    id="2f0c",
    round=ROUND,
    node_id=1,
    nonces=(5, 13, 21),
    claimed=None,
    terms=LiveTerms(dist_threshold=0.75, p_mismatch=0.1),
    p_value_threshold=0.3,
    fingerprint="f00d",
    dtype="float32",
    callback="callback-1",
)
OF = {"request_id": "2f0c", "block_hash": "9B4C", "block_height": 6450112, "public_key": "02b4", "node_id": 1}


def posted(job: LiveJob) -> dict[str, Any]:
    verdict = computed(job, VECTORS).verdict
    assert verdict is not None
    assert (verdict.kind, verdict.id, verdict.size) == ("validated", "2f0c", 3)
    body: dict[str, Any] = orjson.loads(verdict.to_json())
    return body


def test_a_job_is_read_as_it_was_written() -> None:
    for job in (JOB, replace(JOB, claimed=tuple(TEXTS))):
        assert LiveJob.from_json(job.to_json()) == job


def test_a_nonce_without_a_finite_vector_is_left_out() -> None:
    result = computed(JOB, VECTORS)
    assert not result.failed
    assert result.verdict is None
    artifacts = [{"nonce": 5, "vector_b64": TEXTS[0]}, {"nonce": 13, "vector_b64": TEXTS[1]}]
    encoding = {"dtype": "f16", "k_dim": 12, "endian": "le"}
    assert orjson.loads(result.answer) == {"artifacts": artifacts, "encoding": encoding}


@pytest.mark.parametrize(
    ("claimed", "mismatches"),
    [
        pytest.param(TEXTS[0], [], id="the same"),
        pytest.param(TEXTS[1], [5], id="another"),
        pytest.param(TEXTS[2], [5], id="not finite"),
        pytest.param("no base64", [5], id="not base64"),
        pytest.param(TEXTS[0][:16], [5], id="too short"),
        pytest.param(TEXTS[0] + TEXTS[0], [5], id="too long"),
        pytest.param("", [5], id="empty"),
    ],
)
def test_whatever_is_claimed_is_judged(claimed: str, mismatches: list[int]) -> None:
    p_value = 0.19 if mismatches else 1.0
    assert posted(replace(JOB, claimed=(claimed, TEXTS[1], TEXTS[0]))) == OF | {
        "n_total": 2,
        "n_mismatch": len(mismatches),
        "mismatch_nonces": mismatches,
        "p_value": pytest.approx(p_value),
        "fraud_detected": False,
        "n_excluded": 1,
        "excluded_nonces": [21],
    }


def test_the_other_threshold_decides_nothing_and_is_said() -> None:
    answer = orjson.loads(computed(replace(JOB, claimed=(TEXTS[1], TEXTS[1], TEXTS[0])), VECTORS).answer)
    assert (answer["fraud_detected"], answer["fraud_threshold"]) == (False, 0.01)
    assert (answer["fraud_by_p_value_threshold"], answer["p_value_threshold"]) == (True, 0.3)


def test_a_validation_without_a_verdict_answers_all_the_same() -> None:
    job = replace(JOB, claimed=tuple(TEXTS))
    for result in (failed(job, "no"), computed(job, OWN[0].tobytes() + 2 * OWN[2].tobytes())):
        assert result.failed
        assert result.verdict is not None
        body = orjson.loads(result.verdict.to_json())
        assert body.pop("error")
        assert body == OF | {
            "n_total": 0,
            "n_mismatch": 0,
            "mismatch_nonces": [],
            "p_value": 1.0,
            "fraud_detected": False,
            "n_excluded": 3,
            "excluded_nonces": [5, 13, 21],
        }
    assert failed(JOB, "no").verdict is None, "nothing was to be judged"
