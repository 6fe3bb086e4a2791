"""A module whose weights are float32 for a while."""

from __future__ import annotations

import torch
from torch import nn


class Widened:
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
