"""Transforms of hidden states by the block hash and the nonce (docs/protocol.md sections 3 and 4)."""

from __future__ import annotations

import functools
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


def _join_normalised_and_reflected(
    branch: torch.Tensor, residual: torch.Tensor, v: torch.Tensor, *, weight: float = 1.0
) -> torch.Tensor:
    """Return the sum of the reflections of the halves' unit vectors, which is no function of branch + residual.

    A reflection is linear, so it is applied once, to the sum of the two unit vectors, of which the branch's is
    multiplied by `weight`.
    """
    wide, rest, v = branch.float(), residual.float(), v.float()
    total = rest / (torch.linalg.vector_norm(rest, dim=-1, keepdim=True) + 1e-8)
    total.addcdiv_(wide, torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + 1e-8, value=weight)
    return _reflect_in_place(total, v).to(branch.dtype)


@functools.cache  # one object for each number of layers, so that what is compiled for it is found again
def join_of(step: LayerStep, layers: int) -> Join:
    """Return how a layer's two halves become its output in a model of so many layers.

    The result takes branch and residual [..., H] and the layer's unit vector [H]. It computes in float32 and rounds to
    the model's dtype once: the square of a large float16 activation would overflow.
    """
    if step == "none":
        return _join
    if step == "reflect":
        return _join_reflected
    if step == "normalise and reflect":
        return _join_normalised_and_reflected
    # An error grows by a factor with each layer that is given its branch in full (docs/protocol.md section 3.2).
    return functools.partial(_join_normalised_and_reflected, weight=layers**-0.5)
