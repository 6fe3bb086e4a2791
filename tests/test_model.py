from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pocd.compute.errors import DeviceError, InputError, ModelError
from pocd.compute.model import adapt, load_model, pick_device
from pocd.compute.names import BUNDLED

SMALL: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-llama"])
def test_bundled_models_are_small_trained_and_in_their_form(name: str) -> None:
    weights = BUNDLED / name / "model.safetensors"
    assert weights.stat().st_size < 2_000_000
    assert "nats per byte" in (BUNDLED / name / "README.md").read_text()
    model = load_model(f"bundled:{name}", dtype="float32", device="cpu")
    assert (len(model.layers), model.hidden_size, model.max_positions) == (4, 128, 4096)
    assert not model.decoder.training


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-llama"])
def test_bundled_models_predict_python_source(name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype=torch.float32)
    # This file is no part of the standard library that they were trained on.
    tokens = torch.tensor(list(Path(__file__).read_bytes()[:1024])).view(4, 256)
    with torch.inference_mode():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert loss < 3.0  # nats per byte, here from short contexts; an untrained one has 5.5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_models_load_in_the_dtype_asked_for(dtype: str) -> None:
    assert str(load_model("bundled:tiny-qwen3", dtype=dtype, device="cpu").dtype) == f"torch.{dtype}"


def test_a_local_path_loads(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), dtype="float32", device="cpu").hidden_size == 16


def test_an_unknown_bundled_model_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"bundled:nosuch.*bundled:tiny-llama, bundled:tiny-qwen3"):
        load_model("bundled:nosuch", dtype="float32", device="cpu")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no .*config\.json"):
        load_model(str(tmp_path / "nothing"), dtype="float32", device="cpu")


def test_a_folder_without_weights_is_an_error_in_one_line(tmp_path: Path) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_model(str(tmp_path), dtype="float32", device="cpu")
    assert "\n" not in str(error.value)


def test_broken_weights_are_an_error_in_one_line(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_model(str(tmp_path), dtype="float32", device="cpu")
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks .*mlp\.up_proj\.weight"):
        load_model(str(tmp_path), dtype="float32", device="cpu")


def test_another_family_is_refused_by_its_type(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'gpt2'"):
        load_model(str(tmp_path), dtype="float32", device="cpu")
    with pytest.raises(ModelError, match="GPT2LMHeadModel"):
        adapt(model, name="x")


def test_an_unknown_dtype_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"float64.*float32, float16, bfloat16"):
        load_model("bundled:tiny-qwen3", dtype="float64", device="cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0"])
def test_an_unknown_device_names_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match="allowed are: cpu, cuda, cuda:N"):
        pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_a_missing_gpu_is_an_error_and_never_the_cpu() -> None:
    with pytest.raises(DeviceError, match=r"sees no GPU.*set device = 'cpu'"):
        load_model("bundled:tiny-qwen3", dtype="float32", device="cuda")
