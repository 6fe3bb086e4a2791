"""Start of the round that should be active: a pure function of the chain's head (docs/protocol.md section 8)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoundPolicy:
    """Heights at which rounds start, and their duration, in blocks.

    Attributes:
        every: A round starts at each height h with h ≡ offset (mod every); at least 1.
        offset: Remainder of the heights at which rounds start, 0 to every - 1.
        duration: A round lives at the heights start to start + duration - 1; 1 to every.
    """

    every: int
    offset: int
    duration: int


def active_start(height: int, policy: RoundPolicy) -> int | None:
    """Return the height at which the round active at `height` started; None between rounds.

    The result depends on the head alone, so a missed block, a restart or an outage loses no round.
    """
    age = (height - policy.offset) % policy.every
    start = height - age
    return start if age < policy.duration and start >= 1 else None
