"""Any decoder in float32 arithmetic on the weights as they are, without a second model in memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocd.compute.widened import Widened

if TYPE_CHECKING:
    import torch

    from pocd.compute.layers import LayerDecoder
    from pocd.compute.transforms import Join


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
                wide = Widened(module)
                hooks.callback(wide.narrow)  # where it fails between
                hooks.enter_context(module.register_forward_pre_hook(wide.widen))
                hooks.enter_context(module.register_forward_hook(wide.narrow))
            return self.by_layers(embeddings.float(), join, vectors.float(), all_positions=all_positions)
