"""Deterministic random numbers, the same on every device (docs/protocol.md section 2).

All integers are 32-bit. They are held in int32 tensors, whose multiplication wraps modulo 2**32
as the protocol wants it; a float is made from them only at the end. Many streams are drawn at once,
in chunks: besides its result, a drawing needs the memory of five chunks (`CHUNK`), whatever its size.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import TYPE_CHECKING

import torch
from torch.library import custom_op

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# Pairs of numbers drawn in one go. On the CPU a chunk and its temporaries stay near the cache (2.5 MiB);
# on a GPU few launches count (320 MiB).
CHUNK = {"cpu": 2**17, "cuda": 2**24}


def seed32(text: str) -> int:
    """Return the first four bytes of SHA-256 of `text` in UTF-8, big-endian, in [0, 2**32)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def seeds256(text: str) -> tuple[int, ...]:
    """Return the eight 32-bit words of SHA-256 of `text` in UTF-8, big-endian; the first is `seed32`."""
    return struct.unpack(">8I", hashlib.sha256(text.encode()).digest())


def _signed(value: int) -> int:
    """Return the int32 that has the bits of the unsigned `value`."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int32 right, filling with zeros (torch's own shift copies the sign)."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x << bits).bitwise_or_(_shift_right(x, 32 - bits))


def seeds_tensor(texts: Sequence[str], device: torch.device | str = "cpu") -> torch.Tensor:
    """Return `seed32` of each text as the bits of an int32 tensor [len(texts)]."""
    return to_device(int32_bits(map(seed32, texts)), device)


def int32_bits(values: Iterable[int]) -> torch.Tensor:
    """Return numbers in [0, 2**32) as the bits of an int32 tensor, on the host."""
    return torch.tensor([_signed(value) for value in values], dtype=torch.int32)


def to_device(seeds: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move seeds from the host to a device, on a GPU without waiting for what it was given before."""
    if torch.device(device).type == "cpu":
        return seeds
    return seeds.pin_memory().to(device, non_blocking=True)


def hash32(index: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Mix 32-bit keys with 32-bit seeds: murmur3 without its length step.

    Args:
        index: Keys, int32 bits, any shape.
        seed: Seeds, int32 bits, broadcast against `index`.

    Returns:
        Hashes as int32 bits, in the broadcast shape.
    """
    k = _rotate_left(index * _signed(0xCC9E2D51), 15).mul_(0x1B873593)
    h = _rotate_left(seed ^ k, 13).mul_(5).add_(_signed(0xE6546B64))
    h.bitwise_xor_(_shift_right(h, 16)).mul_(_signed(0x85EBCA6B))
    h.bitwise_xor_(_shift_right(h, 13)).mul_(_signed(0xC2B2AE35))
    return h.bitwise_xor_(_shift_right(h, 16))


@custom_op("pocd::positions", mutates_args=())
def _positions(start: int, n: int, like: torch.Tensor) -> torch.Tensor:
    """Return start, start + 1, … (`n` of them), int32, on the device of `like`; the compiler does not look inside."""
    return torch.arange(start, start + n, dtype=torch.int32, device=like.device)


@_positions.register_fake
def _(_start: int, n: int, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(n, dtype=torch.int32)


def keys(start: int, n: int, seeds: torch.Tensor) -> torch.Tensor:
    """Return the keys start, start + 1, … that are hashed, `n` of them, int32, on the device of `seeds`.

    Nothing else is to be hashed: these the compiler for GPUs does not know.
    """
    if torch.compiler.is_compiling() and seeds.device.type == "cuda":
        # Known to the compiler, their products with the hash's constants become constants of 64 bits, which Triton
        # refuses, or numbers of 64 bits, which do not wrap.
        found: torch.Tensor = _positions(start, n, seeds)
        return found
    return torch.arange(start, start + n, dtype=torch.int32, device=seeds.device)


def uniform(seeds: torch.Tensor, n: int, *, start: int = 0) -> torch.Tensor:
    """Draw `n` uniform numbers in [0, 1] of each stream; rounding to float32 can give exactly 1.

    Args:
        seeds: int32 bits [...], one stream each.
        n: Numbers per stream.
        start: How many numbers of each stream to leave out; start + n is at most 2**31.

    Returns:
        float32 [..., n].
    """
    bits = hash32(keys(start, n, seeds), seeds.unsqueeze(-1))
    return bits.view(torch.uint32).to(torch.float32).mul_(2.0**-32)  # a power of two: exact


def _chunks(rows: int, columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut [rows, columns] into pieces of at most `size` elements, whole rows where they fit."""
    width = min(columns, size)
    height = max(1, size // width)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield slice(row, min(row + height, rows)), slice(column, min(column + width, columns))


def fill_normal(out: torch.Tensor, seeds: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Fill `out` with standard normal numbers times `scale`, by Box and Muller's transform.

    The first half of a stream's uniforms gives radii, the second half angles; cosines come before
    sines. The values depend on n.

    Args:
        out: Floats of any precision [streams, n]; what is drawn in float32 is rounded once.
        seeds: int32 bits [streams].
        scale: A factor, applied in float32.

    Returns:
        `out`.
    """
    n = out.shape[-1]
    half = (n + 1) // 2
    # Compiled, each chunk would be another kernel, and few numbers are drawn there (see `kernels` for the many).
    size = max(out.numel(), 1) if torch.compiler.is_compiling() else CHUNK[out.device.type]
    for rows, columns in _chunks(len(out), half, size):
        stream, width = seeds[rows], columns.stop - columns.start
        radius = uniform(stream, width, start=columns.start).clamp_min_(1e-10).log_().mul_(-2).sqrt_()
        angle = uniform(stream, width, start=half + columns.start).mul_(2 * math.pi)
        sine = angle.sin().mul_(radius)
        cosine = angle.cos_().mul_(radius)
        if scale != 1:
            sine.mul_(scale)
            cosine.mul_(scale)
        out[rows, columns] = cosine
        last = min(half + columns.stop, n)  # with odd n the last sine is left out
        out[rows, half + columns.start : last] = sine[:, : last - half - columns.start]
    return out


def normal(seeds: torch.Tensor, n: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw standard normal numbers, see `fill_normal`.

    Args:
        seeds: int32 bits [...], one stream each.
        n: Numbers per stream.
        dtype: Drawn in float32, rounded to this.

    Returns:
        [..., n].
    """
    out = torch.empty(seeds.numel(), n, dtype=dtype, device=seeds.device)
    return fill_normal(out, seeds.reshape(-1)).view(*seeds.shape, n)


def signs(seeds: torch.Tensor, n: int) -> torch.Tensor:
    """Draw `n` signs of each stream, float32 [..., n]: 1 where the hash's highest bit is 0, else −1."""
    return 1 - 2 * hash32(keys(0, n, seeds), seeds.unsqueeze(-1)).lt(0).float()


def unit_normal(seeds: torch.Tensor, n: int) -> torch.Tensor:
    """Draw uniformly random unit vectors: `normal` divided by its length, float32 [..., n]."""
    x = normal(seeds, n)
    return x.div_(x.norm(dim=-1, keepdim=True))
