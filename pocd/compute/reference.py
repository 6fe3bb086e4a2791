"""A computation beside its reference, float32 arithmetic on the same rounded weights, and how the two differ.

What a validator judges claims by (docs/protocol.md section 5, "Verdict by differences"), and what a worker measures
when it starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pocd.compute.arithmetic import tensor_cores
from pocd.compute.engine import padded_rows
from pocd.compute.memory import is_out_of_memory
from pocd.compute.wide import WideDecoder
from pocd.protocol.errors import NonFiniteError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pocd.compute.engine import BlockRun


@dataclass(frozen=True, slots=True)
class Comparison:
    """Results of some nonces, on the host, in their order: distances, or vectors' numbers.

    Attributes:
        own: By the model in its own dtype, float32 [n] or [n, VECTOR_SIZE].
        reference: By the reference, float32 [n] or [n, VECTOR_SIZE].
        errors: Expected squared error of a number of `own`, float64 [n]: what random projections make of the difference
            of the vectors that the numbers are taken from.
    """

    own: torch.Tensor
    reference: torch.Tensor
    errors: torch.Tensor


def reference_of(run: BlockRun) -> BlockRun:
    """Return the run that computes the same in float32 arithmetic, from the same rounded weights and inputs.

    Means and deviations of a block's samples (`poc3`) remain those of `run`.
    """
    return replace(run, model=replace(run.model, decoder=WideDecoder(run.model.by_layers), program=None))


@torch.inference_mode()
def compare(
    run: BlockRun,
    nonces: Sequence[int],
    *,
    batch_size: int,
    observe: Callable[[torch.Tensor], None] | None = None,
) -> Comparison:
    """Compute nonces by a run's own arithmetic, without compiled code, and by its reference.

    Args:
        run: The model, prepared for a block.
        nonces: Distinct nonces, at least one.
        batch_size: Nonces per forward pass.
        observe: Called with the reference's hidden states [B, H] or [B, S, H] of each batch.

    Raises:
        OutOfMemoryError: A batch of this size does not fit.
        NonFiniteError: The model gave NaN or infinity; the message names the nonces and the layer.
    """
    try:
        parts = [
            _compare(run, list(nonces[start : start + batch_size]), batch_size, observe)
            for start in range(0, len(nonces), batch_size)
        ]
        return Comparison(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    raise OutOfMemoryError(  # outside the handler, whose traceback would hold the memory
        f"{batch_size} × {run.seq_len} positions in float32 do not fit into the memory of {run.model.device}"
    )


def _compare(
    run: BlockRun, nonces: list[int], batch_size: int, observe: Callable[[torch.Tensor], None] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute one batch, of as many rows as those that are mined."""
    count = len(nonces)
    padded = nonces + nonces[-1:] * (padded_rows(batch_size, run.seq_len) - count)
    states = run.states(padded)
    # Three bits more than bfloat16 are reference enough for it; float16 has as many as TF32.
    with tensor_cores(enabled=run.model.dtype == torch.bfloat16):
        exact = reference_of(run).states(padded)
    own, reference, errors = (each[:count] for each in run.differences(states, exact, padded))
    numbers = torch.cat([each.double().view(count, -1) for each in (own, reference, errors)], dim=1)
    broken = [nonce for nonce, row in zip(nonces, numbers.isfinite().all(dim=1).tolist(), strict=True) if not row]
    if broken:
        raise NonFiniteError(run.explain(broken))
    if observe is not None:
        observe(exact[:count])
    return own, reference, errors
