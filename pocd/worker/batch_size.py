"""How many nonces a batch has where that is not configured: as many as fit into memory and take half a second."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST_SECONDS = 0.5  # of a batch: nothing that comes meanwhile is begun before it is done
LARGEST_STEP = 8  # from one size to the next one that is tried


@dataclass(frozen=True, slots=True)
class Trial:
    """What a batch of one size took.

    Attributes:
        seconds: Time of the batch, once its code was warm.
        room: How many times the memory that it took is there; infinite where nobody can tell.
    """

    seconds: float
    room: float = math.inf


def find_batch_size(most: int, attempt: Callable[[int], Trial | None]) -> int | None:
    """Return the largest size that fits and takes at most `LONGEST_SECONDS`; 1 where even that takes longer.

    It grows from 1, by what the size before took. So no attempt is far too slow, nor far beyond the memory.

    Args:
        most: The largest size that is tried.
        attempt: Computes a batch of a size; returns None if it does not fit into memory.

    Returns:
        The size; None where not even 1 fits.
    """
    size, trial = 1, attempt(1)
    if trial is None:
        return None
    while (larger := min(size * _step(trial), most)) > size:
        found = attempt(larger)
        if found is None or found.seconds > LONGEST_SECONDS:
            most = larger // 2
        else:
            size, trial = larger, found
    return size


def _step(trial: Trial) -> int:
    """Return by how much the size is multiplied next, a power of two."""
    factor = min(LARGEST_STEP, LONGEST_SECONDS / max(trial.seconds, 1e-6), trial.room)
    return 1 << int(math.log2(factor)) if factor >= 1 else 1
