"""The verdict by differences on stored errors of the bundled models' vectors: whom it accuses, and how soon it catches.

Batches are drawn from the nonces of `tests/data/differences.json`, with random projections (seeded).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocd.lab.cheap import HONEST
from pocd.lab.residual import Drawing

STORED: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data" / "differences.json").read_bytes())
MODELS = list(STORED)


def drawing(model: str) -> Drawing:
    own = np.array(STORED[model]["own"])
    return Drawing(own, np.full(len(own), STORED[model]["blank"]), 12)


def errors(model: str, way: str) -> Any:  # noqa: ANN401 - an array
    return np.array(STORED[model]["ways"][way])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("n", [20, 100, 300, 1000])
def test_honest_ways_are_not_accused(model: str, n: int) -> None:
    """Of 500 batches none: with 95% confidence fewer than 0.6%; the law itself is held to 1e-4 by exact convolution."""
    drawn, generator = drawing(model), np.random.default_rng(n)
    assert not any(drawn.is_fraud(errors(model, HONEST), 1.5, n, generator) for _ in range(500))


# Nonces that catch with 99% power, by allowance; twice as many are granted.
EXPECTED = {
    ("bundled:tiny-qwen3", "W8A8"): (20, 25),
    ("bundled:tiny-qwen3", "FP8 W8A8"): (20, 20),
    ("bundled:tiny-qwen3", "FP8, last layer"): (20, 20),
    ("bundled:tiny-qwen3", "keys, values in FP8"): (20, 20),
    ("bundled:tiny-llama", "W8A8"): (20, 20),
    ("bundled:tiny-llama", "FP8 W8A8"): (20, 20),
    ("bundled:tiny-llama", "FP8, last layer"): (20, 20),
    ("bundled:tiny-llama", "keys, values in FP8"): (20, 20),
    **{(model, way): (3, 3) for model in MODELS for way in ("NF4 weights", "2:4 weights", "without layer 2")},
    **{(model, way): (3, 3) for model in MODELS for way in ("without position 1", "mean output")},
}


@pytest.mark.parametrize(("model", "way"), EXPECTED)
def test_each_cheat_is_caught_by_so_many_nonces(model: str, way: str) -> None:
    for allowance, expected in zip((1.25, 1.5), EXPECTED[model, way], strict=True):
        found = drawing(model).least_that_catch(errors(model, way), allowance)
        assert found is not None
        assert found <= 2 * expected


def test_a_mixture_is_caught_by_more_nonces() -> None:
    drawn, generator = drawing(MODELS[0]), np.random.default_rng(1)

    def caught(way: str, share: float, n: int) -> float:
        found = [drawn.is_fraud(errors(MODELS[0], way), 1.5, n, generator, share) for _ in range(60)]
        return float(np.mean(found))

    assert caught("FP8 W8A8", 0.1, 1000) > 0.9
    assert caught("FP8 W8A8", 0.25, 300) > 0.9
    assert caught("W8A8", 0.5, 1000) > 0.9
    assert caught("W8A8", 0.02, 100) < 0.1
