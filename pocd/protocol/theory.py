"""Theory of distances: what to expect of honest nonces, and how probable a batch is for an honest miner."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betainc, betaincinv, ndtr, ndtri, poch

RATE = 0.1  # of valid nonces, for which the share of flipped ones is told


def expected_valid_rate(r_target: float, dimension: int) -> float:
    """Return the share of nonces whose distance is below `r_target`, were outputs uniformly random.

    Between uniformly random unit vectors in D dimensions, d = √(2 − 2c) with (c + 1)/2 following
    Beta((D − 1)/2, (D − 1)/2) (Muller 1959; docs/protocol.md section 1). One of the two may be anything: where
    the target is drawn per nonce (`poc3`), this holds for every model and within each block.

    The same holds behind a random head, z = W h with W normal: for any h, z/‖z‖ is uniform on the
    sphere in D dimensions. But only over many blocks, as a uniform target alone makes it so; within a
    block, where W and t stay, see `head_valid_rate`.

    Args:
        r_target: Distance below which a nonce is valid; 0 and less give 0, 2 and more give 1.
        dimension: Dimension D of the outputs, at least 2.
    """
    d = min(max(r_target, 0.0), 2.0)
    half = (dimension - 1) / 2
    # P(distance < d) = P((1 − c)/2 < d²/4), and (1 − c)/2 follows the same Beta.
    return float(betainc(half, half, d * d / 4))


def r_target_for(rate: float, dimension: int) -> float:
    """Return the `r_target` whose `expected_valid_rate` is `rate` (0 to 1)."""
    half = (dimension - 1) / 2
    return 2 * math.sqrt(betaincinv(half, half, rate))


def distance_moments(dimension: int) -> tuple[float, float]:
    """Return mean and standard deviation of the distance in D dimensions, exactly.

    With B = (1 − c)/2 as above and m = (D − 1)/2, d = 2√B, E d² = 2 and E √B = (m)_½ / (2m)_½, rising factorials.
    """
    half = (dimension - 1) / 2
    mean = 2 * float(poch(half, 0.5) / poch(2 * half, 0.5))
    return mean, math.sqrt(2 - mean * mean)


def probability_honest(n_invalid: int, n: int, mismatch: float) -> float:
    """Return the probability that an honest miner has at least `n_invalid` invalid nonces among `n`.

    The one-sided ("greater") binomial test of docs/protocol.md section 5.

    Args:
        n_invalid: Number of nonces that did not recompute as valid.
        n: Number of nonces checked; for 0 the probability is 1.
        mismatch: Probability that an honest nonce recomputes as invalid, 0 to 1.

    Raises:
        ValueError: The counts or the probability are impossible.
    """
    if not 0 <= n_invalid <= n:
        raise ValueError(f"n_invalid must be from 0 to n = {n}, got {n_invalid}")
    if not 0 <= mismatch <= 1:
        raise ValueError(f"mismatch must be a probability from 0 to 1, got {mismatch}")
    return float(betainc(n_invalid, n - n_invalid + 1, mismatch)) if n_invalid else 1.0


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
