"""Quantised matrices as their own packages write them are worth what these say; skipped where they are absent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from pocd.compute.stored import read_headers
from pocd.compute.ways import matrices, read_way

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = [torch.float32, torch.bfloat16]


def dequantised(folder: Path, parts: dict[str, torch.Tensor], quantization: dict[str, Any]) -> torch.Tensor:
    """Return the matrix that tensors, by the ends of their names, are read as."""
    save_file({f"q_proj.{end}": part.contiguous() for end, part in parts.items()}, folder / "model.safetensors")
    (matrix,) = matrices(read_headers(folder), read_way(quantization, "llama"), name="one")
    return matrix.compute(*(part.read() for part in matrix.parts.values()))


def weights(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(96, 128, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_of_four_bits(tmp_path: Path, kind: str, nested: bool, dtype: torch.dtype) -> None:  # noqa: FBT001 - a case
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    packed, state = functional.quantize_4bit(
        weights(dtype), blocksize=64, quant_type=kind, compress_statistics=nested, quant_storage=torch.uint8
    )
    parts = {"weight": packed} | {f"weight.{end}": part for end, part in state.as_dict(packed=True).items()}
    found = dequantised(tmp_path, parts, {"quant_method": "bitsandbytes"})
    assert torch.equal(found.to(dtype), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("compressor", "form", "scheme", "grid"),
    [
        ("FloatQuantization", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, None),
        ("FloatQuantization", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, (96, 1)),
        (
            "FloatQuantization",
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [40, 48]},
            (3, 3),
        ),
        ("IntQuantization", "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, (96, 1)),
        (
            "PackedQuantization",
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            (96, 4),
        ),
    ],
)
def test_compressed_tensors(
    tmp_path: Path,
    compressor: str,
    form: str,
    scheme: dict[str, Any],
    grid: tuple[int, int] | None,
    dtype: torch.dtype,
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    arguments = quantization.QuantizationArgs(**scheme, symmetric=True)
    whole = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    kind = getattr(compressors, f"{compressor}Compressor")
    scale = (torch.rand(grid or (1,), generator=torch.Generator().manual_seed(2)) * 0.001 + 0.0004).to(dtype)
    packed = kind.compress({"weight": weights(dtype), "weight_scale": scale}, whole)
    parts = {end: part for end, part in packed.items() if part is not None}
    described = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"weights": scheme}},
    }
    found = dequantised(tmp_path, parts, described)
    assert torch.equal(found.to(dtype), kind.decompress(dict(packed), whole)["weight"])
