"""Any decoder in float32 arithmetic on the weights as they are, without a second model in memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from pocd.compute.layers import LayerDecoder
    from pocd.compute.transforms import Join


class _Wide:
    """Gives a module float32 copies of its weights and buffers for the time in which it runs."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own: list[tuple[nn.Module, str, torch.Tensor]] = []

    def widen(self, *_: object) -> None:
        """Put copies in the place of the module's own (a hook)."""
        for part in self._module.modules():
            for name, own in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                if own.is_floating_point() and own.dtype != torch.float32:
                    is_weight = isinstance(own, nn.Parameter)
                    # A share of a split model's matrix cannot become a parameter as a tensor of inference.
                    with torch.inference_mode(mode=False), torch.no_grad():
                        wide = own.to(torch.float32)
                        setattr(part, name, nn.Parameter(wide, requires_grad=False) if is_weight else wide)
                    self._own.append((part, name, own))

    def narrow(self, *_: object) -> None:
        """Put the module's own back (a hook)."""
        while self._own:
            part, name, own = self._own.pop()
            setattr(part, name, own)


@dataclass(frozen=True, slots=True)
class WideDecoder:
    """A decoder in float32 arithmetic on its weights as they are: one layer's at a time are copied to float32.

    Attributes:
        by_layers: The decoder in the model's own dtype.
    """

    by_layers: LayerDecoder
    kind = "float32"

    def __call__(
        self, embeddings: torch.Tensor, join: Join, vectors: torch.Tensor, *, all_positions: bool = False
    ) -> torch.Tensor:
        """Return hidden states in float32 from embeddings and vectors in the model's dtype; see `LayerDecoder`."""
        with ExitStack() as hooks:
            for module in (*self.by_layers.layers, self.by_layers.norm):
                wide = _Wide(module)
                hooks.callback(wide.narrow)  # where it fails between
                hooks.enter_context(module.register_forward_pre_hook(wide.widen))
                hooks.enter_context(module.register_forward_hook(wide.narrow))
            return self.by_layers(embeddings.float(), join, vectors.float(), all_positions=all_positions)
