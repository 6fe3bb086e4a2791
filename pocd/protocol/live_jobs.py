"""What an orchestrator of the live network asks of a node by a list of nonces, and the answers (docs/live.md)."""

from __future__ import annotations

from base64 import b64encode
from binascii import Error as NoBase64Error
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import orjson

from pocd.protocol.live_verdict import LiveTerms, judge_live
from pocd.protocol.proof import Round
from pocd.protocol.schemes import VECTOR_BYTES, VECTOR_ENCODING
from pocd.protocol.vectors import are_finite, decode_vectors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pocd.protocol.live_verdict import LiveVerdict


@dataclass(frozen=True, slots=True)
class LiveJob:
    """Nonces whose vectors are to be computed, and to be compared with claimed ones where there are any.

    Attributes:
        id: The name by which the caller asks for the result, and which a verdict has.
        round: The round of the nonces, with the model and the scheme by which they are computed.
        node_id: Number of the prover's node.
        nonces: Distinct nonces.
        claimed: The prover's vectors in base64, in the order of `nonces`; None where nothing is to be judged.
        terms: The terms of the verdict.
        p_value_threshold: What the caller said under this name, which the network's own programs ignore.
        fingerprint: Fingerprint of the model's weights.
        dtype: Precision of the model's weights.
        callback: Name of the verdict's receiver; None for none.
        node_count: Number of nodes that share the prover's nonces.
    """

    id: str
    round: Round
    node_id: int
    nonces: tuple[int, ...]
    claimed: tuple[str, ...] | None
    terms: LiveTerms
    p_value_threshold: float | None
    fingerprint: str
    dtype: str
    callback: str | None
    node_count: int = 1  # jobs that an earlier version stored have none

    def to_json(self) -> bytes:
        """Return the JSON that `from_json` reads."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, encoded: bytes) -> Self:
        """Return the job that `to_json` wrote."""
        fields = orjson.loads(encoded)
        claimed = fields["claimed"]
        own = {
            "round": Round(**fields["round"]),
            "nonces": tuple(fields["nonces"]),
            "claimed": None if claimed is None else tuple(claimed),
            "terms": LiveTerms(**fields["terms"]),
        }
        return cls(**fields | own)


@dataclass(frozen=True, slots=True)
class JudgedArtifacts:
    """The body that is posted to `/validated`."""

    kind: ClassVar = "validated"

    id: str
    size: int
    body: bytes

    def to_json(self) -> bytes:
        """The exact bytes of every POST of this verdict."""
        return self.body


@dataclass(frozen=True, slots=True)
class JobResult:
    """Result of a job: the answer to whoever asks for it, and the body for the callback URL, if something was judged.

    Attributes:
        failed: Whether there is no result; then the answer says why.
    """

    failed: bool
    answer: bytes
    verdict: JudgedArtifacts | None


def computed(job: LiveJob, vectors: bytes, validation: str | None = None) -> JobResult:
    """Return the result of a job.

    Args:
        job: The job.
        vectors: Vectors of its nonces, which may have numbers that are not finite.
        validation: Id of the validation that judges the claimed ones by their differences; None where there is none.
    """
    own = {
        nonce: vectors[VECTOR_BYTES * i : VECTOR_BYTES * (i + 1)]
        for i, (nonce, is_finite) in enumerate(zip(job.nonces, are_finite(vectors), strict=True))
        if is_finite
    }
    if job.claimed is None:
        artifacts = [{"nonce": nonce, "vector_b64": b64encode(vector).decode()} for nonce, vector in own.items()]
        return JobResult(False, orjson.dumps({"artifacts": artifacts, "encoding": VECTOR_ENCODING}), None)
    claimed = [(nonce, claimed_vector(text)) for nonce, text in zip(job.nonces, job.claimed, strict=True)]
    mine = {nonce: decode_vectors(b64encode(vector).decode())[0] for nonce, vector in own.items()}
    verdict = judge_live(claimed, mine, job.terms)
    if verdict is None:
        return failed(job, f"{len(job.nonces) - len(own)} of {len(job.nonces)} nonces have no finite vector here")
    answer = told_in_full(verdict, job.terms, job.p_value_threshold) | {"validation": validation}
    told = _verdict(verdict)
    if verdict.excluded_nonces:
        told |= {"n_excluded": len(verdict.excluded_nonces), "excluded_nonces": verdict.excluded_nonces}
    return JobResult(False, orjson.dumps(answer), _posted(job, told))


def failed(job: LiveJob, reason: str) -> JobResult:
    """Return the result of a job that cannot be done: where something was to be judged, all nonces are excluded."""
    told = {
        "n_total": 0,
        "n_mismatch": 0,
        "mismatch_nonces": [],
        "p_value": 1.0,
        "fraud_detected": False,
        "n_excluded": len(job.nonces),
        "excluded_nonces": job.nonces,
        "error": reason,
    }
    return JobResult(True, orjson.dumps({"error": reason}), None if job.claimed is None else _posted(job, told))


def told_in_full(verdict: LiveVerdict, terms: LiveTerms, p_value_threshold: float | None) -> dict[str, Any]:
    """Return a verdict with its terms and all distances, and what `p_value_threshold` would decide, if given."""
    other = {}
    if p_value_threshold is not None:
        other = {
            "p_value_threshold": p_value_threshold,
            "fraud_by_p_value_threshold": verdict.p_value < p_value_threshold,
        }
    return (
        _verdict(verdict)
        | other
        | {
            "fraud_threshold": terms.fraud_threshold,
            "n_excluded": len(verdict.excluded_nonces),
            "excluded_nonces": verdict.excluded_nonces,
            "distances": verdict.distances,
        }
    )


def _verdict(verdict: LiveVerdict) -> dict[str, Any]:
    return {
        "n_total": verdict.n_total,
        "n_mismatch": verdict.n_mismatch,
        "mismatch_nonces": verdict.mismatch_nonces,
        "p_value": verdict.p_value,
        "fraud_detected": verdict.fraud_detected,
    }


def _posted(job: LiveJob, told: dict[str, Any]) -> JudgedArtifacts:
    of = {
        "request_id": job.id,
        "block_hash": job.round.block_hash,
        "block_height": job.round.block_height,
        "public_key": job.round.public_key,
        "node_id": job.node_id,
    }
    return JudgedArtifacts(job.id, len(job.nonces), orjson.dumps(of | told))


def claimed_vector(text: str) -> NDArray[np.float32] | None:
    """Return a claimed vector; None for what is none: not base64, of another length, or not finite."""
    try:
        vectors = decode_vectors(text)
    except (NoBase64Error, ValueError):
        return None
    return vectors[0] if len(vectors) == 1 and bool((abs(vectors) < float("inf")).all()) else None
