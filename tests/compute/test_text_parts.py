"""Models of images and text: the decoder of text inside is run, and the parts for images are not even loaded."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pocd.compute.engine import block_run
from pocd.compute.experts import IN_TILES
from pocd.compute.model import load_model
from pocd.protocol.errors import ModelError
from pocd.protocol.schemes import SCHEMES
from tests.reference import plain
from tests.support.other_models import Hooked

if TYPE_CHECKING:
    from pathlib import Path

SEQ_LEN = 13
TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size_mlp": 48,
}
MROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
MLA: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": ...,
}
GROUPS: dict[str, Any] = {
    "rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0},
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SIGHT: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 8,
}
NESTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Gemma 3": ("Gemma3", "post_feedforward_layernorm", {"sliding_window": 5}),
    "Mistral Small 3.1": ("Mistral3", "mlp", {}),
    "Qwen2.5-VL": ("Qwen2_5_VL", "mlp", MROPE),
    "Qwen3-VL": ("Qwen3VL", "mlp", MROPE),
    "Qwen3-VL, mixture": ("Qwen3VLMoe", "mlp", MROPE | EXPERTS),
    "Llama 4": ("Llama4", "feed_forward", EXPERTS | {"attention_chunk_size": 64}),
    "Kimi K2.5": ("Kimi_K25", "mlp", MLA | EXPERTS),
    "GLM-4.5V": ("Glm4vMoe", "mlp", EXPERTS | GROUPS),
    "SmolVLM": ("SmolVLM", "mlp", {"head_dim": 8}),
    "InternVL": ("InternVL", "mlp", {}),
    "LLaVA-NeXT": ("LlavaNext", "mlp", {}),
    "Qwen3.5": ("Qwen3_5", "mlp", {"layer_types": ["full_attention"] * 3}),
}


def build(form: str, text: dict[str, Any]) -> Any:  # noqa: ANN401 - transformers gives its classes no common type
    """Build the whole model, with its parts for images, of random weights."""
    kind = getattr(transformers, f"{form}Config")
    parts = {"text_config": deepcopy({key: value for key, value in (TEXT | text).items() if value is not ...})}
    known = kind().vision_config.to_dict()
    parts["vision_config"] = {key: value for key, value in SIGHT.items() if key in known}
    if form == "Mistral3":
        parts["text_config"]["model_type"] = "mistral"
        parts["vision_config"]["model_type"] = "pixtral"
    torch.manual_seed(1)
    model = getattr(transformers, f"{form}ForConditionalGeneration")(kind(**parts, tie_word_embeddings=False))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        around = 1.0 if plain.NORM_WEIGHT.search(name) else 0.0
        parameter.data.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("case", NESTED)
def test_the_decoder_of_text_runs_and_nothing_else_is_loaded(tmp_path: Path, case: str) -> None:
    form, branch, text = NESTED[case]
    whole = build(form, text)
    whole.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    if form == "Kimi_K25":  # transformers writes names that it does not read
        stored = {
            name.replace("language_model.model.blocks.", "language_model.model.layers."): tensor
            for name, tensor in stored.items()
        }
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert any("vis" in name for name in stored)
    weights = {key: value.detach().double().numpy() for key, value in whole.named_parameters()}
    embedding = next(key for key, value in whole.named_parameters() if value is whole.get_input_embeddings().weight)
    decoder = plain.Decoder(weights, Hooked(whole, branch), embedding)
    expected = [
        plain.distance(decoder, block_hash="ABC", public_key="key", nonce=nonce, seq_len=SEQ_LEN) for nonce in (0, 9)
    ]
    model = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert not any("vis" in name for name, _ in model.causal.named_parameters())
    experts = [module for module in model.causal.modules() if hasattr(module, "has_gate")]
    assert bool(experts) == ("experts" in str(list(stored)) and form != "Llama4")
    assert {module.config._experts_implementation for module in experts} <= {IN_TILES}
    with block_run(model, SCHEMES["poc2"], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
        assert run.distances([0, 9], batch_size=2) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("old", ["language_model.model.", "model.language_model."])
def test_old_and_new_names_of_its_tensors_are_understood(tmp_path: Path, old: str) -> None:
    whole = build("Mistral3", {})
    whole.save_pretrained(tmp_path)
    renamed = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        inner = name.split("layers.", 1)[-1] if "language_model" in name else ""
        is_layer = inner != name and "language_model" in name and "layers." in name
        key = f"{old}layers.{inner}" if is_layer else name
        if "language_model" in name and not is_layer and "lm_head" not in name:
            key = f"{old}{name.rsplit('model.', 1)[-1]}"
        if "lm_head" in name:
            key = "language_model.lm_head.weight" if old == "language_model.model." else "lm_head.weight"
        renamed[key] = tensor
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert torch.equal(found.causal.lm_head.weight, whole.lm_head.weight)
    assert found.decoder.kind == "flat"


def test_a_tensor_of_the_text_that_is_not_used_is_named(tmp_path: Path) -> None:
    build("Mistral3", {}).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    root = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight") and "language" in name)
    tensors[root.replace("weight", "bias")] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.bias\) are used by nothing"):
        load_model(str(tmp_path), dtype="float32", device="cpu")


def test_ties_are_those_of_the_text_where_nothing_else_is_said(tmp_path: Path) -> None:
    build("Mistral3", {"tie_word_embeddings": False}).save_pretrained(tmp_path)
    written = orjson.loads((tmp_path / "config.json").read_bytes())
    del written["tie_word_embeddings"]
    (tmp_path / "config.json").write_bytes(orjson.dumps(written))
    causal = load_model(str(tmp_path), dtype="float32", device="cpu").causal
    assert causal.lm_head.weight is not causal.get_input_embeddings().weight
