"""How near a mixture's routers come to another choice: what a host that rounds otherwise may choose otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from pocd.compute.engine import padded_rows
from pocd.compute.memory import is_out_of_memory
from pocd.compute.routers import routers_of
from pocd.compute.wide import WideDecoder
from pocd.protocol.errors import OutOfMemoryError
from pocd.protocol.verdicts import ALLOWANCE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pocd.compute.engine import BlockRun
    from pocd.compute.flat import FlatDecoder
    from pocd.compute.layers import LayerDecoder
    from pocd.compute.transforms import Join

NUDGE = 2.0**-22  # of embeddings in float32: about what the sums of other kernels differ by


def nudged(decoder: LayerDecoder) -> Callable[..., torch.Tensor]:
    """Return a decoder whose embeddings are off by `NUDGE`, up or down, in the same way for each nonce."""

    def decode(
        embeddings: torch.Tensor, join: Join, vectors: torch.Tensor, *, all_positions: bool = False
    ) -> torch.Tensor:
        up = torch.rand(embeddings.shape[1:], generator=torch.Generator().manual_seed(0)) < 0.5
        factors = torch.where(up.to(embeddings.device), 1 + NUDGE, 1 - NUDGE)
        return decoder(embeddings * factors, join, vectors, all_positions=all_positions)

    return decode


def gaps_of(run: BlockRun, nonces: Sequence[int], *, other: bool) -> list[torch.Tensor]:
    """Return the gaps of all routers' choices in a batch, one tensor [positions] for each choice in its order.

    Args:
        run: The model, prepared for any block.
        nonces: Nonces of the batch.
        other: Whether to compute by arithmetic that rounds otherwise: in float32, or, where the model's own is that,
            from embeddings that are off by about as much as other kernels' sums.
    """
    gaps: list[torch.Tensor] = []
    layers = replace(run.model.by_layers, choices=lambda each: gaps.append(each.float().cpu()))
    decoder: object = layers
    if other:
        decoder = nudged(layers) if run.model.dtype == torch.float32 else WideDecoder(layers)
    replace(run, model=replace(run.model, decoder=cast("FlatDecoder", decoder), program=None)).states(nonces)
    return gaps


def turned_chances(own: Sequence[torch.Tensor], other: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """Return of each nonce how probable it is that some choice is another one on another honest host, float64 [rows].

    A gap of that host is taken as normal around ours, with a standard deviation of `ALLOWANCE` times what rounding
    moves this nonce's gaps by at this choice, root mean square over its positions; no less than at an earlier choice,
    since what is off stays off, and the last layer's choices may be of one position only.

    Args:
        own: Gaps between the last chosen score and the best one left, one tensor [rows · positions] for each choice.
        other: Gaps of the same choices by arithmetic that rounds otherwise.
        rows: Nonces that they are of.
    """
    moved, turned = torch.zeros(rows, 1, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    for ours, theirs in zip(own, other, strict=True):
        gaps, others = (each.double().view(rows, -1) for each in (ours, theirs))
        apart = (gaps - others).nan_to_num(posinf=0, neginf=0)  # where nothing is left to choose
        moved = moved.maximum(apart.square().mean(dim=1, keepdim=True).sqrt())
        sizes = gaps.nan_to_num(nan=torch.inf, posinf=torch.inf) / (ALLOWANCE * moved).clamp(min=1e-300)
        turned += (torch.erfc(sizes / 2**0.5) / 2).sum(dim=1)
    return -torch.expm1(-turned)


@torch.inference_mode()
def measure_chances(run: BlockRun, nonces: Sequence[int], *, batch_size: int) -> torch.Tensor | None:
    """Return `turned_chances` of nonces, which follow from the run and each nonce: a batch's others have no part in it.

    Args:
        run: The model, prepared for a block.
        nonces: Distinct nonces, at least one.
        batch_size: Nonces per forward pass; a short one is padded.

    Returns:
        The chances, in the order of the nonces; None where the model has no routers that can be watched.

    Raises:
        OutOfMemoryError: A batch of this size does not fit.
    """
    if not routers_of(run.model.by_layers.layers):
        return None
    rows, found = padded_rows(batch_size, run.seq_len), list[torch.Tensor]()
    try:
        for start in range(0, len(nonces), batch_size):
            batch = list(nonces[start : start + batch_size])
            padded = batch + batch[-1:] * (rows - len(batch))
            own, other = (gaps_of(run, padded, other=other) for other in (False, True))
            found.append(turned_chances(own, other, rows)[: len(batch)])
        return torch.cat(found)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    raise OutOfMemoryError(  # outside the handler, whose traceback would hold the memory
        f"{rows} × {run.seq_len} positions, watched at their routers, do not fit into the memory of {run.model.device}"
    )
