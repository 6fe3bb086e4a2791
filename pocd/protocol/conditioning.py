"""How far rounding decides results: what a worker measures when it starts, and when it is too much.

Two honest hosts round differently. Where that moves results about as far as results differ between nonces, a validator
cannot tell an honest miner from a fraud (docs/protocol.md section 5, "Depth").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from pocd.protocol.proof import MISMATCH

RATE = 0.1  # of valid nonces, for which the share of flipped ones is told
LARGEST_ERROR = 0.1  # of vectors: rounding is then 1% of their squares, as much as coarse 8-bit arithmetic is


@dataclass(frozen=True, slots=True)
class Conditioning:
    """How far a host's results lie from those of float32 arithmetic on the same weights.

    Attributes:
        error: Root mean square of the differences, as a share of the scatter of results between nonces: the standard
            deviation of distances, the root mean square of vectors' numbers. 1.4 and more: rounding alone decides.
        flipped: Share of an honest miner's valid nonces that another honest host finds invalid, with the default
            tolerance, where one nonce in ten is valid; None where all nonces count.
    """

    error: float
    flipped: float | None

    @property
    def alarm(self) -> str | None:
        """Why a person should act; None while rounding is harmless."""
        if self.flipped is None:
            if self.error <= LARGEST_ERROR:
                return None
            told = f"vectors are off by {self.error:.1%} of their size, and {LARGEST_ERROR:.0%} is the limit"
        else:
            if self.flipped <= MISMATCH:
                return None
            told = (
                f"{self.flipped:.2%} of honest nonces would be found invalid by another honest host, and "
                f"{MISMATCH:.2%} is the limit"
            )
        return f"rounding decides too much in this model, scheme and dtype: {told}; take another scheme or model.dtype"


def flipped_share(error: float, tolerance: float, rate: float = RATE) -> float:
    """Return the share of one honest host's valid nonces that are invalid for another one.

    Both distances of a nonce are taken as normal numbers, and each host's rounding as its own. A difference of variance
    e² from the reference, where distances have variance 1, is a correlation of 1 − e²/2 with it; two hosts correlate by
    its square.

    Args:
        error: Root mean square of a host's differences from the reference, in standard deviations of distances.
        tolerance: How far beyond r_target a nonce still counts, in the same unit.
        rate: Share of valid nonces.
    """
    correlation = max(0.0, 1 - error * error / 2) ** 2
    if correlation == 1:
        return 0.0
    r_target = float(ndtri(rate))
    below = np.concatenate([[0.0], np.geomspace(1e-9, 8, 4000)])  # how far below r_target the miner's distance lies
    distance = r_target - below
    density = np.exp(-(distance**2) / 2) / math.sqrt(2 * math.pi)
    beyond = ndtr((correlation * distance - r_target - tolerance) / math.sqrt(1 - correlation**2))
    both = density * beyond
    return float(((both[1:] + both[:-1]) / 2 * np.diff(below)).sum()) / rate
