"""The verdict by counting on a mixture of experts, whose routers may choose otherwise on another honest host.

Source: docs/protocol.md section 5, "Verdict on mixtures".
"""

from __future__ import annotations

import math
from itertools import compress
from typing import TYPE_CHECKING

from pocd.protocol.theory import probability_honest
from pocd.protocol.verdicts import MixtureVerdict

if TYPE_CHECKING:
    from collections.abc import Sequence

NEAR = 1e-4  # a nonce that is turned with a higher probability is near a router's boundary
BLANK = 0.25  # share of invalid nonces that has to be fraud, or nothing is decided


def judge_mixture(
    turned: Sequence[float], invalid: Sequence[bool], mismatch: float, threshold: float
) -> MixtureVerdict:
    """Judge how many nonces of a mixture are invalid.

    Counted are those that are not near a router's boundary, as of any model; and all, by what each is invalid by.

    Args:
        turned: How probable it is that a router chooses otherwise on another honest host, by nonce, at least one.
        invalid: Whether each nonce is invalid.
        mismatch: The probability that an honest miner's nonce recomputes as invalid where no router turns.
        threshold: The batch is fraud when the probability of an honest miner is below this.
    """
    is_near = [chance > NEAR for chance in turned]
    near, bad, near_bad = sum(is_near), sum(invalid), sum(compress(invalid, is_near))
    each = [min(1.0, mismatch + chance) for chance in turned]
    p_quarter = _at_least(math.ceil(BLANK * len(each)), each)
    return MixtureVerdict(
        turned=tuple(turned),
        near_above=NEAR,
        near=near,
        near_invalid=near_bad,
        mismatch=math.fsum(each) / len(each),
        p_wide=probability_honest(bad - near_bad, len(each) - near, mismatch),
        p_all=_at_least(bad, each),
        p_quarter=p_quarter,
        decidable=p_quarter < threshold,
    )


def _at_least(count: int, probabilities: Sequence[float]) -> float:
    """Return the probability of at least `count` events of these probabilities, or a bound of it where it is small.

    Of two and more, and one beyond the mean, the binomial tail of the mean probability is a bound (Hoeffding 1956);
    below that neither is small.
    """
    if count == 1:
        return 1 - math.prod(1 - each for each in probabilities)
    n = len(probabilities)
    return probability_honest(count, n, math.fsum(probabilities) / n)
