"""What verdicts by differences, and on mixtures of experts, say, as plain data; what makes them needs scipy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Result = Literal["honest", "fraud", "undecidable"]

ALLOWANCE = 1.5  # how many times a validator's own error an honest miner's may be, by other hardware or kernels
LARGEST_ALLOWANCE = 4.0  # with it errors of 8-bit weights and activations pass


@dataclass(frozen=True, slots=True)
class RatioTests:
    """Tests of the ratios of some nonces, claimed error / allowed error, against the law of an honest miner.

    Attributes:
        above_median: Number of nonces above the law's median.
        above_rare: Number of nonces above the law's `rare`.
        mean: Mean of ln(1 + min(ratio, ceiling)).
        p_median: Probability that an honest miner has at least `above_median`; exact.
        p_rare: Probability that an honest miner has at least `above_rare`; exact.
        p_mean: Probability that an honest miner has at least this `mean`; None for fewer than 20 nonces.
        probability: Probability that an honest miner's nonces look as bad in one of two tests: `p_rare`, and `p_mean`
            or else `p_median`. Twice the smaller of both, at most 1.
    """

    above_median: int
    above_rare: int
    mean: float
    p_median: float
    p_rare: float
    p_mean: float | None
    probability: float


@dataclass(frozen=True, slots=True)
class DifferenceVerdict:
    """Verdict on claimed numbers by their differences from a reference, and all that it follows from.

    The three lists stand beside each other, one entry per nonce. All errors are squared, and per number.

    Attributes:
        numbers: k, claimed numbers per nonce.
        allowance: How many times a validator's own error an honest miner's may be.
        threshold: The batch is fraud when the probability of an honest miner is below this.
        spread: Standard deviation of ln R in the law of an honest miner.
        claimed_errors: q, mean squared difference of each nonce's claimed numbers from the reference; None for a
            claim that is not k finite numbers, which counts as an infinite difference.
        own_errors: U, expected squared difference of the validator's own numbers from the reference.
        blank_errors: Mean squared difference from the reference of a blank claim, which holds nothing of its nonce: the
            mean of the reference over the nonces.
        malformed: Number of claims that are not k finite numbers.
        claimed: Tests of the claims.
        blank: Tests of the blank claims.
        probability_honest: Probability that an honest miner's claims differ so much.
        probability_blank: Probability that an honest miner's claims differ as much as blank ones.
        result: "fraud", "honest", or "undecidable": blank claims would not be called fraud either; the validator's own
            error is more than a quarter of blank claims'; or it is 0 at all nonces, so that it measures nothing.
    """

    numbers: int
    allowance: float
    threshold: float
    spread: float
    claimed_errors: tuple[float | None, ...]
    own_errors: tuple[float, ...]
    blank_errors: tuple[float, ...]
    malformed: int
    claimed: RatioTests
    blank: RatioTests
    probability_honest: float
    probability_blank: float
    result: Result


@dataclass(frozen=True, slots=True)
class MixtureVerdict:
    """What a mixture's routers leave of a verdict by counting invalid nonces: rounding may turn a choice of experts.

    No claim has a part in it but for `invalid`, `near_invalid` and what follows from these.

    Attributes:
        turned: Probability, by recomputed nonce in the order of their first appearance, that some choice of a router is
            another one on another honest host.
        near_above: A nonce is near a router's boundary where `turned` is above this.
        near: Number of recomputed nonces that are near.
        near_invalid: Number of those that are invalid.
        mismatch: The probability that an honest miner's nonce recomputes as invalid, mean over all: that of a nonce
            that no router turns, and `turned`, at most 1.
        p_wide: Probability that an honest miner has so many invalid nonces among those that are not near.
        p_all: Probability that an honest miner has so many invalid nonces among all.
        p_quarter: Probability that an honest miner has a quarter of all invalid; the verdict is undecidable where this
            is not below the threshold of fraud.
        decidable: Whether `p_quarter` is below that threshold.
    """

    turned: tuple[float, ...]
    near_above: float
    near: int
    near_invalid: int
    mismatch: float
    p_wide: float
    p_all: float
    p_quarter: float
    decidable: bool
