"""The generator of input embeddings as one kernel for GPUs, in Triton, which only torch's builds for GPUs bring along.

torch's compiler makes two kernels of `random.fill_normal`, with float32 copies of all numbers between them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

BLOCK = 1024  # pairs of numbers drawn by one program
TURN = tl.constexpr(2 * math.pi)
PART = tl.constexpr(2.0**-32)


@triton.jit
def _hash32(index: tl.tensor, seed: tl.tensor) -> tl.tensor:
    """Mix uint32 keys with a uint32 seed, as `random.hash32`."""
    k = index * 0xCC9E2D51
    k = ((k << 15) | (k >> 17)) * 0x1B873593
    h = seed ^ k
    h = ((h << 13) | (h >> 19)) * 5 + 0xE6546B64
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _draw_normal(  # noqa: PLR0917 - Triton's launches are called by position
    out: tl.tensor,
    seeds: tl.tensor,
    out_stride: int,
    seeds_stride: int,
    n: int,
    half: int,
    blocks: int,
    block: tl.constexpr,
) -> None:
    """Draw one block of pairs of one stream. Program p draws block p % blocks of stream p // blocks.

    Places in memory are 64-bit numbers, what is hashed 32-bit ones.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    pair = (tl.program_id(0) % blocks).to(tl.int64) * block + tl.arange(0, block)
    seed = tl.load(seeds + row * seeds_stride).to(tl.uint32, bitcast=True)
    first = _hash32(pair.to(tl.uint32), seed).to(tl.float32) * PART
    second = _hash32((half + pair).to(tl.uint32), seed).to(tl.float32) * PART
    radius = tl.sqrt_rn(tl.log(tl.maximum(first, 1e-10)) * -2.0)
    angle = second * TURN
    to = out + row * out_stride + pair
    cosine, sine = tl.cos(angle) * radius, tl.sin(angle) * radius
    tl.store(to, cosine.to(out.dtype.element_ty), mask=pair < half)
    tl.store(to + half, sine.to(out.dtype.element_ty), mask=half + pair < n)  # with odd n the last one is left out


def fill_normal(out: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Fill `out` with standard normal numbers, as `random.fill_normal` does, without other memory.

    Args:
        out: Floats of any precision [streams, n], each stream's side by side.
        seeds: int32 bits [streams].

    Returns:
        `out`.
    """
    assert out.stride(1) == 1, "a stream's numbers lie side by side"
    streams, n = out.shape
    half = (n + 1) // 2
    blocks = triton.cdiv(half, BLOCK)
    _draw_normal[(streams * blocks,)](out, seeds, out.stride(0), seeds.stride(0), n, half, blocks, BLOCK)
    return out
