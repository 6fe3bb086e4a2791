"""Faults that files of a model may have: each is refused in one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from pocd.compute.model import load_model
from pocd.protocol.errors import ModelError
from tests.compute.test_checkpoints import QUERY, llama
from tests.compute.test_quantised import FORMATS, write
from tests.compute.test_quantised import llama as quantised_llama
from tests.compute.test_text_parts import EXPERTS as TEXT_EXPERTS
from tests.compute.test_text_parts import MROPE, build

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]


def change(folder: Path, *changes: Change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for each in changes:
        each(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder: Path, reason: str, dtype: str = "bfloat16") -> None:
    with pytest.raises(ModelError, match=reason) as error:
        load_model(str(folder), dtype=dtype, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.self_attn.q_proj.weight"])
def test_a_tensor_under_two_names_is_named(tmp_path: Path, name: str) -> None:
    """transformers knows both names, and takes one of them without a word."""
    llama().save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({name: tensors[f"model.{name}"] * 2}))
    refused(tmp_path, rf"hold (model\.)?{re.escape(name)} and (model\.)?{re.escape(name)}, two names of one tensor")


def test_a_tensor_of_the_text_under_two_names_is_named(tmp_path: Path) -> None:
    build("Mistral3", {}).save_pretrained(tmp_path)
    old, new = "language_model.model.norm.weight", "model.language_model.norm.weight"
    change(tmp_path, lambda tensors: tensors.update({old: torch.ones(32), new: torch.ones(32)}))
    refused(tmp_path, r"norm\.weight, two names of one tensor: remove the wrong one")


def test_a_tensor_both_whole_and_quantised_is_named(tmp_path: Path) -> None:
    write(tmp_path, quantised_llama(), *FORMATS["GPTQ"])
    change(tmp_path, lambda tensors: tensors.update({f"{QUERY}.weight": torch.ones(32, 32)}))
    refused(tmp_path, rf"{QUERY}\.weight\) both quantised and whole")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, value: float) -> None:
    """Some kernels of attention make finite numbers of them, and others do not."""
    llama().save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors[f"{QUERY}.weight"].view(-1)[5:6].fill_(value))
    refused(
        tmp_path, rf"1 tensor \({QUERY}\.weight\) hold NaN or infinity in torch\.bfloat16; copy or download it again"
    )


def test_weights_too_large_for_float16_are_named_with_the_remedy(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors[f"{QUERY}.weight"].view(-1)[5:6].fill_(1e5))
    refused(tmp_path, "hold NaN or infinity in torch.float16.*set model.dtype = 'bfloat16'", "float16")
    load_model(str(tmp_path), dtype="bfloat16", device="cpu")


@pytest.mark.parametrize("kind", ["of text", "of images and text"])
def test_an_output_matrix_that_is_missing_is_explained(tmp_path: Path, kind: str) -> None:
    (llama() if kind == "of text" else build("Mistral3", {})).save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.pop(next(name for name in tensors if "lm_head" in name)))
    file = tmp_path / "config.json"
    written = orjson.loads(file.read_bytes())
    if kind != "of text":  # where nothing is said of ties
        del written["tie_word_embeddings"]
        file.write_bytes(orjson.dumps(written))
    refused(
        tmp_path, r"no output matrix.*lack lm_head\.weight of the decoder of text.*write \"tie_word_embeddings\": true"
    )
    file.write_bytes(orjson.dumps(written | {"tie_word_embeddings": True}))
    causal = load_model(str(tmp_path), dtype="bfloat16", device="cpu").causal
    assert causal.lm_head.weight is causal.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN', r"config\.json has a NaN in place of a number"),
        (
            '"rms_norm_eps": 1e-06',
            '"rms_norm_eps": 1e-06, "rms_norm_eps": 1e-05',
            r"config\.json says 'rms_norm_eps' twice, and not the same: keep the right one",
        ),
        ("{", "", r"its config\.json is no JSON .*; restore the file"),
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-06, "quantization_config": {"a": 1, "a": 2}', "says 'a' twice"),
    ],
)
def test_a_configuration_that_others_would_read_otherwise_is_refused(
    tmp_path: Path, old: str, new: str, reason: str
) -> None:
    llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = file.read_text()
    assert old in written
    file.write_text(written.replace(old, new, 1))
    refused(tmp_path, reason)


@pytest.mark.parametrize("content", [b"nonsense", b"[]", b'{"quantization": [1]}'])
def test_a_description_of_quantised_weights_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "hf_quant_config.json").write_bytes(content)
    refused(tmp_path, r"hf_quant_config\.json (is no JSON|holds no JSON object)")


def test_a_folder_in_place_of_the_weights_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, r"model\.safetensors cannot be loaded: it is missing, or no file; copy")


def state(**changed: Any) -> Change:  # noqa: ANN401 - JSON
    def write_state(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.startswith(f"{QUERY}.weight.quant_state"))
        said = json.loads(bytes(tensors[name].tolist())) | changed
        tensors[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return write_state


def at(end: str, value: float) -> Change:
    return lambda tensors: tensors[f"{QUERY}.{end}"].view(-1)[3:4].fill_(value)


SHUFFLED = "int4 of compressed-tensors, columns in any order"


@pytest.mark.parametrize(
    ("form", "damage"),
    [
        ("GPTQ", at("g_idx", 9)),  # beyond the groups, which a GPU would answer with a fault
        ("GPTQ", at("g_idx", -1)),  # the last group, as Python counts
        (SHUFFLED, at("weight_g_idx", 9)),
        (SHUFFLED, at("weight_g_idx", -1)),  # -1 in all places means in order
        (SHUFFLED, lambda tensors: tensors.update({f"{QUERY}.weight_shape": torch.tensor([1, 32, 32])})),
        (SHUFFLED, lambda tensors: tensors.update({f"{QUERY}.weight_shape": torch.tensor([0, 32])})),
        (
            "AWQ",
            lambda tensors: tensors.update(
                {f"{QUERY}.scales": torch.empty(0, 32), f"{QUERY}.qzeros": torch.empty(0, 4, dtype=torch.int32)}
            ),
        ),
        ("NF4 of bitsandbytes", state(blocksize=0)),
        ("NF4 of bitsandbytes", state(shape=[-32, -32])),
    ],
)
def test_numbers_within_a_format_that_are_none_of_it_are_named(tmp_path: Path, form: str, damage: Change) -> None:
    write(tmp_path, quantised_llama(), *FORMATS[form])
    load_model(str(tmp_path), dtype="bfloat16", device="cpu")
    change(tmp_path, damage)
    refused(tmp_path, rf"\({QUERY}.*\) are not .*unquantised checkpoint")


@pytest.mark.parametrize("shapes", ["as transformers saves them", "as Qwen publishes them"])
def test_experts_of_a_model_of_images_are_turned_as_transformers_does(tmp_path: Path, shapes: str) -> None:
    whole = build("Qwen3VLMoe", MROPE | TEXT_EXPERTS)
    whole.save_pretrained(tmp_path)

    def turn(tensors: Tensors) -> None:
        for name, wanted in whole.state_dict().items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                is_turned = shapes == "as Qwen publishes them"
                tensors[name] = (wanted.transpose(1, 2) if is_turned else wanted).contiguous()

    change(tmp_path, turn)
    found = load_model(str(tmp_path), dtype="float32", device="cpu").causal
    wanted = whole.model.language_model.layers[0].mlp.experts
    assert torch.equal(found.model.layers[0].mlp.experts.gate_up_proj, wanted.gate_up_proj)
    assert torch.equal(found.model.layers[0].mlp.experts.down_proj, wanted.down_proj)
