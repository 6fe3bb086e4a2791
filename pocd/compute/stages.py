"""From seeds to distances or vectors: pure functions of tensors, run as they are, compiled, or captured.

A batch of B nonces is one table of seeds, int32 bits [B, K]; its columns are those of `seed_texts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.library import custom_op

from pocd.compute.random import normal, signs, unit_normal
from pocd.compute.segments import factors, signed_sum
from pocd.compute.transforms import reflect_in_order
from pocd.protocol.schemes import VECTOR_SIZE

if TYPE_CHECKING:
    from pocd.compute.segments import Standard
    from pocd.protocol.schemes import Scheme

HEAD_CHUNK = 2**24  # elements of the head that are in float32 at a time: 64 MiB


@dataclass(frozen=True, slots=True)
class BlockTensors:
    """The tensors that belong to a block hash, for all of its nonces.

    Attributes:
        vectors: One unit vector per layer [layers, H], in the model's dtype.
        head: Output matrix [D, H], in any dtype; None where the scheme has none.
        target: Target vector, float32 [D], unit length; None without a head: each nonce then has its own, and D is H.
        standard: Mean and deviation used to standardise hidden states; None unless the scheme reads segments.
    """

    vectors: torch.Tensor
    head: torch.Tensor | None
    target: torch.Tensor | None
    standard: Standard | None


def seed_texts(scheme: Scheme, nonce: int) -> list[str]:
    """Return the ends of a nonce's seed texts: input, reflections, signs, target or projection."""
    texts = [f"nonce{nonce}", *(f"nonce_{nonce}_hidden_r{r}" for r in range(scheme.reflections))]
    if scheme.reads_all:
        texts.append(f"nonce_{nonce}_signs")
    if scheme.head == "none":
        texts.append(f"nonce_{nonce}_target")
    if scheme.head == "projection":
        texts.append(f"nonce_{nonce}_projection")
    return texts


def draw_inputs(seeds: torch.Tensor, seq_len: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw random input embeddings [B, S, H]."""
    return normal(seeds[:, 0], seq_len * hidden_size, dtype=dtype).view(len(seeds), seq_len, hidden_size)


def find_factors(states: torch.Tensor, seeds: torch.Tensor, scheme: Scheme, standard: Standard) -> torch.Tensor:
    """Return the factors whose product is the readout of all positions [B, S, H], float32 [B, SEGMENTS, H]."""
    return factors(states, _signs(states, seeds, scheme), standard)


def find_readout(states: torch.Tensor, seeds: torch.Tensor, scheme: Scheme, standard: Standard | None) -> torch.Tensor:
    """Return what the scheme reads [B, H] of hidden states: of the last position [B, H], or of all [B, S, H]."""
    if standard is not None:
        return find_factors(states, seeds, scheme, standard).prod(dim=1)
    if scheme.reads == "signed sum":
        return signed_sum(states, _signs(states, seeds, scheme))
    return states if states.dim() == 2 else states[:, -1]


def _signs(states: torch.Tensor, seeds: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return signs(seeds[:, 1 + scheme.reflections], states.shape[1])


def find_vectors(readout: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Return the vectors P·x, float32 [B, VECTOR_SIZE], of readouts x [B, H]; P is each nonce's own."""
    size = readout.shape[-1]
    projections = normal(seeds[:, -1], VECTOR_SIZE * size).view(len(seeds), VECTOR_SIZE, size)
    # Not as a product with a vector: its rounding may depend on the place in the batch.
    return (projections * readout.unsqueeze(1)).sum(dim=-1)


def draw_targets(seeds: torch.Tensor, dimension: int) -> torch.Tensor:
    """Draw the targets of single nonces, where there is no head: unit vectors, float64 [B, D]."""
    return unit_normal(seeds[:, -1], dimension).double()


def find_hidden(readout: torch.Tensor, seeds: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return the head's input, or without a head the vector compared with the target, float32 [B, H]."""
    h, count = readout.float(), scheme.reflections
    if count:
        h = reflect_in_order(h, unit_normal(seeds[:, 1 : 1 + count], h.shape[-1]))
    return h / h.norm(dim=-1, keepdim=True) if scheme.normalise else h


def find_distance(h: torch.Tensor, seeds: torch.Tensor, block: BlockTensors) -> torch.Tensor:
    """Return the distances ‖z/‖z‖ − t‖ of z = W h, or of z = h without a head, float32 [B].

    As ‖t‖ = 1 it is √(2 − 2 z·t/‖z‖), which is as exact wherever distances are found: near √2.
    """
    if block.head is None or block.target is None:
        along, square = (h * draw_targets(seeds, h.shape[-1])).sum(dim=-1), h.double().square().sum(dim=-1)
    else:
        along, square = _through_head(h, block.head, block.target)
    return (2 - 2 * along / square.sqrt()).clamp_min(0).sqrt().float()


# An operation of our own: the compiler would unroll its loop, and make kernels for each part of a large head.
@custom_op("pocd::through_head", mutates_args=())
def _through_head(h: torch.Tensor, head: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z·t and ‖z‖² of z = W h, float64 [B], with only a part of W and z in memory at a time."""
    rows = max(1, HEAD_CHUNK // h.shape[-1])
    along = h.new_zeros(len(h), dtype=torch.float64)
    square = torch.zeros_like(along)
    for weight, aim in zip(head.split(rows), target.split(rows), strict=True):
        z = (h @ weight.float().T).double()
        along += (z * aim).sum(dim=-1)
        square += z.square().sum(dim=-1)
    return along, square


@_through_head.register_fake
def _(h: torch.Tensor, _head: torch.Tensor, _target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return h.new_empty(len(h), dtype=torch.float64), h.new_empty(len(h), dtype=torch.float64)


def measure_states(states: torch.Tensor, seeds: torch.Tensor, block: BlockTensors, *, scheme: Scheme) -> torch.Tensor:
    """Return distances float32 [B], or vectors [B, VECTOR_SIZE], from hidden states as `find_readout` takes them."""
    readout = find_readout(states, seeds, scheme, block.standard)
    if scheme.output == "vector":
        return find_vectors(readout, seeds)
    return find_distance(find_hidden(readout, seeds, scheme), seeds, block)
