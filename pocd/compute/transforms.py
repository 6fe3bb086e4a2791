"""Transforms of hidden states by the block hash and the nonce (docs/protocol.md sections 3 and 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from pocd.protocol.schemes import LayerStep

    Join = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def reflect(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Reflect x [..., H] at the hyperplane across the unit vector v [..., H] (Householder)."""
    return x - 2 * (x * v).sum(dim=-1, keepdim=True) * v


def reflect_in_order(h: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Reflect h [B, H] at vectors [B, R, H], r = 0 first."""
    for r in range(vectors.shape[1]):
        h = reflect(h, vectors[:, r])
    return h


def _reflect_in_place(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Reflect many x [..., H] at one v [H].

    Not by x @ v: the CPU rounds the last few rows of a product with a vector in another way.
    """
    return x.addcmul_((x * v).sum(dim=-1, keepdim=True), v, value=-2)


def _join(branch: torch.Tensor, residual: torch.Tensor, _v: torch.Tensor) -> torch.Tensor:
    """Return the sum of both halves, as the bare layer computes it."""
    return branch + residual


def _join_reflected(branch: torch.Tensor, residual: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the sum of the halves' reflections, which is the reflection of their sum."""
    total, v = branch.float() + residual, v.float()
    return _reflect_in_place(total, v).to(branch.dtype)


def _join_normalised_and_reflected(branch: torch.Tensor, residual: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the sum of the reflections of the halves' unit vectors, which is no function of branch + residual.

    A reflection is linear, so it is applied once, to the sum of the two unit vectors.
    """
    wide, rest, v = branch.float(), residual.float(), v.float()
    total = wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + 1e-8)
    total.addcdiv_(rest, torch.linalg.vector_norm(rest, dim=-1, keepdim=True) + 1e-8)
    return _reflect_in_place(total, v).to(branch.dtype)


# How a layer's two halves, branch and residual [..., H], become its output, given the layer's unit
# vector [H]. Computed in float32 and rounded to the model's dtype once: the square of a large
# float16 activation would overflow.
JOIN: dict[LayerStep, Join] = {
    "none": _join,
    "reflect": _join_reflected,
    "normalise and reflect": _join_normalised_and_reflected,
}
