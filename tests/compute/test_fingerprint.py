"""The fingerprint covers what decides a result beside the weights: configuration, and way of dequantisation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pocd.compute.fingerprint import checkpoint_fingerprint, deciding
from pocd.compute.model import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def written(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    model.save_pretrained(folder)
    config: dict[str, Any] = orjson.loads((folder / "config.json").read_bytes())
    return config


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(1)
    config = Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    written(folder, Qwen3MoeForCausalLM(config))
    return folder


def changed(folder: Path, **keys: Any) -> str:  # noqa: ANN401 - JSON
    """Return the fingerprint with some keys of config.json changed; an ellipsis leaves one out."""
    file = folder / "config.json"
    before = file.read_bytes()
    config = orjson.loads(before) | keys
    file.write_bytes(orjson.dumps({key: value for key, value in config.items() if value is not ...}))
    try:
        return checkpoint_fingerprint(folder)
    finally:
        file.write_bytes(before)


ROTARY = {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    "keys",
    [
        {"transformers_version": "4.51.0"},
        {"torch_dtype": "bfloat16"},
        {"dtype": "float16"},
        {"architectures": ["SomethingElse", "Qwen3MoeForCausalLM"]},
        {"use_cache": False},
        {"attention_dropout": 0.5},
        {"eos_token_id": [1, 2]},
        {"initializer_range": 0.5},
        {"output_router_logits": True},
        {"router_aux_loss_coef": 0.5},
        {"rms_norm_eps": 0.000001},
        {"rope_parameters": ..., "rope_theta": 10000},
        {"rope_parameters": ..., "rope_scaling": None, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_theta": 10000, "rope_type": "default", "type": "default"}},
        {"sliding_window": 32, "use_sliding_window": False},
    ],
    ids=str,
)
def test_what_has_no_part_in_a_result_does_not_count(mixture: Path, keys: dict[str, Any]) -> None:
    assert changed(mixture, **keys) == checkpoint_fingerprint(mixture)


@pytest.mark.parametrize(
    "keys",
    [
        {"rms_norm_eps": 0.00001},
        {"num_experts_per_tok": 1},
        {"norm_topk_prob": True},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 4},
        {"rope_parameters": ROTARY | {"rope_theta": 1000000.0}},
        {"rope_parameters": ROTARY | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"max_position_embeddings": 128},
        {"sliding_window": 32, "use_sliding_window": True},
        {"mlp_only_layers": [0]},
        {"some_key_of_a_later_version": 1},
    ],
    ids=str,
)
def test_what_decides_a_result_counts(mixture: Path, keys: dict[str, Any]) -> None:
    assert changed(mixture, **keys) != checkpoint_fingerprint(mixture)


@pytest.mark.parametrize(
    "keys",
    [
        {"final_logit_softcapping": 20.0},
        {"attn_logit_softcapping": 20.0},
        {"query_pre_attn_scalar": 16},
        {"sliding_window": 8},
        {"layer_types": ["full_attention", "full_attention"]},
    ],
    ids=str,
)
def test_what_decides_a_result_of_gemma_counts(tmp_path: Path, keys: dict[str, Any]) -> None:
    written(tmp_path, Gemma2ForCausalLM(Gemma2Config(**SMALL)))
    assert changed(tmp_path, **keys) != checkpoint_fingerprint(tmp_path)


def test_the_loaded_model_has_the_fingerprint_of_its_folder(mixture: Path) -> None:
    assert load_model(str(mixture), dtype="bfloat16", device="cpu").fingerprint == checkpoint_fingerprint(mixture)


def test_one_form_however_it_is_written() -> None:
    """What equals the default of its class counts as not written, whole numbers as such, and null within as absent."""
    defaults = {"model_type": "m", "eps": 1e-6, "rope": {"theta": 10000.0}, "window": 4096}
    config = {
        "model_type": "m",
        "eps": 0.000001,
        "rope": {"theta": 10000, "factor": None},
        "window": None,
        "heads": 2.0,
    }
    assert deciding(config, defaults) == {"model_type": "m", "window": None, "heads": 2}
    assert deciding({**config, "_private": 1, "dtype": "x"}, defaults) == deciding(config, defaults)


def test_a_checkpoint_that_is_larger_than_the_hosts_memory_has_a_fingerprint(tmp_path: Path) -> None:
    """Only headers and a sample are read, and no memory is reserved for the rest; the file is a hole."""
    words = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    rows = sum(int(words[name].split()[0]) for name in ("MemTotal", "SwapTotal")) // 8  # of 1 KiB, in each of 16
    size = rows * 1024
    GPT2Config().save_pretrained(tmp_path)
    shape = {"dtype": "BF16", "shape": [rows, 512]}
    header = orjson.dumps({f"{n}.weight": {**shape, "data_offsets": [n * size, (n + 1) * size]} for n in range(16)})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 16 * size)
    assert checkpoint_fingerprint(tmp_path).startswith("v2-")
