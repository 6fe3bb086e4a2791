"""The registry of schemes: how a distance, or a vector, is composed (docs/protocol.md sections 3 and 4).

A scheme is a composition of seven choices. Each choice is named here and made in one place: `weights` in
`weights.py`, `layer_step` in `transforms.py`, `reads` in `segments.py`, the others in `stages.py` and
`engine.py`. Plain data without torch, so that the daemon can check a scheme's name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pocd.protocol.commitment import LARGEST_NONCE as LARGEST_LIVE_NONCE
from pocd.protocol.errors import InputError
from pocd.protocol.nonces import LARGEST_NONCE

WeightSource = Literal["trained", "drawn", "embedding drawn"]
LayerStep = Literal["none", "reflect", "normalise and reflect", "normalise, weigh and reflect"]
Reads = Literal["last position", "segments", "signed sum"]
HeadSource = Literal["trained", "embedding", "random", "none", "projection", "pick"]
InputSeeds = Literal["32 bits", "256 bits"]
Output = Literal["distance", "vector"]

RANDOM_HEAD_DIM = 8192  # D of a random head
SEGMENTS = 6  # of the sequence, where a product of them is read
VECTOR_SIZE = 12  # numbers per nonce, where they are the result
VECTOR_BYTES = 2 * VECTOR_SIZE  # as they travel, in float16
VECTOR_ENCODING = {"dtype": "f16", "k_dim": VECTOR_SIZE, "endian": "le"}  # how a batch says so


@dataclass(frozen=True, slots=True)
class Scheme:
    """A scheme: a composition of choices that the engine runs.

    Attributes:
        name: Name in the configuration and in batches.
        weights: Source of the weights: the model's own; or all, or the input embedding, drawn anew per block hash.
        layer_step: Transform of branch and residual after every decoder layer; "weigh": the branch counts 1/√L, where L
            is the number of layers.
        reads: The part of the decoder's output that is read: the last position; or all, as a product over segments or
            as one sum.
        reflections: Number of Householder reflections of the readout per nonce.
        normalise: Whether the readout is scaled to unit length before the head.
        head: Source of the head: the model's output matrix; the input embedding; drawn per block hash; none: then the
            target is drawn per nonce, in the hidden space; or, for vectors of `VECTOR_SIZE` numbers, a projection that
            is drawn per nonce, or so many coordinates, picked and rotated per nonce, as the live network has it.
        inputs: Seeds of a nonce's inputs: one of 32 bits; or eight, all 256 bits of a hash.
    """

    name: str
    weights: WeightSource
    layer_step: LayerStep
    reads: Reads
    reflections: int
    normalise: bool
    head: HeadSource
    inputs: InputSeeds = "32 bits"

    @property
    def output(self) -> Output:
        """What a nonce has: a distance to a target, which `r_target` judges; or a vector, which always counts."""
        return "vector" if self.head in {"projection", "pick"} else "distance"

    @property
    def input_seeds(self) -> int:
        """Number of 32-bit seeds of a nonce's inputs."""
        return 8 if self.inputs == "256 bits" else 1

    @property
    def largest_nonce(self) -> int:
        """Largest nonce that has a result."""
        return LARGEST_LIVE_NONCE if self.head == "pick" else LARGEST_NONCE

    @property
    def reads_all(self) -> bool:
        """Whether all positions of the decoder's output are read."""
        return self.reads != "last position"

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
    ("poc4", "trained", "normalise, weigh and reflect", "signed sum", 0, False, "projection"),
    ("artifacts", "trained", "reflect", "last position", 0, True, "pick"),
)

SCHEMES = {row[0]: Scheme(*row) for row in _ROWS}
# The live network's option `poc_stronger_rng`.
SCHEMES["artifacts-256"] = replace(SCHEMES["artifacts"], name="artifacts-256", inputs="256 bits")
LIVE_SCHEME = "artifacts"
_STRONGER = {LIVE_SCHEME: "artifacts-256"}
DISTANCE_SCHEMES = [name for name, scheme in SCHEMES.items() if scheme.output == "distance"]


def with_stronger_rng(name: str) -> str:
    """Return the name of the same scheme with inputs from all 256 bits, the live network's option `poc_stronger_rng`.

    Raises:
        InputError: The scheme has no such option.
    """
    if name not in _STRONGER:
        raise InputError(f"scheme {name!r} has no stronger inputs; those that have: {', '.join(_STRONGER)}")
    return _STRONGER[name]
