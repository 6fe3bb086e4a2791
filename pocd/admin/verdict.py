"""Answers of the calls that validate: a verdict, or that there is none yet."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from pocd.protocol.verdicts import Result


class DifferenceTests(BaseModel):
    """Tests of the nonces' ratios, claimed error / allowed error, against the law of an honest miner."""

    above_median: int = Field(description="Nonces above the law's median.")
    above_rare: int = Field(description="Nonces above what 2% of honest ones exceed.")
    mean: float = Field(description="Mean of ln(1 + min(ratio, the law's ceiling)).")
    p_median: float = Field(description="Probability that an honest miner has at least `above_median`.")
    p_rare: float = Field(description="Probability that an honest miner has at least `above_rare`.")
    p_mean: float | None = Field(description="Probability that it has at least `mean`; null for fewer than 20 nonces.")
    probability: float = Field(description="Twice the least of p_rare and p_mean, or p_median in its place; at most 1.")


class Differences(BaseModel):
    """Verdict by the size of the claims' differences from a reference (docs/protocol.md, "Verdict by differences").

    The three lists have an entry for each distinct recomputed nonce, in the order of their first appearance.
    """

    numbers: int = Field(description="Claimed numbers per nonce.")
    allowance: float = Field(description="How many times the validator's own error an honest miner's may be.")
    threshold: float = Field(description="The batch is fraud when an honest miner is less probable than this.")
    spread: float = Field(description="Standard deviation of the logarithm of two honest squared errors' ratio.")
    claimed_errors: list[float | None] = Field(
        description="Mean squared difference of the claimed numbers from the reference; null where it is infinite."
    )
    own_errors: list[float] = Field(description="Expected squared error of the validator's own numbers.")
    blank_errors: list[float] = Field(description="Mean squared error of a claim that holds nothing of its nonce.")
    malformed: int = Field(description="Claims that are not so many finite numbers.")
    claimed: DifferenceTests
    blank: DifferenceTests
    probability_honest: float = Field(description="Probability that an honest miner's claims differ so much.")
    probability_blank: float = Field(description="Probability that they differ as much as blank ones.")
    result: Result = Field(description='"undecidable": blank claims would not be called fraud either.')


class Mixture(BaseModel):
    """What a mixture's routers leave of a verdict by counting (docs/protocol.md, "Verdict on mixtures")."""

    turned: list[float] = Field(
        description="Probability that a router chooses otherwise on another honest host, of each distinct recomputed "
        "nonce in the order of their first appearance. No claim has a part in it."
    )
    near_above: float = Field(description="A nonce is near a router's boundary where `turned` is above this.")
    near: int = Field(description="Distinct recomputed nonces that are near.")
    near_invalid: int = Field(description="Near ones that are not valid.")
    mismatch: float = Field(description="The probability that an honest miner's nonce recomputes as invalid, over all.")
    p_wide: float = Field(description="Probability that an honest miner has so many bad nonces that are not near.")
    p_all: float = Field(description="Probability that an honest miner has so many bad nonces, near or not.")
    p_quarter: float = Field(description="Probability that a quarter of an honest miner's nonces are bad.")
    decidable: bool = Field(description="Whether p_quarter is below the threshold; else only impossible claims count.")


class Verdict(BaseModel):
    """A ValidatedBatch: what was recomputed, and whether it is fraud (docs/protocol.md section 5, "Verdict").

    The lists stand beside each other: the batch's entries as they came, repeats included; of a sample, the entries of
    its nonces. Lists of distances are there with a scheme of distances, lists of vectors with one of vectors.
    """

    public_key: str
    block_hash: str
    block_height: int
    node_id: int
    nonces: list[int]
    received_dist: list[float | None] | None = Field(
        default=None, description="Claimed distances; null where the claim is no finite number."
    )
    dist: list[float] | None = Field(default=None, description="Recomputed distances, in [0, 2].")
    reference_dist: list[float] | None = Field(
        default=None, description="Distances by float32 arithmetic; absent where there are no `differences`."
    )
    received_vectors: list[str | None] | None = Field(
        default=None, description="Claimed vectors, float16 in base64; null where the claim is no finite vector."
    )
    vectors: list[str] | None = Field(default=None, description="Recomputed vectors, float16 in base64.")
    reference_vectors: list[str] | None = Field(
        default=None, description="Vectors by float32 arithmetic, float32 in base64."
    )
    valid: list[bool] = Field(description="Whether each entry's nonce is valid.")
    r_target: float | None = Field(default=None, description="Target of distances; absent for vectors.")
    fraud_threshold: float
    n_invalid: int = Field(description="Recomputed distinct nonces that are not valid.")
    probability_honest: float = Field(
        description="Probability that an honest miner has at least as many bad nonces; of a mixture of experts that is "
        "not decidable, as many impossible claims."
    )
    mixture: Mixture | None = Field(
        default=None,
        description="What a mixture's routers leave of the verdict on distances; absent where there are none.",
    )
    differences: Differences | None = Field(
        description="The verdict by the size of the differences; null for distances in float32."
    )
    verdict: Result = Field(
        description="The verdict: for distances by probability_honest, or undecidable by `mixture`; for vectors by "
        "`differences`, or fraud by both."
    )
    fraud_detected: bool = Field(description='Whether the verdict is "fraud".')
    n: int = Field(description="Distinct nonces that were recomputed.")
    n_batch: int = Field(description="Distinct nonces of the whole batch.")
    impossible_claims: int = Field(description="Distinct nonces in the whole batch with an impossible claim.")
    duplicates: int = Field(description="Entries in the whole batch that repeat a nonce; each nonce counts once.")
    non_finite: int = Field(description="Claims in the whole batch that are no finite number.")
    density: float = Field(description="Share of the node's nonces, up to the largest, that the batch holds.")
    sparse: bool = Field(description="Whether density is 1% or less: suspicious, but no fraud by itself.")
    shifted: int = Field(
        description="Recomputed nonces with a claimed number further than `tolerance` from the recomputed one."
    )
    largest_difference: float | None = Field(
        description="Largest difference between a claimed and a recomputed number; null without a finite claim."
    )
    tolerance: float = Field(description="How far above r_target a recomputed distance still counts as valid.")
    mismatch: float = Field(description="The probability that an honest miner's nonce recomputes as invalid.")
    scheme: str
    model: str
    model_fingerprint: str = Field(description="Fingerprint of the weights that the distances were recomputed with.")
    dtype: str = Field(description="Precision in which the distances were recomputed.")
    seq_len: int
    node_count: int
    sample: int | None = Field(description="Number of nonces drawn for recomputation; null when all were recomputed.")
    seed: str | None = Field(description="Seed of the sample; null when all nonces were recomputed.")
    suspicions: list[str] = Field(description="Names of what is odd about the batch, fraud or not.")
    batch_id: str = Field(description="Id of this verdict, a hash of its content.")


class Waiting(BaseModel):
    """A validation that is not done yet; GET /api/v1/pow/validate/{id} returns the verdict later."""

    id: str
    state: Literal["pending"]
