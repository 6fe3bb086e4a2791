"""The registry of schemes: how a distance is composed (docs/protocol.md sections 3 and 4).

A scheme is a composition of five choices. Each choice is named here and made in one place:
`weights` in `weights.py`, `layer_step` in `transforms.py`, the others in `engine.py`. Plain data
without torch, so that the daemon can check a scheme's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weights = Literal["trained", "drawn", "embedding drawn"]
LayerStep = Literal["none", "reflect", "normalise and reflect"]
Head = Literal["trained", "embedding", "random"]

RANDOM_HEAD_DIM = 8192  # D of a random head


@dataclass(frozen=True, slots=True)
class Scheme:
    """A composition that the engine runs.

    Attributes:
        name: As configured and as written into batches.
        weights: The model's own; or all of them, or the input embedding, drawn anew per block hash.
        layer_step: What happens to branch and residual after every decoder layer.
        reflections: Householder reflections per nonce, of the final hidden state.
        normalise: Whether the hidden state is scaled to unit length before the head.
        head: The model's output matrix; its input embedding; or one drawn per block hash.
    """

    name: str
    weights: Weights
    layer_step: LayerStep
    reflections: int
    normalise: bool
    head: Head


_ROWS: tuple[tuple[str, Weights, LayerStep, int, bool, Head], ...] = (
    # name, weights, after each layer, per nonce, normalise before the head, head
    ("trained", "trained", "reflect", 8, False, "trained"),
    ("random-weights", "drawn", "none", 8, False, "trained"),  # its head is drawn with the rest
    ("random-embed", "embedding drawn", "reflect", 8, False, "embedding"),
    ("end-norm", "trained", "reflect", 8, True, "trained"),
    ("random-head", "trained", "reflect", 8, True, "random"),
    ("hidden-householder", "trained", "none", 8, True, "trained"),
    ("poc2", "trained", "normalise and reflect", 8, True, "random"),
)

SCHEMES = {row[0]: Scheme(*row) for row in _ROWS}
