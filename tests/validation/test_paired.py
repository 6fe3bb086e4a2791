"""What is asked of pocd's own verdict where an orchestrator's job has judged artifacts."""

from __future__ import annotations

from base64 import b64encode
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import structlog
from structlog.testing import capture_logs

from pocd.clock import SYSTEM
from pocd.config.settings import ValidationSettings
from pocd.observe.events import Events
from pocd.protocol.live_jobs import LiveJob
from pocd.protocol.live_verdict import LiveTerms
from pocd.protocol.proof import Round
from pocd.store.thread import OutboxThread
from pocd.validation.paired import Paired, paired_request
from pocd.validation.queue import ValidationRequest, Validator
from pocd.worker.messages import Ready

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.delivery.receivers import Receivers
    from pocd.pool.pool import Pool

VECTOR = b64encode(np.full(12, 12**-0.5, dtype="<f2").tobytes()).decode()
READY = Ready("tiny", "f00d", "bfloat16", "cpu", 64, 2, "flat", "", "eager", "", 1.0, 0.0, 8, 4096, "2.13.0")
JOB = LiveJob(
    id="2f0c",
    round=Round("9B4C", 6450112, "02b4", None, "artifacts-256", "tiny", 16),
    node_id=1,
    nonces=(5, 13, 21, 29, 37),
    claimed=(VECTOR, "no base64", VECTOR[:16], "", b64encode(np.full(12, np.nan, dtype="<f2").tobytes()).decode()),
    terms=LiveTerms(dist_threshold=0.75, p_mismatch=0.1),
    p_value_threshold=0.05,
    fingerprint="f00d",
    dtype="bfloat16",
    callback="callback-1",
    node_count=8,
)


def test_the_same_artifacts_under_the_same_round() -> None:
    asked = paired_request(JOB, READY, ValidationSettings(), revision="d494266a")
    assert asked.claim.outputs[0] is not None
    assert asked.claim.outputs[1:] == [None] * 4, "what is no vector counts against the prover"
    assert asked.claim.nonces == list(JOB.nonces)
    assert (asked.claim.block_hash, asked.claim.public_key, asked.claim.node_id) == ("9B4C", "02b4", 1)
    terms = asked.terms
    assert (terms.scheme, terms.model, terms.seq_len, terms.node_count) == ("artifacts-256", "tiny", 16, 8)
    assert (terms.model_fingerprint, terms.dtype, terms.revision) == ("f00d", "bfloat16", "d494266a")
    assert terms.has_reference
    assert (asked.sample, asked.seed, asked.callback) == (None, None, None)


def test_the_same_job_asks_once_also_after_a_restart() -> None:
    asked = paired_request(JOB, READY, ValidationSettings(), revision=None)
    again = paired_request(LiveJob.from_json(JOB.to_json()), READY, ValidationSettings(), revision=None)
    assert asked.id == again.id == ValidationRequest.from_json(asked.to_json()).id


def test_of_more_than_may_be_recomputed_some_are_drawn() -> None:
    few = ValidationSettings(max_nonces=3)
    asked = paired_request(JOB, READY, few, revision=None)
    assert (asked.sample, asked.seed) == (3, "2f0c")
    other = paired_request(replace(JOB, id="3e1d"), READY, few, revision=None)
    assert other.seed == "3e1d"


class WithModel:
    """Workers whose model is ready."""

    info = READY


async def test_a_job_for_which_there_is_no_room_is_counted_and_logged(tmp_path: Path) -> None:
    workers, receivers, log = cast("Pool", WithModel()), cast("Receivers", None), structlog.get_logger()
    with closing(OutboxThread(tmp_path / "outbox.db")) as outbox, capture_logs() as logs:
        validator = Validator(outbox, workers, receivers, most=1, clock=SYSTEM, log=log, events=Events(SYSTEM))
        paired = Paired(validator, workers, ValidationSettings(), revision=None, log=log)
        assert await paired.ask(JOB) is not None
        assert validator.results["not_paired"] == 0
        assert await paired.ask(replace(JOB, nonces=(5, 13, 21, 29, 45))) is None
    assert validator.results["not_paired"] == 1
    assert [entry["action"] for entry in logs] == ["not_paired"]
