"""All positions as one vector: a signed sum, or a product of such sums over segments (docs/protocol.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from pocd.compute.random import normal, seeds_tensor
from pocd.protocol.schemes import SEGMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLES = 128  # inputs from which means and deviations are estimated
SAMPLES_AT_ONCE = 8  # always, so that rounding depends on nobody's batch size
LEAST_DEVIATION = 0.01  # of a coordinate, as a share of the root of all coordinates' mean variance
STATES_CHUNK = 2**24  # elements of hidden states that are copied to float32 at a time: 64 MiB


@dataclass(frozen=True, slots=True)
class Standard:
    """Mean and deviation of the unit vectors of a block's hidden states, by which they are standardised.

    Attributes:
        mean: Mean unit vector at each position, float32 [S, H].
        deviation: Standard deviation of each coordinate over all positions, float32 [H].
    """

    mean: torch.Tensor
    deviation: torch.Tensor


def measure(
    run: Callable[[torch.Tensor], torch.Tensor], block_hash: str, seq_len: int, hidden_size: int, like: torch.Tensor
) -> Standard:
    """Estimate means and deviation from inputs that follow from the block hash alone.

    Args:
        run: Computes hidden states of all positions from embeddings, both [SAMPLES_AT_ONCE, S, H].
        block_hash: The block's hash.
        seq_len: Sequence length S.
        hidden_size: Hidden size H.
        like: A tensor on the model's device, in its dtype.
    """
    total = torch.zeros(seq_len, hidden_size, dtype=torch.float64, device=like.device)
    square = torch.zeros_like(total)
    for first in range(0, SAMPLES, SAMPLES_AT_ONCE):
        texts = [f"{block_hash}_sample_{k}_input" for k in range(first, first + SAMPLES_AT_ONCE)]
        flat = normal(seeds_tensor(texts, like.device), seq_len * hidden_size, dtype=like.dtype)
        for states in run(flat.view(SAMPLES_AT_ONCE, seq_len, hidden_size)):  # one by one: they become float64
            wide = states.float()
            unit = (wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True)).double()
            total += unit
            square += unit.square()
    mean = total / SAMPLES
    variance = (square / SAMPLES - mean.square()).mean(dim=0).clamp_min(0)
    deviation = variance.sqrt().clamp_min(LEAST_DEVIATION * variance.mean().sqrt())
    return Standard(mean.float(), deviation.float())


def factors(states: torch.Tensor, signs: torch.Tensor, standard: Standard) -> torch.Tensor:
    """Return the segments' unit vectors, float32 [B, SEGMENTS, H], whose product is the readout.

    Σ ε (A − μ) is taken as Σ (ε/‖h‖) h − Σ ε μ: products of matrices, and no copy of A.

    Args:
        states: Hidden states h after the final norm [B, S, H]; A is h/‖h‖. S is at least SEGMENTS.
        signs: ε, 1 or −1, float32 [B, S].
        standard: Mean and deviation of the block.
    """
    inside = _segments(states.shape[1], states.device)
    bounds = _bounds(states.shape[1])
    sums = _sum_fused(states, signs, bounds) if _is_fused(states) else _sum_in_chunks(states, signs, inside)
    x = (sums - (inside * signs.unsqueeze(1)) @ standard.mean) / standard.deviation
    unit: torch.Tensor = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return unit


def _sum_in_chunks(states: torch.Tensor, signs: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Return Σ (ε/‖h‖) h over each segment, float32 [B, SEGMENTS, H], as products of matrices."""
    return torch.cat([(inside * weight.unsqueeze(1)) @ wide for wide, weight in _weighted(states, signs)])


def _weighted(states: torch.Tensor, signs: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a few nonces' states in float32 [b, S, H] at a time, and ε/‖h‖ [b, S]."""
    _, length, size = states.shape
    rows = max(1, STATES_CHUNK // (length * size))
    for some, sign in zip(states.split(rows), signs.split(rows), strict=True):
        wide = some.float()
        yield wide, sign / torch.linalg.vector_norm(wide, dim=-1)


def _is_fused(states: torch.Tensor) -> bool:
    """Tell whether torch's compiler is at work for a GPU: it would make kernels for each of the chunks."""
    return torch.compiler.is_compiling() and states.device.type == "cuda"


def _sum_fused(states: torch.Tensor, signs: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Return Σ (ε/‖h‖) h between bounds: for torch's compiler, which makes a kernel of each, and no copy of states."""
    weight = (signs / torch.linalg.vector_norm(states.float(), dim=-1)).unsqueeze(-1)
    parts = [slice(start, stop) for start, stop in pairwise(bounds)]
    return torch.stack([(states[:, part].float() * weight[:, part]).sum(dim=1) for part in parts], dim=1)


def _bounds(length: int) -> list[int]:
    """Return where segments begin and end: segment g is from ⌊gS/G⌋ to below ⌊(g + 1)S/G⌋."""
    return [g * length // SEGMENTS for g in range(SEGMENTS + 1)]


def signed_sum(states: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return the signed sum of the positions' unit vectors, divided by √S, float32 [B, H].

    Args:
        states: Hidden states after the final norm [B, S, H].
        signs: 1 or −1, float32 [B, S].
    """
    length = states.shape[1]
    if _is_fused(states):
        sums = _sum_fused(states, signs, [0, length])[:, 0]
    else:
        # Not as a product of matrices: of one row, its rounding may depend on the place in the batch.
        parts = [(wide * weight.unsqueeze(-1)).sum(dim=1) for wide, weight in _weighted(states, signs)]
        sums = torch.cat(parts)
    scale: float = length**-0.5
    return sums * scale


def _segments(length: int, device: torch.device) -> torch.Tensor:
    """Return 1 where a position is in a segment, else 0, float32 [SEGMENTS, S]."""
    position = torch.arange(length, device=device)
    return torch.stack([(position >= start) & (position < stop) for start, stop in pairwise(_bounds(length))]).float()
