"""What the block hash does to a model's hidden states (docs/protocol.md section 3)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from pocd.compute.model import Model


def reflect(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Reflect x [..., H] at the hyperplane across the unit vector v [..., H] (Householder)."""
    return x - 2 * (x * v).sum(dim=-1, keepdim=True) * v


def normalise_and_reflect(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scale x [..., H] to unit length, then reflect it at v [H]; the result has x's dtype.

    It is computed in float32: the square of a large float16 activation would overflow.
    """
    wide = x.float()
    unit = wide / (wide.norm(dim=-1, keepdim=True) + 1e-8)
    return reflect(unit, v.float()).to(x.dtype)


def reflect_in_order(h: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Reflect h [B, H] at vectors [B, R, H], r = 0 first."""
    for r in range(vectors.shape[1]):
        h = reflect(h, vectors[:, r])
    return h


class _LayerTransform:
    """Hooks on one decoder layer: catches branch and residual at its edges, then transforms both."""

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector
        self.branch: torch.Tensor | None = None
        self.residual: torch.Tensor | None = None

    def catch_residual(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        (self.residual,) = args

    def catch_branch(self, _module: nn.Module, _args: object, output: torch.Tensor) -> None:
        self.branch = output

    def replace_output(self, _module: nn.Module, _args: object, _output: Any) -> torch.Tensor:  # noqa: ANN401 - a hook sees whatever a layer returns
        assert self.branch is not None, "the layer ran without its MLP"
        assert self.residual is not None, "the layer ran without its post-attention norm"
        transformed = normalise_and_reflect(self.branch, self.vector) + normalise_and_reflect(
            self.residual, self.vector
        )
        self.branch = self.residual = None
        return transformed


@contextmanager
def layer_transforms(model: Model, vectors: torch.Tensor) -> Iterator[None]:
    """Transform branch and residual of every decoder layer of `model` while the context lasts.

    Args:
        model: The model; afterwards it is bare again, whatever happened inside.
        vectors: One unit vector per layer [layers, H], in the model's dtype.
    """
    assert len(vectors) == len(model.layers), "one vector per layer"
    hooks = []
    try:
        for layer, vector in zip(model.layers, vectors, strict=True):
            transform = _LayerTransform(vector)
            hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(transform.catch_residual))
            hooks.append(layer.mlp.register_forward_hook(transform.catch_branch))
            hooks.append(layer.register_forward_hook(transform.replace_output))
        yield
    finally:
        for hook in hooks:
            hook.remove()
