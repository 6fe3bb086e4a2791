"""Theory of distances: what to expect of honest nonces."""

from __future__ import annotations

from scipy.special import betainc


def expected_valid_rate(r_target: float, dimension: int) -> float:
    """Return the share of nonces whose distance is below `r_target`, were outputs uniformly random.

    Between uniformly random unit vectors in D dimensions, d = √(2 − 2c) with (c + 1)/2 following
    Beta((D − 1)/2, (D − 1)/2) (Muller 1959; docs/protocol.md section 1).

    Args:
        r_target: A distance; 0 and less give 0, 2 and more give 1.
        dimension: D, at least 2.
    """
    d = min(max(r_target, 0.0), 2.0)
    half = (dimension - 1) / 2
    # P(distance < d) = P((1 − c)/2 < d²/4), and (1 − c)/2 follows the same Beta.
    return float(betainc(half, half, d * d / 4))
