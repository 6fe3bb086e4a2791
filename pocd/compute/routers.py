"""Routers of mixtures: what chooses the experts of a position, in float32, and how near each choice was to another."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pocd.compute.widened import Widened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Observe = Callable[[torch.Tensor], None]

ROUTERS = ("gate", "router")  # what a mixture's router is called beside its `experts`


def choose(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest scores of each row and their places, largest first; of equal ones the lower place counts.

    torch.topk leaves open which of equal ones it takes.
    """
    ordered, places = scores.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :count], places[..., :count]


def routers_of(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the routers of layers' mixtures whose experts transformers lets others compute."""
    return [
        router
        for layer in layers
        for block in layer.modules()
        if hasattr(getattr(block, "experts", None), "has_gate")
        for router in (getattr(block, name, None) for name in ROUTERS)
        if isinstance(router, nn.Module)
    ]


def _gaps(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return by how much the last of the `count` chosen scores of each row is above the best of those that are left."""
    ordered = scores.sort(dim=-1, descending=True).values
    return ordered[:, count - 1] - ordered[:, count]


class _Choosing(TorchFunctionMode):
    """Has torch.topk choose as `choose` does, and tells of each choice among a row's scores."""

    def __init__(self, observe: Observe | None) -> None:
        super().__init__()
        self._observe = observe

    def __torch_function__(
        self,
        function: Any,  # noqa: ANN401 - as below
        _types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - any function of torch
        if function not in (torch.topk, torch.Tensor.topk):
            return function(*args, **(kwargs or {}))
        return self._choose(*args, **(kwargs or {}))

    def _choose(self, input: torch.Tensor, k: int, dim: int = -1, **_: bool) -> Any:  # noqa: A002, ANN401 - torch's names
        assert dim in (-1, input.dim() - 1), "routers choose among a row's scores"
        values, places = choose(input, k)
        if self._observe is not None and input.dim() == 2 and k < input.shape[-1]:  # more: scores of groups
            self._observe(_gaps(input, k))
        return torch.return_types.topk((values, places))


def _routed(router: nn.Module, forward: Callable[..., Any], observe: Observe | None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the family's router has it
    with ExitStack() as stack:
        wide = Widened(router)
        stack.callback(wide.narrow)
        wide.widen()
        stack.enter_context(_Choosing(observe))
        return forward(*map(_wide, args), **{key: _wide(value) for key, value in kwargs.items()})


def _wide(value: Any) -> Any:  # noqa: ANN401 - as above
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_number else value


@contextmanager
def even_routers(layers: Sequence[nn.Module], observe: Observe | None = None) -> Iterator[None]:
    """Have layers' routers compute in float32 meanwhile, and prefer the lower number of two experts with equal scores.

    Args:
        layers: Layers of a decoder.
        observe: Called at each choice with the gap between the last chosen score and the best one left [positions].
    """
    with ExitStack() as stack:
        for router in routers_of(layers):
            stack.callback(setattr, router, "forward", router.forward)
            router.forward = partial(_routed, router, router.forward, observe)
        yield
