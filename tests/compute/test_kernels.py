"""The GPU's generator in Triton's interpreter, which needs no GPU, against the generator in torch's operations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pocd.compute import random
from tests.reference.plain import NORMAL_ROUNDING

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("triton", reason="Triton comes only with torch's builds for GPUs")

SEEDS = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 1_000_003], dtype=torch.int32)


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from pocd.compute import kernels

        yield importlib.reload(kernels)
    importlib.reload(kernels)


@pytest.mark.parametrize("n", [1, 2, 7, 2048, 5001])
def test_it_draws_the_numbers_of_the_generator(kernels: Any, n: int) -> None:  # noqa: ANN401 - a module
    expected = random.normal(SEEDS, n)
    assert torch.allclose(
        kernels.fill_normal(torch.empty(len(SEEDS), n), SEEDS), expected, rtol=0, atol=NORMAL_ROUNDING
    )


@pytest.mark.parametrize(("dtype", "equal"), [(torch.float16, 0.999), (torch.bfloat16, 0.4)])
def test_it_rounds_to_the_dtype(kernels: Any, dtype: torch.dtype, equal: float) -> None:  # noqa: ANN401 - a module
    """The interpreter cuts bfloat16 off where a GPU rounds, so there every other number is the next one."""
    table = torch.stack([SEEDS, SEEDS + 1], dim=1)  # the seeds of a batch lie in a column
    out = torch.empty(len(SEEDS), 999, dtype=dtype)
    expected = random.normal(SEEDS, 999, dtype=dtype)
    found = kernels.fill_normal(out, table[:, 0])
    assert (found == expected).float().mean() > equal
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-5)


def test_what_a_uniform_zero_gives_is_finite(kernels: Any) -> None:  # noqa: ANN401 - a module
    h = (-0xE6546B64 * pow(5, -1, 2**32)) % 2**32
    seed = torch.tensor([(h >> 13 | h << 19) % 2**32], dtype=torch.uint32).view(torch.int32)
    assert random.uniform(seed, 1).item() == 0.0
    found = kernels.fill_normal(torch.empty(1, 8), seed)
    assert torch.allclose(found, random.normal(seed, 8), rtol=0, atol=NORMAL_ROUNDING)


@pytest.mark.parametrize("stride", [2**31, 2**31 + 8])
def test_memory_beyond_32_bits_is_reached(kernels: Any, stride: int) -> None:  # noqa: ANN401 - a module
    """Of the memory between the rows no page is ever touched."""
    rows = torch.empty(stride + 64, dtype=torch.bfloat16).as_strided((2, 63), (stride, 1))
    expected = random.normal(SEEDS[1:3], 63, dtype=torch.bfloat16)
    found = kernels.fill_normal(rows, SEEDS[1:3])
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-5)


def test_a_stream_as_long_as_the_protocol_allows_is_addressed_and_hashed_as_it_should_be(kernels: Any) -> None:  # noqa: ANN401 - a module
    """The last block of 2^31 numbers: it runs alone, since the others would take hours here."""
    n = 2**31
    half, blocks = n // 2, n // 2 // kernels.BLOCK
    out = torch.empty(1, n, dtype=torch.bfloat16)
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        place = builder.set_grid_idx
        patch.setattr(builder, "set_grid_idx", lambda *_: place(blocks - 1, 0, 0))
        patch.setattr(builder, "set_grid_dim", lambda *_: None)
        builder.grid_dim = (blocks, 1, 1)
        kernels._draw_normal[(1,)](out, SEEDS[5:], n, 1, n, half, blocks, kernels.BLOCK)
    last = slice(half - kernels.BLOCK, half)
    seed = SEEDS[5]
    radius = random.uniform(seed, kernels.BLOCK, start=last.start).clamp_min(1e-10).log().mul(-2).sqrt()
    angle = random.uniform(seed, kernels.BLOCK, start=half + last.start).mul(2 * torch.pi)
    assert torch.allclose(out[0, last].float(), angle.cos() * radius, rtol=2**-7, atol=1e-5)
    assert torch.allclose(out[0, half:][last].float(), angle.sin() * radius, rtol=2**-7, atol=1e-5)
