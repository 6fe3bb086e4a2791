"""From seeds to distances or vectors: pure functions of tensors, run as they are, compiled, or captured.

A batch of B nonces is one table of seeds, int32 bits [B, K]; its rows are those of `nonce_seeds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.library import custom_op

from pocd.compute.random import fill_normal, hash32, keys, normal, seed32, seeds256, signs, unit_normal
from pocd.compute.segments import factors, signed_sum
from pocd.compute.transforms import reflect_in_order
from pocd.protocol.schemes import VECTOR_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pocd.compute.segments import Standard
    from pocd.protocol.schemes import Scheme

    Fill = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

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
    """Return the ends of a nonce's seed texts but for its inputs': reflections, signs, target, projection or pick."""
    texts = [f"nonce_{nonce}_hidden_r{r}" for r in range(scheme.reflections)]
    if scheme.reads_all:
        texts.append(f"nonce_{nonce}_signs")
    if scheme.head == "none":
        texts.append(f"nonce_{nonce}_target")
    if scheme.head == "projection":
        texts.append(f"nonce_{nonce}_projection")
    if scheme.head == "pick":
        texts.append(f"nonce_{nonce}_pick_{VECTOR_SIZE}")
        texts += [f"nonce_{nonce}_haar_hh_{VECTOR_SIZE}_{j}" for j in range(VECTOR_SIZE - 1)]
    return texts


def nonce_seeds(scheme: Scheme, owner: str, nonce: int) -> list[int]:
    """Return a nonce's row of the table of seeds: those of its inputs, and those of `seed_texts`, in [0, 2**32).

    Args:
        scheme: The scheme.
        owner: Block hash and public key, joined by an underscore.
        nonce: The nonce.
    """
    inputs = seeds256(f"{owner}_nonce{nonce}")[: scheme.input_seeds]
    return [*inputs, *(seed32(f"{owner}_{text}") for text in seed_texts(scheme, nonce))]


def fill_inputs(inputs: torch.Tensor, seeds: torch.Tensor, scheme: Scheme, fill: Fill = fill_normal) -> torch.Tensor:
    """Overwrite input embeddings [B, S, H] with random ones.

    With eight seeds each draws its own ⌈S·H/8⌉ numbers, of which the last may be fewer.

    Args:
        inputs: The tensor to fill, in any precision.
        seeds: The table of seeds.
        scheme: The scheme.
        fill: Fills rows with normal numbers by a seed each.

    Returns:
        `inputs`.
    """
    flat = inputs.view(len(inputs), -1)
    width = -(-flat.shape[1] // scheme.input_seeds)
    for column, part in enumerate(flat.split(width, dim=1)):
        fill(part, seeds[:, column])
    return inputs


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
    return signs(seeds[:, scheme.input_seeds + scheme.reflections], states.shape[1])


def project(readout: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Return the vectors P·x, float32 [B, VECTOR_SIZE], of readouts x [B, H]; P is each nonce's own."""
    size = readout.shape[-1]
    projections = normal(seeds[:, -1], VECTOR_SIZE * size).view(len(seeds), VECTOR_SIZE, size)
    # Not as a product with a vector: its rounding may depend on the place in the batch.
    return (projections * readout.unsqueeze(1)).sum(dim=-1)


def pick(h: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Return picked coordinates of h [B, H], rotated and scaled to unit length, float32 [B, VECTOR_SIZE].

    Each nonce picks the coordinates whose hashes are smallest. Their order decides what the rotation mixes; it is that
    of the live network's GPUs: ascending, but for the one with the largest of these hashes, which comes last.
    """
    picked = seeds[:, -VECTOR_SIZE]
    hashes = hash32(keys(0, h.shape[-1], picked), picked.unsqueeze(-1))
    scores = hashes.bitwise_xor_(-(2**31))  # so that signed numbers have the unsigned order
    smallest = scores.topk(VECTOR_SIZE, largest=False, sorted=True).indices
    order = torch.cat([smallest[:, :-1].sort().values, smallest[:, -1:]], dim=1)
    rotations = unit_normal(seeds[:, 1 - VECTOR_SIZE :], VECTOR_SIZE)
    x = reflect_in_order(h.gather(1, order), rotations)
    unit: torch.Tensor = x / (x.norm(dim=-1, keepdim=True) + 1e-8)
    return unit


def draw_targets(seeds: torch.Tensor, dimension: int) -> torch.Tensor:
    """Draw the targets of single nonces, where there is no head: unit vectors, float64 [B, D]."""
    return unit_normal(seeds[:, -1], dimension).double()


def find_hidden(readout: torch.Tensor, seeds: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return the head's input, or without a head the vector compared with the target, float32 [B, H]."""
    h, first, count = readout.float(), scheme.input_seeds, scheme.reflections
    if count:
        h = reflect_in_order(h, unit_normal(seeds[:, first : first + count], h.shape[-1]))
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
    for z, aim in zip(_outputs(h, head, rows), target.split(rows), strict=True):
        along += (z * aim).sum(dim=-1)
        square += z.square().sum(dim=-1)
    return along, square


@_through_head.register_fake
def _(h: torch.Tensor, _head: torch.Tensor, _target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return h.new_empty(len(h), dtype=torch.float64), h.new_empty(len(h), dtype=torch.float64)


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
    if scheme.head == "projection":
        return project(readout, seeds)
    hidden = find_hidden(readout, seeds, scheme)
    return pick(hidden, seeds) if scheme.head == "pick" else find_distance(hidden, seeds, block)


def find_differences(
    states: torch.Tensor, exact: torch.Tensor, seeds: torch.Tensor, block: BlockTensors, *, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the results by hidden states and by exact ones, and the expected squared error of a number of the former.

    A projected number is the product of the readout and normal numbers of variance 1, so an error e of the readout
    makes an error of variance ‖e‖² of it. A distance d is that of a unit vector to a unit vector in a random direction
    of D dimensions, so an error e of the former makes one of variance ‖e‖²/(D·d²). Of k picked coordinates of a unit
    vector, scaled to unit length, e is as large a share as of the whole, less what lies along them: (k − 1)/k.

    Returns:
        Results by `states`, float32 [B] or [B, VECTOR_SIZE]; results by `exact`; expected squared error, float64 [B].
    """
    one, other = (find_readout(each, seeds, scheme, block.standard) for each in (states, exact))
    if scheme.head == "projection":
        errors = (one - other).double().square().sum(dim=-1)
        return project(one, seeds), project(other, seeds), errors
    one, other = (find_hidden(each, seeds, scheme) for each in (one, other))
    separation = find_separation(one, other, block.head)
    if scheme.head == "pick":
        return pick(one, seeds), pick(other, seeds), separation * (VECTOR_SIZE - 1) / VECTOR_SIZE**2
    own, reference = (find_distance(each, seeds, block) for each in (one, other))
    dimension = one.shape[-1] if block.head is None else len(block.head)
    return own, reference, separation / (dimension * reference.double().square())
