"""Quantised weights are dequantised exactly, bit for bit as by plain NumPy, or refused by name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pocd.compute.model import load_model
from pocd.protocol.errors import ModelError
from tests.reference import plain_quantised as plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
QUERY = "model.layers.0.self_attn.q_proj"
TORCH = {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "BF16": "bfloat16", "F16": "float16"}


def fp8(block: list[int] | None) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}


def compressed(form: str, **weights: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "group_size": None, "symmetric": True} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": {"dynamic": True}}
        },
    }


def modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}


def packed_ints(bits: int, group: int | None, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    strategy = "group" if group else "channel"
    return compressed("pack-quantized", num_bits=bits, type="int", strategy=strategy, group_size=group, **more)


SCALE = "weight_scale"
FORMATS: dict[str, tuple[dict[str, Any], Callable[..., plain.Packed]]] = {
    "FP8 in blocks": (fp8([16, 16]), plain.fp8(16, 16)),
    "FP8 in cut blocks": (fp8([24, 40]), plain.fp8(24, 40)),
    "FP8 in cut blocks, scales in bfloat16": (fp8([24, 40]), plain.fp8(24, 40, dtype="BF16")),
    "FP8 in blocks, powers of two": (fp8([16, 16]), plain.fp8(16, 16, dtype="F8_E8M0")),
    "FP8 with one scale": (fp8(None), plain.fp8(None, None)),
    "FP8 of fbgemm": ({"quant_method": "fbgemm_fp8"}, plain.fp8(1, None, scale=SCALE)),
    "FP8 of compressed-tensors, one scale": (compressed("float-quantized"), plain.fp8(None, None, scale=SCALE)),
    "FP8 of compressed-tensors, rows": (
        compressed("float-quantized", strategy="channel"),
        plain.fp8(1, None, scale=SCALE, dtype="BF16"),
    ),
    "FP8 of compressed-tensors, blocks": (
        compressed("float-quantized", strategy="block", block_structure=[24, 16]),
        plain.fp8(24, 16, scale=SCALE),
    ),
    "int8 of compressed-tensors": (
        compressed("int-quantized", type="int", strategy="channel", symmetric=False),
        plain.int8_rows,
    ),
    "int4 of compressed-tensors": (packed_ints(4, 16), plain.int_packed(4, 16)),
    "int4 of compressed-tensors, cut groups": (packed_ints(4, 24), plain.int_packed(4, 24)),
    "int4 of compressed-tensors, zero points": (
        packed_ints(4, 16, symmetric=False),
        plain.int_packed(4, 16, zero=True),
    ),
    "int4 of compressed-tensors, columns in any order": (
        packed_ints(4, 16, actorder="group"),
        plain.int_packed(4, 16, zero=True, places=True),
    ),
    "int8 of compressed-tensors, packed": (packed_ints(8, None), plain.int_packed(8, None)),
    "NVFP4 of compressed-tensors": (
        compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
        plain.nvfp4(divided=True),
    ),
    "FP8 of ModelOpt": (modelopt("FP8"), plain.fp8(None, None, scale=SCALE)),
    "NVFP4 of ModelOpt": (modelopt("NVFP4"), plain.nvfp4(divided=False)),
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}, plain.awq),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
        plain.gptq(4, first_form=True, shuffled=True),
    ),
    "GPTQ of 8 bits, second form": (
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
        plain.gptq(8, first_form=False, shuffled=False),
    ),
    "NF4 of bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, plain.bits4(nested=False)),
    "NF4 of bitsandbytes, nested": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, plain.bits4(nested=True)),
    "int8 of bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, plain.bits8),
}
Tensors = dict[str, torch.Tensor]


def tensor_of(kind: str, bits: plain.Array) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(bits.view(np.int16) if bits.dtype == np.uint16 else bits))
    return (tensor.view(getattr(torch, TORCH[kind])) if kind in TORCH else tensor).reshape(bits.shape)


def write(
    folder: Path,
    model: Any,  # noqa: ANN401 - a transformers model
    quantization: dict[str, Any],
    pack: Callable[..., plain.Packed] = plain.whole,
) -> dict[str, plain.Array]:
    """Write a checkpoint whose projections are quantised; returns the float32 truth of these."""
    model.bfloat16().save_pretrained(folder)
    rng, truth = np.random.default_rng(1), {}
    tensors: Tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if re.search(r"_proj|\.w[123]\.", name)]:
        rows, columns = tensors.pop(name).shape
        parts, truth[name] = pack(rng, rows, columns)
        root = name.removesuffix("weight")
        tensors |= {f"{root}{end}": tensor_of(*part) for end, part in parts.items()}
        tensors[f"{root}input_scale"] = torch.ones(())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = orjson.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_bytes(orjson.dumps(written | {"quantization_config": quantization}))
    return truth


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_dequantised_bit_for_bit_in_each_dtype(tmp_path: Path, form: str) -> None:
    quantization, pack = FORMATS[form]
    truth = write(tmp_path, llama(), quantization, pack)
    assert len(truth) == 7
    for dtype in ("float32", "bfloat16"):
        model = load_model(str(tmp_path), dtype=dtype, device="cpu")
        assert model.decoder.kind == "flat"
        found = model.causal.state_dict()
        for name, values in truth.items():
            assert found[name].dtype == getattr(torch, dtype)
            if dtype == "float32":
                assert np.array_equal(found[name].numpy().view(np.uint32), values.view(np.uint32))
            else:
                bits = plain.bfloat16(values)
                assert np.array_equal(found[name].view(torch.int16).numpy().view(np.uint16), bits)


def test_experts_are_dequantised_one_by_one_and_joined(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = MixtralConfig(**SMALL | {"intermediate_size": 40}, num_local_experts=3, num_experts_per_tok=2)
    truth = write(tmp_path, MixtralForCausalLM(config), fp8([24, 24]), plain.fp8(24, 24))
    found = load_model(str(tmp_path), dtype="float32", device="cpu").causal.state_dict()
    experts = "model.layers.0.{}.experts"
    at = found["model.layers.0.mlp.experts.gate_up_proj"]
    for number in range(3):
        (gate, up) = (
            next(values for name, values in truth.items() if f".experts.{number}.{part}." in name)
            for part in ("w1", "w3")
        )
        assert np.array_equal(at[number].numpy(), np.concatenate([gate, up])), experts


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        load_model(str(folder), dtype="bfloat16", device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "torchao"}, r"quant_method 'torchao' is not read exactly; take the model's unquantised"),
        ({"quant_method": None}, "quant_method None is not read exactly"),
        ({"quant_method": "mxfp4"}, "'mxfp4' is not read exactly in a llama"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ of 4 bits in the form 'gemv' is not"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ of 3 bits in the form 'gptq' is not"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "GPTQ of 4 bits in the form 'marlin'"),
        ({"quant_method": "gptq"}, r"its description is not understood \(KeyError: 'bits'\)"),
        (fp8([128]), "its description is not understood"),
        (modelopt("W4A8_AWQ"), "ModelOpt's quant_algo 'W4A8_AWQ' is not read exactly"),
        (compressed("marlin-24"), "compressed-tensors' format 'marlin-24' is not read exactly"),
        (compressed("float-quantized", num_bits=4), r"weights of 4 bits \(float, tensor\) are not read exactly"),
        (
            compressed("dense") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed-tensors with a sparsity_config is not read exactly",
        ),
        (
            compressed("dense") | {"transform_config": {"config_groups": {"R1": {}}}},
            "compressed-tensors with a transform_config is not read exactly",
        ),
        (fp8([128, 128]), r"none of its tensors is FP8 .*: if they are whole, remove the quantization_config"),
    ],
)
def test_a_way_that_is_not_read_exactly_is_named(tmp_path: Path, quantization: dict[str, Any], reason: str) -> None:
    write(tmp_path, llama(), quantization)
    refused(tmp_path, reason)


def without(form: str, end: str) -> Callable[..., plain.Packed]:
    def pack(rng: np.random.Generator, rows: int, columns: int) -> plain.Packed:
        parts, truth = FORMATS[form][1](rng, rows, columns)
        del parts[end]
        return parts, truth

    return pack


def cut(form: str, end: str) -> Callable[..., plain.Packed]:
    def pack(rng: np.random.Generator, rows: int, columns: int) -> plain.Packed:
        parts, truth = FORMATS[form][1](rng, rows, columns)
        kind, bits = parts[end]
        parts[end] = kind, bits[:-1]
        return parts, truth

    return pack


@pytest.mark.parametrize(
    ("form", "end"),
    [
        ("FP8 in blocks", "weight_scale_inv"),
        ("FP8 of compressed-tensors, rows", "weight_scale"),
        ("int4 of compressed-tensors, zero points", "weight_zero_point"),
        ("int4 of compressed-tensors, columns in any order", "weight_g_idx"),
        ("NVFP4 of ModelOpt", "weight_scale_2"),
        ("NVFP4 of compressed-tensors", "weight_scale"),
        ("AWQ", "qzeros"),
        ("GPTQ", "g_idx"),
        ("NF4 of bitsandbytes, nested", "weight.nested_absmax"),
        ("int8 of bitsandbytes", "SCB"),
    ],
)
def test_what_lacks_a_part_or_has_one_of_another_shape_is_named(tmp_path: Path, form: str, end: str) -> None:
    packs = [cut(form, end)] if end != "weight_scale_2" else []
    if "zero_point" not in end:
        packs.append(without(form, end))
    for pack in packs:
        write(tmp_path, llama(), FORMATS[form][0], pack)
        refused(tmp_path, r"tensors? \(model\.layers\.0.*\) are not .*unquantised checkpoint")


def test_a_zero_point_of_gptqs_first_form_that_is_either_of_two_is_refused(tmp_path: Path) -> None:
    """Its files hold a point less one, of which 0 wraps round; programs differ in what they make of that."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> plain.Packed:
        parts, truth = FORMATS["GPTQ"][1](rng, rows, columns)
        parts["qzeros"] = "I32", np.full_like(parts["qzeros"][1], -1)
        return parts, truth

    write(tmp_path, llama(), FORMATS["GPTQ"][0], pack)
    refused(tmp_path, "qweight.*are not GPTQ's")


def test_modelopts_own_file_says_how_weights_are_quantised(tmp_path: Path) -> None:
    """Its older checkpoints say nothing of it in config.json."""
    truth = write(tmp_path, llama(), modelopt("FP8"), plain.fp8(None, None, scale=SCALE))
    written = orjson.loads((tmp_path / "config.json").read_bytes())
    del written["quantization_config"]
    (tmp_path / "config.json").write_bytes(orjson.dumps(written))
    refused(tmp_path, "has no quantization_config")
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_bytes(orjson.dumps(said))
    found = load_model(str(tmp_path), dtype="float32", device="cpu").causal.state_dict()
    assert all(np.array_equal(found[name].numpy(), values) for name, values in truth.items())


def test_scales_of_what_is_not_quantised_are_named(tmp_path: Path) -> None:
    write(tmp_path, llama(), fp8([16, 16]), plain.fp8(16, 16))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{QUERY}.weight"] = torch.ones(32, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, rf"{QUERY}\.weight_scale_inv\) are used by nothing")
