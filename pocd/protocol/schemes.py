"""The registry of schemes: how a distance is composed (docs/protocol.md sections 3 and 4).

A scheme is a composition of six choices. Each choice is named here and made in one place: `weights` in
`weights.py`, `layer_step` in `transforms.py`, `reads` in `segments.py`, the others in `engine.py`. Plain
data without torch, so that the daemon can check a scheme's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WeightSource = Literal["trained", "drawn", "embedding drawn"]
LayerStep = Literal["none", "reflect", "normalise and reflect"]
Reads = Literal["last position", "segments"]
HeadSource = Literal["trained", "embedding", "random", "none"]

RANDOM_HEAD_DIM = 8192  # D of a random head
SEGMENTS = 6  # of the sequence, where all positions are read


@dataclass(frozen=True, slots=True)
class Scheme:
    """A scheme: a composition of choices that the engine runs.

    Attributes:
        name: Name in the configuration and in batches.
        weights: Source of the weights: the model's own; or all, or the input embedding, drawn anew per block hash.
        layer_step: Transform of branch and residual after every decoder layer.
        reads: The part of the decoder's output that is read: the last position; or all, as a product over segments.
        reflections: Number of Householder reflections of the readout per nonce.
        normalise: Whether the readout is scaled to unit length before the head.
        head: Source of the head: the model's output matrix; the input embedding; drawn per block hash; or none: then
            the target is drawn per nonce, in the hidden space.
    """

    name: str
    weights: WeightSource
    layer_step: LayerStep
    reads: Reads
    reflections: int
    normalise: bool
    head: HeadSource

    @property
    def least_seq_len(self) -> int:
        """Least number of positions that the scheme needs: one, or one per segment."""
        return SEGMENTS if self.reads == "segments" else 1


_ROWS: tuple[tuple[str, WeightSource, LayerStep, Reads, int, bool, HeadSource], ...] = (
    # name, weights, after each layer, reads, per nonce, normalise before the head, head
    ("trained", "trained", "reflect", "last position", 8, False, "trained"),
    ("random-weights", "drawn", "none", "last position", 8, False, "trained"),  # its head is drawn with the rest
    ("random-embed", "embedding drawn", "reflect", "last position", 8, False, "embedding"),
    ("end-norm", "trained", "reflect", "last position", 8, True, "trained"),
    ("random-head", "trained", "reflect", "last position", 8, True, "random"),
    ("hidden-householder", "trained", "none", "last position", 8, True, "trained"),
    ("poc2", "trained", "normalise and reflect", "last position", 8, True, "random"),
    ("poc3", "trained", "normalise and reflect", "segments", 0, True, "none"),
)

SCHEMES = {row[0]: Scheme(*row) for row in _ROWS}
