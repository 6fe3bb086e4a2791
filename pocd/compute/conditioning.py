"""The reference of a computation, float32 arithmetic on the same rounded weights, and how far a host is from it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pocd.compute.wide import WideDecoder
from pocd.protocol.conditioning import Conditioning, flipped_share
from pocd.protocol.names import default_tolerance

if TYPE_CHECKING:
    from pocd.compute.engine import BlockRun

NONCES = 16  # that are measured


def reference_of(run: BlockRun) -> BlockRun:
    """Return the run that computes the same in float32 arithmetic, from the same rounded weights and inputs.

    Means and deviations of a block's samples (`poc3`) remain those of `run`.
    """
    return replace(run, model=replace(run.model, decoder=WideDecoder(run.model.by_layers), program=None))


def measure_conditioning(run: BlockRun, *, batch_size: int) -> Conditioning:
    """Compare the results of a few nonces with the reference's.

    Args:
        run: The model, prepared for any block.
        batch_size: Nonces per forward pass.

    Raises:
        OutOfMemoryError: A batch of this size does not fit.
        NonFiniteError: The model gave NaN or infinity.
    """
    own = run.values(range(NONCES), batch_size=batch_size)
    reference = reference_of(run).values(range(NONCES), batch_size=batch_size)
    difference = float((own - reference).square().mean().sqrt())
    if run.scheme.output == "vector":
        return Conditioning(difference / float(reference.square().mean().sqrt()), None)
    scatter = float(reference.std())
    dtype = str(run.model.dtype).removeprefix("torch.")
    tolerance = default_tolerance(dtype, run.scheme, run.model.hidden_size)
    return Conditioning(difference / scatter, flipped_share(difference / scatter, tolerance / scatter))
