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

    Counted are those that are not near a router's boundary, as of any model; and all, with the mean of what each is
    invalid by. Of counts beyond their mean by one or more, the binomial tail of the mean probability bounds that of
    different probabilities (Hoeffding 1956), so the second test accuses no more honest miners than it says.

    Args:
        turned: How probable it is that a router chooses otherwise on another honest host, by nonce, at least one.
        invalid: Whether each nonce is invalid.
        mismatch: The probability that an honest miner's nonce recomputes as invalid where no router turns.
        threshold: The batch is fraud when the probability of an honest miner is below this.
    """
    n, is_near = len(turned), [chance > NEAR for chance in turned]
    near, bad, near_bad = sum(is_near), sum(invalid), sum(compress(invalid, is_near))
    of_all = math.fsum(min(1.0, mismatch + chance) for chance in turned) / n
    p_quarter = probability_honest(math.ceil(BLANK * n), n, of_all)
    return MixtureVerdict(
        turned=tuple(turned),
        near_above=NEAR,
        near=near,
        near_invalid=near_bad,
        mismatch=of_all,
        p_wide=probability_honest(bad - near_bad, n - near, mismatch),
        p_all=probability_honest(bad, n, of_all),
        p_quarter=p_quarter,
        decidable=p_quarter < threshold,
    )
