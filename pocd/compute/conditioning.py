"""The reference of a computation, float32 arithmetic on the same rounded weights, and how far a host is from it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pocd.compute.wide import WideDecoder
from pocd.protocol.conditioning import Conditioning, flipped_share
from pocd.protocol.errors import NonFiniteError
from pocd.protocol.names import default_tolerance

if TYPE_CHECKING:
    from pocd.compute.engine import BlockRun

NONCES = 16  # that are measured


def reference_of(run: BlockRun) -> BlockRun:
    """Return the run that computes the same in float32 arithmetic, from the same rounded weights and inputs.

    Means and deviations of a block's samples (`poc3`) remain those of `run`.
    """
    return replace(run, model=replace(run.model, decoder=WideDecoder(run.model.by_layers), program=None))


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
    wide, pairs = reference_of(run), []
    for start in range(0, NONCES, batch_size):
        nonces = range(start, min(start + batch_size, NONCES))
        with suppress(NonFiniteError):  # a batch of what is mined is refused for this, not the model
            pairs.append([each.values(nonces, batch_size=batch_size) for each in (run, wide)])
    if sum(len(own) for own, _ in pairs) < 2:
        return None
    own, reference = (torch.cat(results) for results in zip(*pairs, strict=True))
    difference = float((own - reference).square().mean().sqrt())
    if run.scheme.output == "vector":
        return Conditioning(difference / float(reference.square().mean().sqrt()), None)
    scatter = float(reference.std())
    dtype = str(run.model.dtype).removeprefix("torch.")
    tolerance = default_tolerance(dtype, run.scheme, run.model.hidden_size)
    return Conditioning(difference / scatter, flipped_share(difference / scatter, tolerance / scatter))
