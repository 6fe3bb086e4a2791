"""Weights that are drawn anew for each block hash, in place, and restored bit for bit (docs/protocol.md section 4)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pocd.compute.random import fill_normal, seeds_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pocd.protocol.schemes import WeightSource

SCALE = 0.02


def _norm_weights(causal: nn.Module) -> set[int]:
    """Return the ids of the norms' gains, which are not drawn: parameter `weight` of modules called …Norm."""
    return {
        id(module.weight)
        for module in causal.modules()
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), torch.Tensor)
    }


def _draw(parameter: torch.Tensor, name: str, block_hash: str) -> None:
    """Overwrite a parameter with random numbers seeded by the block hash and the parameter's name, row by row."""
    seeds = seeds_tensor([f"{block_hash}_{name}"], parameter.device)
    fill_normal(parameter.view(1, -1), seeds, scale=SCALE)


@contextmanager
def _trained(_causal: nn.Module, _block_hash: str) -> Iterator[None]:
    yield


@contextmanager
def _drawn(causal: nn.Module, block_hash: str) -> Iterator[None]:
    """Draw every parameter; norm weights are 1. The trained values are kept in the host's memory."""
    gains = _norm_weights(causal)
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name, weight in causal.named_parameters():
            saved.append((weight, weight.to("cpu", copy=True)))
            if id(weight) in gains:
                weight.fill_(1)
            else:
                _draw(weight, name, block_hash)
        yield
    finally:
        for parameter, values in saved:
            parameter.copy_(values)


@contextmanager
def _embedding_drawn(causal: Any, block_hash: str) -> Iterator[None]:  # noqa: ANN401 - transformers gives its classes no common type
    """Draw the input embedding. An output matrix tied to it is untied and stays trained while they differ."""
    embedding = causal.get_input_embeddings().weight
    name = next(name for name, parameter in causal.named_parameters() if parameter is embedding)
    output = causal.get_output_embeddings()
    trained = embedding.clone()
    tied = output is not None and output.weight is embedding
    try:
        if tied:
            output.weight = nn.Parameter(trained, requires_grad=False)
        _draw(embedding, name, block_hash)
        yield
    finally:
        embedding.copy_(trained)
        if tied:
            output.weight = embedding


WEIGHTS: dict[WeightSource, Callable[[Any, str], AbstractContextManager[None]]] = {
    "trained": _trained,
    "drawn": _drawn,
    "embedding drawn": _embedding_drawn,
}


@contextmanager
def drawn_weights(causal: nn.Module, weights: WeightSource, block_hash: str) -> Iterator[None]:
    """Give `causal` the weights of a scheme while the context lasts; afterwards its own are restored bit for bit.

    A drawn parameter holds 0.02 times the normal numbers of "{block_hash}_{name}", rounded to its
    precision; `name` as in `named_parameters()`, where a tied output matrix has none of its own.
    """
    with WEIGHTS[weights](causal, block_hash):
        yield
