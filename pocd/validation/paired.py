"""pocd's own verdict on artifacts that an orchestrator has judged: by their differences from a reference.

It is a validation as any other, stored before the job's own verdict is; the orchestrator's verdict never waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocd.protocol.live_jobs import claimed_vector
from pocd.protocol.names import default_tolerance
from pocd.protocol.schemes import SCHEMES
from pocd.store.errors import StoreUnavailableError
from pocd.validation.claim import ClaimedArtifact, VectorClaim
from pocd.validation.queue import QueueFullError, ValidationRequest
from pocd.validation.verdict import Terms

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from pocd.config.settings import ValidationSettings
    from pocd.pool.pool import Pool
    from pocd.protocol.live_jobs import LiveJob
    from pocd.validation.queue import Validator
    from pocd.worker.messages import Ready


def paired_request(
    job: LiveJob, info: Ready, settings: ValidationSettings, *, revision: str | None
) -> ValidationRequest:
    """Return the request by which the artifacts of a job are judged by their differences.

    Where they are more than may be recomputed at once, some are drawn, by the job's id.

    Args:
        job: The job, with claimed vectors; what is no vector counts against the prover, as a missing one.
        info: What the worker runs.
        settings: Terms and limits of validations.
        revision: Revision of the model, as configured.
    """
    assert job.claimed is not None, "there is something to judge"
    vectors = (text if claimed_vector(text) is not None else None for text in job.claimed)
    claim = VectorClaim(
        public_key=job.round.public_key,
        block_hash=job.round.block_hash,
        block_height=job.round.block_height,
        node_id=job.node_id,
        artifacts=[ClaimedArtifact(nonce, vector) for nonce, vector in zip(job.nonces, vectors, strict=True)],
    )
    scheme, tolerance = SCHEMES[job.round.scheme], settings.tolerance
    terms = Terms(
        r_target=None,
        fraud_threshold=settings.fraud_threshold,
        mismatch=settings.mismatch,
        tolerance=default_tolerance(info.dtype, scheme, info.hidden_size) if tolerance is None else tolerance,
        scheme=job.round.scheme,
        model=job.round.model,
        model_fingerprint=job.fingerprint,
        dtype=job.dtype,
        seq_len=job.round.seq_len,
        node_count=job.node_count,
        revision=revision,
        allowance=settings.allowance,
    )
    is_sampled = len(job.nonces) > settings.max_nonces
    count, seed = (settings.max_nonces, job.id) if is_sampled else (None, None)
    return ValidationRequest(claim, terms, count, seed, callback=None)


class Paired:
    """Has the artifacts of jobs judged a second time."""

    def __init__(
        self,
        validator: Validator,
        workers: Pool,
        settings: ValidationSettings,
        *,
        revision: str | None,
        log: FilteringBoundLogger,
    ) -> None:
        self._validator = validator
        self._workers = workers
        self._settings = settings
        self._revision = revision
        self._log = log

    async def ask(self, job: LiveJob) -> str | None:
        """Store the validation of a job's artifacts, and return its id; None, logged and counted, without room."""
        info = self._workers.info
        assert info is not None, "a worker has just computed the job's vectors"
        try:
            found = await self._validator.ask(paired_request(job, info, self._settings, revision=self._revision))
        except (QueueFullError, StoreUnavailableError) as error:
            self._validator.results["not_paired"] += 1
            self._log.error("not judged by differences", action="not_paired", id=job.id, cause=str(error))
            return None
        return found.id
