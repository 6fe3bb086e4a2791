"""How far rounding decides results, and how much of them is the nonce's own: what a worker measures when it starts.

Two honest hosts round differently. Where that moves results about as far as results differ between nonces, a validator
cannot tell an honest miner from a fraud (docs/protocol.md section 5, "Depth").
"""

from __future__ import annotations

from dataclasses import dataclass

from pocd.protocol.proof import MISMATCH

LEAST_OWN_SHARE = 0.05  # below it a miner gets 95% of an output's squares from any other nonce's
LARGEST_ERROR = 0.1  # of vectors: rounding is then 1% of their squares, as much as coarse 8-bit arithmetic is


@dataclass(frozen=True, slots=True)
class Conditioning:
    """How far a host's results lie from those of float32 arithmetic on the same weights.

    Attributes:
        error: Root mean square of the differences, as a share of the scatter of results between nonces: the standard
            deviation of distances, the root mean square of vectors' numbers. 1.4 and more: rounding alone decides. None
            where nothing scatters: all distances are the same, or all vectors are 0.
        flipped: Share of an honest miner's valid nonces that another honest host finds invalid, with the default
            tolerance, where one nonce in ten is valid; None where all nonces count, or nothing scatters.
        own_share: Share of the squares of the model's outputs that is the nonce's own: what is left when the mean over
            nonces is taken away. Near 0 all nonces have one output, which tells nothing of who computed it; 0 where
            nothing scatters.
        turned: Share of nonces of which at least one choice of a mixture's router is another one on a host that rounds
            otherwise; None where there is no such router.
    """

    error: float | None
    flipped: float | None
    own_share: float
    turned: float | None = None

    @property
    def alarm(self) -> str | None:
        """Why a person should act; None while results are worth something."""
        if self.own_share < LEAST_OWN_SHARE:
            return (
                f"in this model and scheme all nonces have nearly the same output: {self.own_share:.2%} of its squares "
                f"are the nonce's own, and {LEAST_OWN_SHARE:.0%} is the least; take another scheme or model"
            )
        assert self.error is not None, "results scatter where a share of the outputs is the nonce's own"
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
