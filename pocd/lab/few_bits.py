"""Values of few bits, as hardware that computes with them has them; a row of a matrix has a scale of its own."""

from __future__ import annotations

import torch

GROUP = 64  # weights that share a scale, in NF4
LARGEST_FP8 = 448.0  # of float8_e4m3fn
# The 16 values of NF4 (Dettmers et al. 2023): quantiles of a normal distribution.
NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)


def to_bits(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Round each row to whole multiples of its largest element / (2^(bits−1) − 1)."""
    largest = values.abs().amax(dim=-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny)
    step = largest / (2 ** (bits - 1) - 1)
    rounded: torch.Tensor = (values.float() / step).round() * step
    return rounded.to(values.dtype)


def to_fp8(values: torch.Tensor) -> torch.Tensor:
    """Round each row to FP8 (four bits of exponent, three of mantissa), scaled to its range."""
    scale = values.abs().amax(dim=-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_FP8
    rounded: torch.Tensor = (values.float() / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.to(values.dtype)


def to_nf4(values: torch.Tensor) -> torch.Tensor:
    """Round each group of up to `GROUP` weights to the values of NF4, scaled to its largest."""
    size = GROUP if values.shape[-1] % GROUP == 0 else values.shape[-1]
    groups = values.float().unflatten(-1, (-1, size))
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    levels = torch.tensor(NF4, device=values.device)
    nearest = torch.bucketize(groups / scale, (levels[1:] + levels[:-1]) / 2)
    rounded: torch.Tensor = levels[nearest] * scale
    return rounded.flatten(-2).to(values.dtype)


def two_of_four(values: torch.Tensor) -> torch.Tensor:
    """Keep the two largest of each four weights."""
    if values.shape[-1] % 4:
        return values
    fours = values.unflatten(-1, (-1, 4))
    kept = torch.zeros_like(fours).scatter_(-1, fours.abs().topk(2, dim=-1).indices, 1)
    sparse: torch.Tensor = fours * kept
    return sparse.flatten(-2)
