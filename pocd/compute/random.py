"""Deterministic random numbers, the same on every device (docs/protocol.md section 2).

All integers are 32-bit. They are held in int32 tensors, whose multiplication wraps modulo 2**32
as the protocol wants it; a float is made from them only at the end.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def seed32(text: str) -> int:
    """Return the first four bytes of SHA-256 of `text` in UTF-8, big-endian, in [0, 2**32)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _signed(value: int) -> int:
    """Return the int32 that has the bits of the unsigned `value`."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int32 right, filling with zeros (torch's own shift copies the sign)."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x << bits) | _shift_right(x, 32 - bits)


def seeds_tensor(texts: Sequence[str], device: torch.device | str = "cpu") -> torch.Tensor:
    """Return `seed32` of each text as the bits of an int32 tensor [len(texts)]."""
    return torch.tensor([_signed(seed32(text)) for text in texts], dtype=torch.int32).to(device)


def hash32(index: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Mix 32-bit keys with 32-bit seeds: murmur3 without its length step.

    Args:
        index: Keys, int32 bits, any shape.
        seed: Seeds, int32 bits, broadcast against `index`.

    Returns:
        Hashes as int32 bits, in the broadcast shape.
    """
    k = _rotate_left(index * _signed(0xCC9E2D51), 15) * 0x1B873593
    h = _rotate_left(seed ^ k, 13) * 5 + _signed(0xE6546B64)
    h = (h ^ _shift_right(h, 16)) * _signed(0x85EBCA6B)
    h = (h ^ _shift_right(h, 13)) * _signed(0xC2B2AE35)
    return h ^ _shift_right(h, 16)


def uniform(seeds: torch.Tensor, n: int) -> torch.Tensor:
    """Draw uniform numbers in [0, 1]; rounding to float32 can give exactly 1.

    Args:
        seeds: int32 bits [...], one stream each.
        n: Numbers per stream, at most 2**31.

    Returns:
        float32 [..., n].
    """
    index = torch.arange(n, dtype=torch.int32, device=seeds.device)
    bits = hash32(index, seeds.unsqueeze(-1))
    return bits.view(torch.uint32).to(torch.float32) * 2.0**-32  # a power of two: exact


def normal(seeds: torch.Tensor, n: int) -> torch.Tensor:
    """Draw standard normal numbers by Box and Muller's transform.

    The first half of the uniforms gives radii, the second half angles; cosines come before sines.
    The values depend on `n`.

    Args:
        seeds: int32 bits [...], one stream each.
        n: Numbers per stream.

    Returns:
        float32 [..., n].
    """
    half = (n + 1) // 2
    u = uniform(seeds, 2 * half)
    radius = u[..., :half].clamp_min_(1e-10).log_().mul_(-2).sqrt_()
    angle = u[..., half:].mul_(2 * math.pi)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1)[..., :n]


def unit_normal(seeds: torch.Tensor, n: int) -> torch.Tensor:
    """Draw uniformly random unit vectors: `normal` divided by its length, float32 [..., n]."""
    x = normal(seeds, n)
    unit: torch.Tensor = x / x.norm(dim=-1, keepdim=True)
    return unit
