"""The reference of a computation, float32 arithmetic on the same rounded weights, and how far a host is from it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from pocd.protocol.conditioning import Conditioning, flipped_share
from pocd.protocol.names import default_tolerance

if TYPE_CHECKING:
    from pocd.compute.engine import BlockRun
    from pocd.compute.layers import LayerDecoder
    from pocd.compute.transforms import Join

NONCES = 16  # that are measured


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
                    wide = own.detach().float()
                    is_weight = isinstance(own, nn.Parameter)
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


def reference_of(run: BlockRun) -> BlockRun:
    """Return the run that computes the same in float32 arithmetic, from the same rounded weights and inputs.

    Means and deviations of a block's samples (`poc3`) remain those of `run`.
    """
    return replace(run, model=replace(run.model, decoder=WideDecoder(run.model.by_layers), program=None))


def measure_conditioning(run: BlockRun, *, batch_size: int) -> Conditioning:
    """Compare the results of a few nonces with the reference's.

    Args:
        run: The model, prepared for any block.
        batch_size: Nonces per forward pass.

    Raises:
        OutOfMemoryError: A batch of this size does not fit.
        NonFiniteError: The model gave NaN or infinity.
    """
    own = run.values(range(NONCES), batch_size=batch_size)
    reference = reference_of(run).values(range(NONCES), batch_size=batch_size)
    difference = float((own - reference).square().mean().sqrt())
    if run.scheme.output == "vector":
        return Conditioning(difference / float(reference.square().mean().sqrt()), None)
    scatter = float(reference.std())
    dtype = str(run.model.dtype).removeprefix("torch.")
    tolerance = default_tolerance(dtype, run.scheme, run.model.hidden_size)
    return Conditioning(difference / scatter, flipped_share(difference / scatter, tolerance / scatter))
