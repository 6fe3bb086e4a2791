"""Loading holds the weights once in the host's memory, however they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.trials.memory import KINDS, MOST, peaks_of

if TYPE_CHECKING:
    from pathlib import Path

ASKED = {"dense": "float32", "fp8": "bfloat16", "mixture": "bfloat16"}


def test_loading_makes_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """A process takes some memory besides, which counts for more in a small model."""
    for kind in ASKED:
        (tmp_path / kind).mkdir()
        KINDS[kind](tmp_path / kind, 160)
    peaks = peaks_of(*((tmp_path / kind, dtype) for kind, dtype in ASKED.items()))
    found = dict(zip(ASKED, peaks, strict=True))
    assert not {kind: peak for kind, peak in found.items() if not 0.9 < peak < MOST + 0.2}
