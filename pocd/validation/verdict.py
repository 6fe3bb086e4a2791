"""Verdict on a batch of claimed proofs: pure and exact; the caller recomputes the distances.

Source: docs/protocol.md section 5, "Verdict".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocd.protocol.proof import Round, ValidatedBatch
from pocd.protocol.schemes import SCHEMES
from pocd.validation.conditions import BY_NAME, BY_WEIGHTS, MismatchError, named, refuse_mismatch, running

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pocd.validation.claim import Claim, VectorClaim

SPARSE = 100  # times as far from one nonce to the next as dense ones lie


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms that a validator judges a batch by.

    Attributes:
        r_target: A nonce is valid when its distance (in [0, 2]) is below this; None with a scheme of vectors.
        fraud_threshold: A batch is fraud when the probability of an honest miner is below this.
        mismatch: The probability that an honest miner's nonce recomputes as invalid.
        tolerance: How far above `r_target` a recomputed distance still counts as valid.
        scheme: Name of the scheme.
        model: Name of the validator's model.
        model_fingerprint: Fingerprint of that model's weights.
        dtype: The precision that distances are recomputed in.
        seq_len: Sequence length in positions.
        node_count: Number of nodes that share the nonces, where the batch does not give it.
        revision: Revision of the model, as configured.
    """

    r_target: float | None
    fraud_threshold: float
    mismatch: float
    tolerance: float
    scheme: str
    model: str
    model_fingerprint: str
    dtype: str
    seq_len: int
    node_count: int
    revision: str | None = None


def check(claim: Claim | VectorClaim, terms: Terms) -> None:
    """Refuse a batch that names another scheme, weights, dtype, length or target than `terms`; absent fields agree.

    A miner may not choose the target or the sequence length, so these must agree as well. Weights are
    compared by their fingerprint where the batch names one, and by the model's name and revision where it does not.

    Raises:
        MismatchError: A field of the batch differs.
    """
    runs = running(
        model=terms.model,
        revision=terms.revision,
        fingerprint=terms.model_fingerprint,
        scheme=terms.scheme,
        dtype=terms.dtype,
        seq_len=terms.seq_len,
    )
    if BY_WEIGHTS & named(claim).keys():
        runs = {name: value for name, value in runs.items() if name not in BY_NAME}
    output = SCHEMES[terms.scheme].output
    if claim.output != output:
        field = "dist" if claim.output == "distance" else "artifacts"
        raise MismatchError(
            f"{field}: the batch is of {claim.output}s, but scheme {terms.scheme!r} has {output}s; nothing was judged",
            field,
        )
    phrase, done = "the batch says {asked}, but it is held to {runs}", "nothing was judged"
    refuse_mismatch(claim, runs, phrase, done)
    if claim.r_target is not None and claim.r_target != terms.r_target:
        differs = phrase.format(asked=claim.r_target, runs=terms.r_target)
        raise MismatchError(f"r_target: {differs}; {done}", "r_target")


def round_of(claim: Claim | VectorClaim, terms: Terms) -> Round:
    """Return the round that the batch belongs to, once `check` has passed it."""
    return Round(
        block_hash=claim.block_hash,
        block_height=claim.block_height,
        public_key=claim.public_key,
        r_target=terms.r_target,
        scheme=terms.scheme,
        model=terms.model if claim.model is None else claim.model,
        seq_len=terms.seq_len,
    )


def sampled(nonces: Sequence[int], count: int | None, seed: str | None) -> tuple[int, ...]:
    """Return the distinct nonces to recompute, in the order of their first appearance.

    Args:
        nonces: Nonces of the batch, repeats included.
        count: Number to draw, at least 1: those with the smallest SHA-256 of `{seed}_sample_{nonce}`. None for all.
        seed: Seed of the sample; ignored without a count.
    """
    distinct = tuple(dict.fromkeys(nonces))
    if count is None or count >= len(distinct):
        return distinct
    by_hash = sorted(distinct, key=lambda nonce: hashlib.sha256(f"{seed}_sample_{nonce}".encode()).digest())
    drawn = set(by_hash[:count])
    return tuple(nonce for nonce in distinct if nonce in drawn)


def judge(
    claim: Claim, terms: Terms, distances: Mapping[int, float], sample: int | None, seed: str | None
) -> ValidatedBatch:
    """Judge a batch that `check` has passed.

    Args:
        claim: The batch.
        terms: The terms to judge it by.
        distances: Recomputed distances, in [0, 2], at least of the nonces that `sampled` returns.
        sample: Number of nonces drawn, as given to `sampled`; None for all.
        seed: Seed of the sample, as given to `sampled`; None for all.
    """
    from pocd.protocol.theory import probability_honest  # noqa: PLC0415 - scipy costs 24 MB, and few daemons validate

    drawn, distinct = set(sampled(claim.nonces, sample, seed)), set(claim.nonces)
    claims = list(zip(claim.nonces, claim.dist, strict=True))
    impossible = {nonce for nonce, claimed in claims if not _is_possible(claimed, terms)}
    limit = terms.r_target + terms.tolerance
    invalid = {nonce for nonce in drawn if nonce in impossible or not distances[nonce] < limit}
    entries = [(nonce, claimed) for nonce, claimed in claims if nonce in drawn]
    differences = [(nonce, abs(claimed - distances[nonce])) for nonce, claimed in entries if claimed is not None]
    shifted = {nonce for nonce, difference in differences if difference > terms.tolerance}
    node_count = terms.node_count if claim.node_count is None else claim.node_count
    sparse = max(distinct) >= SPARSE * node_count * len(distinct)
    # Without a sample the first is never the larger; with one, bad claims beside the sample count as well.
    probability = min(
        probability_honest(len(invalid), len(drawn), terms.mismatch),
        probability_honest(len(impossible), len(distinct), terms.mismatch),
    )
    return ValidatedBatch(
        round=round_of(claim, terms),
        node_id=claim.node_id,
        node_count=node_count,
        model_fingerprint=terms.model_fingerprint,
        dtype=terms.dtype,
        nonces=tuple(nonce for nonce, _ in entries),
        received_dist=tuple(claimed for _, claimed in entries),
        dist=tuple(distances[nonce] for nonce, _ in entries),
        valid=tuple(nonce not in invalid for nonce, _ in entries),
        n=len(drawn),
        n_invalid=len(invalid),
        n_batch=len(distinct),
        impossible_claims=len(impossible),
        duplicates=len(claims) - len(distinct),
        non_finite=claim.dist.count(None),
        density=len(distinct) * node_count / (max(distinct) or len(distinct) * node_count),
        sparse=sparse,
        shifted=len(shifted),
        largest_difference=max((difference for _, difference in differences), default=None),
        tolerance=terms.tolerance,
        mismatch=terms.mismatch,
        fraud_threshold=terms.fraud_threshold,
        probability_honest=probability,
        fraud_detected=probability < terms.fraud_threshold,
        sample=sample,
        seed=seed,
        suspicions=_suspicions(claim, impossible=bool(impossible), sparse=sparse, shifted=bool(shifted)),
    )


def _is_possible(claimed: float | None, terms: Terms) -> bool:
    """Tell whether an honest miner can claim this distance at all: it is a number from 0 to below r_target."""
    return claimed is not None and 0 <= claimed < terms.r_target


def _suspicions(claim: Claim, *, impossible: bool, sparse: bool, shifted: bool) -> tuple[str, ...]:
    """Return the names of what is odd about the batch, fraud or not."""
    node_count = claim.node_count
    found = {
        "impossible_claims": impossible,
        "duplicates": len(set(claim.nonces)) < len(claim.nonces),
        "sparse": sparse,
        "shifted": shifted,
        "other_node": node_count is not None and any(nonce % node_count != claim.node_id for nonce in claim.nonces),
    }
    return tuple(word for word, is_so in found.items() if is_so)
