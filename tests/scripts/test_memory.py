"""Loading holds the weights once in the host's memory, however they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts.trials.memory import KINDS, MOST, peak_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("kind", "dtype"), [("dense", "float32"), ("fp8", "bfloat16"), ("mixture", "bfloat16")])
def test_loading_makes_no_second_copy_of_the_weights(tmp_path: Path, kind: str, dtype: str) -> None:
    """A process takes some memory besides, which counts for more in a small model."""
    KINDS[kind](tmp_path, 160)
    assert 0.9 < peak_of(tmp_path, dtype) < MOST + 0.2
