"""Verdict on a batch of claimed proofs: pure and exact; the caller recomputes the results.

Source: docs/protocol.md section 5, "Verdict" and "Verdict by differences".
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from dataclasses import dataclass
from struct import pack
from typing import TYPE_CHECKING, Any

from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round, ValidatedBatch
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.verdicts import ALLOWANCE
from pocd.validation.conditions import BY_NAME, BY_WEIGHTS, MismatchError, named, refuse_mismatch, running

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from pocd.protocol.verdicts import DifferenceVerdict, MixtureVerdict, Result
    from pocd.validation.claim import Claim, Numbers, VectorClaim


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
        allowance: How many times the validator's own error an honest miner's may be.
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
    allowance: float = ALLOWANCE  # requests that an earlier version stored have none

    @property
    def is_of_vectors(self) -> bool:
        """Whether a nonce has a vector, rather than a distance."""
        return SCHEMES[self.scheme].output == "vector"

    @property
    def has_reference(self) -> bool:
        """Whether claims are judged by their differences from a reference in float32 arithmetic.

        Distances in float32 are not: there the reference rounds as much as the result. Vectors are rounded to float16
        whatever computes them.
        """
        return self.is_of_vectors or self.dtype != "float32"


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What a validator computed of the nonces that were drawn.

    Attributes:
        own: Numbers of each nonce, as a miner computes them.
        reference: Numbers of each nonce in float32 arithmetic; None where no differences are judged.
        errors: Expected squared error of a number of `own`, by nonce; None where no differences are judged.
        turned: How probable it is, by nonce, that a mixture's router chooses otherwise on another honest host; None
            where there are no routers, or the results are vectors.
    """

    own: Mapping[int, Numbers]
    reference: Mapping[int, Numbers] | None = None
    errors: Mapping[int, float] | None = None
    turned: Mapping[int, float] | None = None


def check(claim: Claim | VectorClaim, terms: Terms) -> None:
    """Refuse a batch that names another scheme, weights, dtype, length or target than `terms`; absent fields agree.

    A miner may not choose the target or the sequence length, so these must agree as well. Weights are
    compared by their fingerprint where the batch names one, and by the model's name and revision where it does not.

    Raises:
        MismatchError: A field of the batch differs, or its scheme has no such nonce.
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
    largest, allowed = max(claim.nonces), SCHEMES[terms.scheme].largest_nonce
    if largest > allowed:
        field = "nonces" if claim.output == "distance" else "artifacts"
        raise MismatchError(
            f"{field}: scheme {terms.scheme!r} has nonces from 0 to {allowed}, and the batch claims {largest}; {done}",
            field,
        )
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
    claim: Claim | VectorClaim, terms: Terms, found: Recomputed, sample: int | None, seed: str | None
) -> ValidatedBatch:
    """Judge a batch that `check` has passed.

    Args:
        claim: The batch.
        terms: The terms to judge it by.
        found: What was recomputed, at least of the nonces that `sampled` returns.
        sample: Number of nonces drawn, as given to `sampled`; None for all.
        seed: Seed of the sample, as given to `sampled`; None for all.
    """
    from pocd.protocol.theory import probability_honest

    order = sampled(claim.nonces, sample, seed)
    drawn, distinct = set(order), set(claim.nonces)
    claims = list(zip(claim.nonces, claim.outputs, strict=True))
    impossible = {nonce for nonce, claimed in claims if not _is_possible(claimed, terms)}
    invalid = {nonce for nonce in drawn if nonce in impossible or not _is_valid(found.own[nonce], terms)}
    entries = [(nonce, claimed) for nonce, claimed in claims if nonce in drawn]
    apart = [(nonce, _apart(claimed, found.own[nonce])) for nonce, claimed in entries if claimed is not None]
    shifted = {nonce for nonce, difference in apart if difference > terms.tolerance}
    node_count = terms.node_count if claim.node_count is None else claim.node_count
    sparse = max(distinct) >= SPARSE * node_count * len(distinct)
    # Of a sample, bad claims beside it count as well; and no rounding makes a claim impossible.
    probability = probability_honest(len(impossible), len(distinct), terms.mismatch)
    mixture = _mixture(order, invalid, found, terms)
    if mixture is None:
        probability = min(probability, probability_honest(len(invalid), len(drawn), terms.mismatch))
    elif mixture.decidable:
        probability = min(probability, mixture.p_wide, mixture.p_all)
    differences = _differences(order, entries, found, terms)
    verdict: Result = "fraud" if probability < terms.fraud_threshold else "honest"
    if verdict == "honest" and mixture is not None and not mixture.decidable:
        verdict = "undecidable"
    if terms.is_of_vectors and verdict == "honest":
        assert differences is not None, "vectors are judged by their differences"
        verdict = differences.result
    return ValidatedBatch(
        round=round_of(claim, terms),
        node_id=claim.node_id,
        node_count=node_count,
        model_fingerprint=terms.model_fingerprint,
        dtype=terms.dtype,
        nonces=tuple(nonce for nonce, _ in entries),
        **_shown(entries, found, terms),
        valid=tuple(nonce not in invalid for nonce, _ in entries),
        n=len(drawn),
        n_invalid=len(invalid),
        n_batch=len(distinct),
        impossible_claims=len(impossible),
        duplicates=len(claims) - len(distinct),
        non_finite=sum(claimed is None for _, claimed in claims),
        density=len(distinct) * node_count / (max(distinct) or len(distinct) * node_count),
        sparse=sparse,
        shifted=len(shifted),
        largest_difference=max((difference for _, difference in apart), default=None),
        tolerance=terms.tolerance,
        mismatch=terms.mismatch,
        fraud_threshold=terms.fraud_threshold,
        probability_honest=probability,
        differences=differences,
        verdict=verdict,
        fraud_detected=verdict == "fraud",
        sample=sample,
        seed=seed,
        suspicions=_suspicions(claim, impossible=bool(impossible), sparse=sparse, shifted=bool(shifted)),
        mixture=mixture,
    )


def _is_possible(claimed: Numbers | None, terms: Terms) -> bool:
    """Tell whether an honest miner can claim this: a distance from 0 to below r_target, or any finite vector."""
    return claimed is not None and (terms.r_target is None or 0 <= claimed[0] < terms.r_target)


def _is_valid(own: Numbers, terms: Terms) -> bool:
    """Tell whether a recomputed nonce counts."""
    return terms.r_target is None or own[0] < terms.r_target + terms.tolerance


def _apart(claimed: Numbers, own: Numbers) -> float:
    """Return the largest difference of two numbers."""
    return max(abs(one - other) for one, other in zip(claimed, own, strict=True))


def _mixture(order: Sequence[int], invalid: AbstractSet[int], found: Recomputed, terms: Terms) -> MixtureVerdict | None:
    """Weigh invalid nonces by how near a mixture's routers came to another choice; None where there are no routers."""
    if found.turned is None:
        return None
    from pocd.protocol.mixtures import judge_mixture

    turned = [found.turned[nonce] for nonce in order]
    return judge_mixture(turned, [nonce in invalid for nonce in order], terms.mismatch, terms.fraud_threshold)


def _differences(
    order: Sequence[int], entries: Sequence[tuple[int, Numbers | None]], found: Recomputed, terms: Terms
) -> DifferenceVerdict | None:
    """Judge claims by how far they are from the reference; of a nonce that is claimed repeatedly, the worst one."""
    if found.reference is None or found.errors is None:
        return None
    import numpy as np

    from pocd.protocol.differences import judge_differences
    from pocd.protocol.vectors import rounding_variance

    worst: dict[int, Numbers | None] = {}
    for nonce, claimed in entries:
        known = worst.setdefault(nonce, claimed)
        if claimed is None or known is None:
            worst[nonce] = None
        elif _squared(claimed, found.reference[nonce]) > _squared(known, found.reference[nonce]):
            worst[nonce] = claimed
    reference = np.array([found.reference[nonce] for nonce in order], np.float64)
    errors = np.array([found.errors[nonce] for nonce in order], np.float64)
    if terms.is_of_vectors:
        errors += rounding_variance(reference)  # of those that travel
    if SCHEMES[terms.scheme].head != "projection":
        # One target serves a whole block, and coordinates differ in size: what follows shows in the own results too.
        own = np.array([found.own[nonce] for nonce in order], np.float64)
        errors *= max(1.0, float(np.square(own - reference).mean() / (errors.mean() or np.inf)))
    return judge_differences([worst[nonce] for nonce in order], reference, errors, allowance=terms.allowance)


def _squared(one: Numbers, other: Numbers) -> float:
    return sum((a - b) * (a - b) for a, b in zip(one, other, strict=True))  # a power of large ones would raise


def _shown(entries: Sequence[tuple[int, Numbers | None]], found: Recomputed, terms: Terms) -> dict[str, Any]:
    """Return the claimed, the recomputed and the reference's results of each entry, as a ValidatedBatch has them."""
    names = ("received_dist", "dist", "reference_dist"), ("received_vectors", "vectors", "reference_vectors")
    of_distances, of_vectors = names
    results = (
        [claimed for _, claimed in entries],
        [found.own[nonce] for nonce, _ in entries],
        None if found.reference is None else [found.reference[nonce] for nonce, _ in entries],
    )
    if not terms.is_of_vectors:
        firsts = (None if each is None else tuple(numbers and numbers[0] for numbers in each) for each in results)
        return dict.fromkeys(of_vectors) | dict(zip(of_distances, firsts, strict=True))
    texts = (
        tuple(numbers and _text(numbers, form) for numbers in each or ())
        for each, form in zip(results, ("e", "e", "f"), strict=True)
    )
    return dict.fromkeys(of_distances) | dict(zip(of_vectors, texts, strict=True))


def _text(numbers: Numbers, form: str) -> str:
    """Return numbers as float16 ("e") or float32 ("f"), little endian, in base64."""
    return b64encode(pack(f"<{len(numbers)}{form}", *numbers)).decode()


def _suspicions(claim: Claim | VectorClaim, *, impossible: bool, sparse: bool, shifted: bool) -> tuple[str, ...]:
    """Return the names of what is odd about the batch, fraud or not."""
    share = None if claim.node_count is None else Node(claim.node_id, claim.node_count)
    found = {
        "impossible_claims": impossible,
        "duplicates": len(set(claim.nonces)) < len(claim.nonces),
        "sparse": sparse,
        "shifted": shifted,
        "other_node": share is not None and not all(map(share.has, claim.nonces)),
    }
    return tuple(word for word, is_so in found.items() if is_so)
