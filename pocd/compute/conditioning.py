"""How far a host's results are from those of exact arithmetic, and how much of them is the nonce's own."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from pocd.compute.engine import padded_rows
from pocd.compute.margins import gaps_of
from pocd.compute.reference import compare
from pocd.compute.routers import routers_of
from pocd.protocol.conditioning import Conditioning
from pocd.protocol.errors import NonFiniteError
from pocd.protocol.names import default_tolerance
from pocd.protocol.theory import RATE, flipped_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.compute.engine import BlockRun

NONCES = 16  # that are measured
MEAN_ABOVE_0 = 0.59  # of a normal number, where negative ones count as 0, in medians of its size
NARROW = 0.1  # share of a router's choices, those with the narrowest gaps, that tell how many are narrower still


class OwnShare:
    """Share of the outputs' squares that is the nonce's own: what is left when the mean over nonces is taken away."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | float = 0.0
        self._squares = 0.0  # of all states, 1 each but for those that are 0
        self._count = 0

    def add(self, states: torch.Tensor) -> None:
        """Take in the hidden states [B, H] or [B, S, H] of some nonces; each position's are scaled to unit length."""
        unit = torch.nn.functional.normalize(states.double(), dim=-1)
        self._sum = self._sum + unit.sum(dim=0)
        self._squares += len(states) * float(unit.square().sum(dim=-1).mean())
        self._count += len(states)

    def value(self) -> float:
        """Return the share, estimated without bias from 2 nonces or more: about 1 where nonces have nothing in common.

        It is the mean over positions; a state of zeros has nothing of its own.
        """
        assert isinstance(self._sum, torch.Tensor), "some states were added"
        n = self._count
        common = float((self._sum / n).square().sum(dim=-1).mean())
        return max(0.0, (self._squares / n - common) * n / (n - 1))


def turned_share(own: Sequence[torch.Tensor], other: Sequence[torch.Tensor], rows: int) -> float:
    """Return the share of nonces of which at least one choice is another one where arithmetic rounds otherwise.

    The gaps of a router have some density near 0, which its narrowest ones show, and rounding moves them by what the
    two ways differ by: of a choice that is more of them than are found turned, where few are.

    Args:
        own: Gaps between the last chosen score and the best one left, one tensor [positions] for each choice.
        other: Gaps of the same choices by arithmetic that rounds otherwise.
        rows: Nonces that they are of.
    """
    turned = 0.0  # choices of a nonce
    for ours, theirs in zip(own, other, strict=True):
        narrow = float(ours.kthvalue(max(1, math.ceil(NARROW * len(ours)))).values)
        moved = MEAN_ABOVE_0 * float((ours - theirs).abs().nanmedian())
        turned += len(ours) / rows * min(1.0, NARROW * moved / narrow if narrow > 0 else 1.0)
    return 1 - math.exp(-turned)


@torch.inference_mode()
def measure_turned(run: BlockRun, *, batch_size: int) -> float | None:
    """Return the share of nonces of which a mixture's router chooses otherwise on a host that rounds otherwise.

    Args:
        run: The model, prepared for any block.
        batch_size: Nonces per forward pass.

    Returns:
        The share; None where the model has no routers that can be watched.

    Raises:
        OutOfMemoryError: A batch of this size does not fit.
    """
    if not routers_of(run.model.by_layers.layers):
        return None
    nonces = range(padded_rows(min(batch_size, NONCES), run.seq_len))
    own, other = (gaps_of(run, nonces, other=other) for other in (False, True))
    return turned_share(own, other, len(nonces))


def measure_conditioning(run: BlockRun, *, batch_size: int) -> Conditioning | None:
    """Compare the results of a few nonces with the reference's.

    Args:
        run: The model, prepared for any block.
        batch_size: Nonces per forward pass; where one of them gives NaN or infinity, all are left out.

    Returns:
        The comparison; None where fewer than two results are left.

    Raises:
        OutOfMemoryError: A batch of this size does not fit.
    """
    found, own_share = [], OwnShare()
    for start in range(0, NONCES, batch_size):
        nonces = range(start, min(start + batch_size, NONCES))
        with suppress(NonFiniteError):  # a batch of what is mined is refused for this, not the model
            found.append(compare(run, nonces, batch_size=batch_size, observe=own_share.add))
    if sum(len(each.own) for each in found) < 2:
        return None
    own, reference = torch.cat([each.own for each in found]), torch.cat([each.reference for each in found])
    turned = measure_turned(run, batch_size=batch_size)
    difference, share = float((own - reference).square().mean().sqrt()), own_share.value()
    is_of_vectors = run.scheme.output == "vector"
    scatter = float(reference.square().mean().sqrt() if is_of_vectors else reference.std())
    if not scatter:
        return Conditioning(None, None, 0.0, turned)
    if is_of_vectors:
        return Conditioning(difference / scatter, None, share, turned)
    dtype = str(run.model.dtype).removeprefix("torch.")
    tolerance = default_tolerance(dtype, run.scheme, run.model.hidden_size)
    flipped = flipped_share(difference / scatter, tolerance / scatter)
    if run.model.dtype == torch.float32 and turned is not None:  # there the reference rounds as the model does
        flipped = max(flipped, (1 - RATE) * turned)
    return Conditioning(difference / scatter, flipped, share, turned)
