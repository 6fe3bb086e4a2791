"""The registry of schemes: how a nonce's distance is composed (docs/protocol.md section 3).

Plain data without torch, so that the daemon can check a scheme's name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scheme:
    """A composition that the engine runs.

    Attributes:
        name: As configured and as written into batches.
        reflections: Householder reflections per nonce, of the final hidden state.
        output_dim: Dimension D of the random head and the target.
    """

    name: str
    reflections: int
    output_dim: int


SCHEMES = {scheme.name: scheme for scheme in (Scheme(name="poc2", reflections=8, output_dim=8192),)}
