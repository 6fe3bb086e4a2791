"""The live network's verdict on vectors: how many lie further from one's own than they may (docs/live.md).

Pure and exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

MOST_EXCLUDED = 0.1  # of the nonces, beyond which there is no verdict; one may always be


@dataclass(frozen=True, slots=True)
class LiveTerms:
    """The terms of a model on the live network.

    Attributes:
        dist_threshold: Two vectors further apart than this, in L2, are a mismatch.
        p_mismatch: Probability that an honest miner's vector is one, above 0 and below 1.
        fraud_threshold: A batch is fraud when its p-value is below this. The network's programs know this name
            alone, and take 0.01 where a caller says `p_value_threshold`.
    """

    dist_threshold: float = 0.02
    p_mismatch: float = 0.001
    fraud_threshold: float = 0.01


@dataclass(frozen=True, slots=True)
class LiveVerdict:
    """A verdict on vectors.

    Attributes:
        n_total: Number of nonces judged.
        n_mismatch: Number of mismatches among them.
        mismatch_nonces: Nonces of the mismatches, in the order of the claim.
        excluded_nonces: Nonces that the validator has no vector of; they are not judged.
        distances: L2 distance of each nonce judged, in the order of the claim; None for a vector that is none.
        p_value: Probability of so many mismatches or more from an honest miner.
        fraud_detected: Whether the p-value is below the threshold.
    """

    n_total: int
    n_mismatch: int
    mismatch_nonces: tuple[int, ...]
    excluded_nonces: tuple[int, ...]
    distances: tuple[float | None, ...]
    p_value: float
    fraud_detected: bool


def judge_live(
    claimed: Sequence[tuple[int, NDArray[np.float32] | None]], own: Mapping[int, NDArray[np.float32]], terms: LiveTerms
) -> LiveVerdict | None:
    """Judge claimed vectors by one's own; None where too few of one's own are known for a verdict.

    Args:
        claimed: Distinct nonces with their vectors [k]; None for what is no vector of k finite numbers.
        own: The validator's vectors [k], finite; nonces without one are left out of the verdict.
        terms: The network's terms for the model.
    """
    from pocd.protocol.theory import probability_honest

    judged = [(nonce, vector) for nonce, vector in claimed if nonce in own]
    excluded = tuple(nonce for nonce, _ in claimed if nonce not in own)
    if len(excluded) > max(1, int(MOST_EXCLUDED * len(claimed))):
        return None
    distances = [None if vector is None else _apart(vector, own[nonce]) for nonce, vector in judged]
    far = [distance is None or distance > terms.dist_threshold for distance in distances]
    mismatches = tuple(nonce for (nonce, _), is_far in zip(judged, far, strict=True) if is_far)
    p_value = probability_honest(len(mismatches), len(judged), terms.p_mismatch)
    return LiveVerdict(
        n_total=len(judged),
        n_mismatch=len(mismatches),
        mismatch_nonces=mismatches,
        excluded_nonces=excluded,
        distances=tuple(distances),
        p_value=p_value,
        fraud_detected=p_value < terms.fraud_threshold,
    )


def _apart(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the L2 distance of two vectors, from float32 as the network's programs take it."""
    import numpy as np

    return float(np.linalg.norm(one.astype(np.float32) - other.astype(np.float32)))
