from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocd.compute import random
from tests.reference import plain

VECTORS: dict[str, Any] = orjson.loads((Path(__file__).parent.parent / "data" / "poc2.json").read_bytes())
uint32 = st.integers(0, 2**32 - 1)


def bits(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint32).view(torch.int32)


def test_seed32_agrees_with_the_vectors() -> None:
    for text, seed in VECTORS["seed32"].items():
        assert random.seed32(text) == seed
        assert random.seeds_tensor([text]).view(torch.uint32).item() == seed


def test_hash32_agrees_with_the_vectors() -> None:
    for case in VECTORS["hash32"]:
        found = random.hash32(bits([case["index"]]), bits([case["seed"]]))
        assert found.view(torch.uint32).item() == case["value"]


@given(st.lists(st.tuples(uint32, uint32), min_size=1, max_size=20))
def test_hash32_agrees_with_python_integers(pairs: list[tuple[int, int]]) -> None:
    found = random.hash32(bits([i for i, _ in pairs]), bits([seed for _, seed in pairs]))
    assert found.view(torch.uint32).tolist() == [plain.hash32(i, seed) for i, seed in pairs]


@pytest.mark.parametrize("case", VECTORS["uniform"])
def test_uniform_agrees_with_the_vectors_exactly(case: dict[str, Any]) -> None:
    found = random.uniform(bits([case["seed"]])[0], case["n"])
    assert found.shape == (case["n"],)
    assert found[: len(case["first"])].tolist() == case["first"]


def test_uniform_rounds_up_to_one_where_float32_does() -> None:
    # The largest hashes lie above the last float32 below 2**32; no stream avoids them.
    seeds = torch.arange(64, dtype=torch.int32)
    found = random.uniform(seeds, 2**20)
    assert found.max().item() == 1.0
    assert found.min().item() >= 0.0


@pytest.mark.parametrize("case", VECTORS["normal"])
def test_normal_agrees_with_the_vectors(case: dict[str, Any]) -> None:
    found = random.normal(bits([case["seed"]])[0], case["n"])
    assert found.shape == (case["n"],)
    assert found[:4].tolist() == pytest.approx(case["first"], abs=plain.NORMAL_ROUNDING)
    assert found[-4:].tolist() == pytest.approx(case["last"], abs=plain.NORMAL_ROUNDING)


@given(st.lists(uint32, min_size=1, max_size=4), st.integers(1, 33))
def test_normal_of_a_batch_is_each_stream_alone(seeds: list[int], n: int) -> None:
    found = random.normal(bits(seeds), n)
    assert found.shape == (len(seeds), n)
    for row, seed in zip(found, seeds, strict=True):
        assert row.tolist() == pytest.approx(plain.normal(seed, n).tolist(), abs=plain.NORMAL_ROUNDING)


def test_a_uniform_zero_gives_the_largest_radius_and_no_infinity() -> None:
    # The seed whose first hash is 0: both the finaliser and a rotation keep 0, so h·5 + 0xe6546b64 has to be 0.
    h = (-0xE6546B64 * pow(5, -1, 2**32)) % 2**32
    seed = (h >> 13 | h << 19) % 2**32
    assert plain.hash32(0, seed) == 0
    assert random.uniform(bits([seed])[0], 1).item() == 0.0
    found = random.normal(bits([seed])[0], 8)
    assert found.isfinite().all()
    assert found.tolist() == pytest.approx(plain.normal(seed, 8).tolist(), abs=plain.NORMAL_ROUNDING)


def test_unit_normal_has_unit_length_in_any_shape() -> None:
    found = random.unit_normal(bits([1, 2, 3, 4, 5, 6]).view(2, 3), 129)
    assert found.shape == (2, 3, 129)
    assert found.norm(dim=-1).flatten().tolist() == pytest.approx([1.0] * 6, abs=1e-6)
