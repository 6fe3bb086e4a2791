"""From seeds to distances or vectors: pure functions of tensors, run as they are, compiled, or captured.

A batch of B nonces is one table of seeds, int32 bits [B, K]; its columns are those of `seed_texts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pocd.compute.random import normal, signs, unit_normal
from pocd.compute.segments import factors, signed_sum
from pocd.compute.transforms import reflect_in_order
from pocd.protocol.schemes import VECTOR_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def _through_head(h: torch.Tensor, head: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z·t and ‖z‖² of z = W h, float64 [B], with only a part of W and z in memory at a time."""
    rows = max(1, HEAD_CHUNK // h.shape[-1])
    along = h.new_zeros(len(h), dtype=torch.float64)
    square = torch.zeros_like(along)
    for z, aim in zip(_outputs(h, head, rows), target.split(rows), strict=True):
        along += (z * aim).sum(dim=-1)
        square += z.square().sum(dim=-1)
    return along, square


def _outputs(h: torch.Tensor, head: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
    """Yield z = W h in parts of so many rows of W, float64 [B, rows]."""
    return ((h @ weight.float().T).double() for weight in head.split(rows))


def find_separation(one: torch.Tensor, other: torch.Tensor, head: torch.Tensor | None) -> torch.Tensor:
    """Return ‖z/‖z‖ − z'/‖z'‖‖² of z = W h and z' = W h', or of z = h without a head, float64 [B]."""
    if head is None:
        pairs = iter([(one.double(), other.double())])
    else:
        rows = max(1, HEAD_CHUNK // one.shape[-1])
        pairs = zip(_outputs(one, head, rows), _outputs(other, head, rows), strict=True)
    along, square, other_square = (one.new_zeros(len(one), dtype=torch.float64) for _ in range(3))
    for z, z_other in pairs:
        along += (z * z_other).sum(dim=-1)
        square += z.square().sum(dim=-1)
        other_square += z_other.square().sum(dim=-1)
    return (2 - 2 * along / (square * other_square).sqrt()).clamp_min(0)


def measure_states(states: torch.Tensor, seeds: torch.Tensor, block: BlockTensors, *, scheme: Scheme) -> torch.Tensor:
    """Return distances float32 [B], or vectors [B, VECTOR_SIZE], from hidden states as `find_readout` takes them."""
    readout = find_readout(states, seeds, scheme, block.standard)
    if scheme.output == "vector":
        return find_vectors(readout, seeds)
    return find_distance(find_hidden(readout, seeds, scheme), seeds, block)


def find_differences(
    states: torch.Tensor, exact: torch.Tensor, seeds: torch.Tensor, block: BlockTensors, *, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the results by hidden states and by exact ones, and the expected squared error of a number of the former.

    A vector's number is a projection of the readout by normal numbers of variance 1, so an error e of the readout makes
    an error of variance ‖e‖² of it. A distance d is that of a unit vector to a unit vector in a random direction of D
    dimensions, so an error e of the former makes one of variance ‖e‖²/(D·d²).

    Returns:
        Results by `states`, float32 [B] or [B, VECTOR_SIZE]; results by `exact`; expected squared error, float64 [B].
    """
    one, other = (find_readout(each, seeds, scheme, block.standard) for each in (states, exact))
    if scheme.output == "vector":
        errors = (one - other).double().square().sum(dim=-1)
        return find_vectors(one, seeds), find_vectors(other, seeds), errors
    one, other = (find_hidden(each, seeds, scheme) for each in (one, other))
    own, reference = (find_distance(each, seeds, block) for each in (one, other))
    dimension = one.shape[-1] if block.head is None else len(block.head)
    separation = find_separation(one, other, block.head)
    return own, reference, separation / (dimension * reference.double().square())
