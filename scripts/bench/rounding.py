"""Honest products of matrices that round at other places than the library's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import linear

if TYPE_CHECKING:
    import torch


def rounded_once(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply in float32 arithmetic, and round the result."""
    return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def in_halves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply in two halves, each rounded before they are added."""
    half = x.shape[-1] // 2
    return linear(x[..., :half], weight[:, :half], bias) + linear(x[..., half:], weight[:, half:])
