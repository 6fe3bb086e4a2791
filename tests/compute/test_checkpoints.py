"""No checkpoint gives a wrong result silently: its tensors are used exactly, harmless, or named in a refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    PreTrainedModel,
)

from pocd.compute.engine import block_run
from pocd.compute.flat import flatten
from pocd.compute.model import adapt, load_model
from pocd.protocol.errors import ModelError
from pocd.protocol.names import DTYPES
from pocd.protocol.schemes import SCHEMES
from tests.support.other_models import OTHERS, build

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.compute.flat import FlatDecoder

SMALL: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]
QUERY = "model.layers.0.self_attn.q_proj"


def llama(**changed: Any) -> LlamaForCausalLM:  # noqa: ANN401 - keys of a configuration
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SMALL | changed)).bfloat16()


def saved(folder: Path, model: PreTrainedModel, change: Change | None = None, **config: Any) -> str:  # noqa: ANN401 - as above
    """Write a checkpoint, with its tensors and its configuration changed."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if change is not None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    written = orjson.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_bytes(orjson.dumps(written | config))
    return str(folder)


def load(folder: str, dtype: str = "bfloat16") -> Any:  # noqa: ANN401 - a Model
    return load_model(folder, dtype=dtype, device="cpu")


def refused(folder: str, reason: str, dtype: str = "bfloat16") -> str:
    with pytest.raises(ModelError, match=reason) as error:
        load(folder, dtype)
    assert "\n" not in str(error.value)
    return str(error.value)


def extra(name: str, *shape: int) -> Change:
    return lambda tensors: tensors.update({name: torch.ones(shape, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (extra(f"{QUERY}.bias", 32), {}, rf"1 tensor \({QUERY}\.bias\) are used by nothing.*restore the config"),
        (
            extra("model.layers.1.self_attn.q_norm.weight", 16),
            {},
            r"layers\.1\.self_attn\.q_norm\.weight\) are used by",
        ),
        (extra(f"{QUERY}.weight_scale_inv", 1, 1), {}, r"q_proj\.weight_scale_inv\) are used by nothing"),
        (None, {"num_hidden_layers": 1}, r"9 tensors \(model\.layers\.1\.[^,]*, [^,]*, [^,]*, …\) are used by nothing"),
        (lambda tensors: tensors.pop(f"{QUERY}.weight"), {}, rf"lacks weights, 1 tensor \({QUERY}\.weight\): copy"),
        (
            None,
            {"intermediate_size": 48},
            r"6 tensors .*: \[.*64.*\], not \[.*48.*\].*another shape than config\.json says",
        ),
        (None, {"tie_word_embeddings": True}, r"\(lm_head\.weight\) differ from what config\.json ties them to"),
    ],
)
def test_a_tensor_that_is_left_over_lacking_or_of_another_shape_is_named(
    tmp_path: Path, change: Change | None, config: dict[str, object], reason: str
) -> None:
    refused(saved(tmp_path, llama(), change, **config), reason)


def test_tensors_without_a_part_in_a_result_are_let_be(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors[f"{QUERY}.input_scale"] = torch.ones(())
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = saved(tmp_path, llama(tie_word_embeddings=True), add)
    causal = load(folder).causal
    assert causal.lm_head.weight is causal.model.embed_tokens.weight


def test_prediction_layers_that_the_class_lists_are_let_be_and_other_layers_are_not(tmp_path: Path) -> None:
    config = Glm4MoeConfig(
        **(SMALL | {"head_dim": 16}),
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    model = Glm4MoeForCausalLM(config).bfloat16()
    load(saved(tmp_path, model, extra("model.layers.46.eh_proj.weight", 2, 2)))
    refused(
        saved(tmp_path, model, extra("model.layers.47.eh_proj.weight", 2, 2)), r"layers\.47\.eh_proj.*used by nothing"
    )


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda whole: whole[:-10], lambda _: b"version https://git-lfs.github.com/spec/v1\n", None],
    ids=["empty", "truncated", "a pointer of Git LFS", "missing"],
)
def test_a_damaged_shard_of_many_is_named(tmp_path: Path, damage: Callable[[bytes], bytes] | None) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="16KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if damage is None:
        shard.unlink()
    else:
        shard.write_bytes(damage(shard.read_bytes()))
    refused(str(tmp_path), rf"{re.escape(str(shard))} cannot be loaded: it is (damaged|missing).*copy or download")


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="16KB")
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_bytes()
    written = orjson.loads(whole)
    written["weight_map"]["model.more.weight"] = next(iter(written["weight_map"].values()))
    for damaged in (b"[]", whole[:-10], b'{"weight_map": []}'):
        index.write_bytes(damaged)
        refused(str(tmp_path), rf"{re.escape(str(index))} cannot be loaded: it is no index")
    index.write_bytes(orjson.dumps(written))
    refused(str(tmp_path), r"index\.json names 1 tensor \(model\.more\.weight\) that its files do not hold")


def test_a_tensor_that_two_shards_hold_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="16KB")
    one, two, *_ = sorted(tmp_path.glob("*.safetensors"))
    twice = load_file(one)
    save_file(load_file(two) | twice, two, metadata={"format": "pt"})
    refused(str(tmp_path), rf"both hold {re.escape(min(twice))}")


@pytest.mark.parametrize("place", ["compression_config", "text_config", "file"])
def test_quantisation_is_found_wherever_it_is_written(tmp_path: Path, place: str) -> None:
    quantization: dict[str, object] = {"quant_method": "torchao"}
    written = {"text_config": {"quantization_config": quantization}, "compression_config": quantization}
    changed: dict[str, Any] = {place: written[place]} if place in written else {}
    folder = saved(tmp_path, llama(), **changed)
    if place == "file":
        (tmp_path / "hf_quant_config.json").write_bytes(b"{}")
    refused(folder, r"\(hf_quant_config\.json\)|'torchao' is not read exactly|has a text_config, and a llama")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_packed_weights_without_a_quantization_config_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    def pack(tensors: Tensors) -> None:
        tensors[f"{QUERY}.weight"] = tensors[f"{QUERY}.weight"].to(dtype)

    refused(
        saved(tmp_path, llama(), pack), rf"1 tensor \({QUERY}\.weight\) are quantised or packed .*no quantization_c"
    )


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def gpt_oss(truth: Tensors) -> tuple[PreTrainedModel, Change]:
    """Return a gpt-oss model, and what makes its experts MXFP4; the exact values go into `truth`."""
    config = GptOssConfig(**SMALL | {"intermediate_size": 32}, head_dim=16, num_local_experts=2, num_experts_per_tok=1)

    def quantise(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inner, outer = tensors.pop(name).shape
            blocks = torch.randint(256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, outer, inner // 32), dtype=torch.uint8)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            values = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
            truth[name] = (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)

    return GptOssForCausalLM(config).bfloat16(), quantise


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_of_gpt_oss_is_dequantised_exactly(tmp_path: Path, dtype: str) -> None:
    truth: Tensors = {}
    model, quantise = gpt_oss(truth)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    causal = load(saved(tmp_path, model, quantise, quantization_config=quantization), dtype).causal
    found = causal.state_dict()
    assert len(truth) == 4
    assert all(torch.equal(found[name].float(), truth[name]) for name in truth)


def test_mxfp4_that_is_no_pair_of_blocks_and_scales_is_refused(tmp_path: Path) -> None:
    model, quantise = gpt_oss({})

    def lose(tensors: Tensors) -> None:
        quantise(tensors)
        del tensors["model.layers.0.mlp.experts.down_proj_scales"]

    refused(
        saved(tmp_path, model, lose, quantization_config={"quant_method": "mxfp4"}), r"down_proj_blocks\) are not MX"
    )


class Adapted(nn.Linear):
    """What an adapter or a quantiser puts into the place of torch's own."""


def test_the_flat_decoder_takes_torchs_own_matrices_only() -> None:
    model = llama()
    assert adapt(model, name="small").decoder.kind == "flat"
    model.model.layers[1].mlp.up_proj = Adapted(32, 64, bias=False, dtype=torch.bfloat16)
    assert adapt(model, name="small").decoder.kind == "layers"
    model = llama()
    model.model.layers[1].mlp.up_proj.float()
    with pytest.raises(ModelError):
        adapt(model, name="small")


def test_the_flat_decoder_is_taken_only_where_it_agrees_on_these_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(llama(), name="small")
    assert (model.decoder.kind, model.decoder_reason[:46]) == ("flat", "on these weights the flat decoder is within 0.")
    right = flatten

    def wrong(decoder: object, *, merge: bool) -> FlatDecoder:
        flat = right(decoder, merge=merge)
        return replace(flat, norm=flat.norm * 1.1)

    monkeypatch.setattr("pocd.compute.model.flatten", wrong)
    model = adapt(llama(), name="small")
    assert model.decoder.kind == "layers"
    assert re.match(r"on these weights the flat decoder is \S+ from the layers", model.decoder_reason)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["auto", "bf16", "torch.bfloat16", "nn", 16, ["bfloat16"]])
def test_a_dtype_that_the_configuration_misspells_is_named(tmp_path: Path, key: str, value: object) -> None:
    changed: dict[str, Any] = {key: value}
    folder = saved(tmp_path, llama(), **changed)
    refused(folder, rf"config\.json has the {key} {re.escape(repr(value))}; write float32, float16 or bfloat16")


def test_a_dtype_of_the_configuration_decides_nothing(tmp_path: Path) -> None:
    for value in (None, "float32", "float16"):
        assert load(saved(tmp_path, llama(), torch_dtype=value, dtype=value)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", "two"),
        ("hidden_size", None),
        ("max_position_embeddings", "64"),
        ("rms_norm_eps", "small"),
        ("hidden_act", "nosuch"),
        ("rope_parameters", {"rope_type": "nosuch"}),
        ("model_type", "nosuch"),
        ("num_attention_heads", 0),
        ("quantization_config", 4),
    ],
)
def test_a_mistyped_configuration_is_refused_in_one_line(tmp_path: Path, key: str, value: object) -> None:
    changed: dict[str, Any] = {key: value}
    refused(saved(tmp_path, llama(), **changed), "cannot be loaded|quantization_config|does not run|does not know")


@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_that_pick_experts_stay_float32(tmp_path: Path, dtype: str) -> None:
    """MiniMax-M2's class does not say so itself; its biases lie closer together than bfloat16 can tell."""
    config = MiniMaxM2Config(**SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    bias = 6.9 + torch.arange(4) / 1000
    name = "e_score_correction_bias"

    def set_bias(tensors: Tensors) -> None:
        tensors.update({key: bias.clone() for key in tensors if key.endswith(name)})

    causal = load(saved(tmp_path, MiniMaxM2ForCausalLM(config).bfloat16(), set_bias), dtype).causal
    found = [tensor for key, tensor in causal.named_buffers() if key.endswith(name)]
    assert len(found) == 2
    assert all(torch.equal(tensor, bias) for tensor in found)
    assert PreTrainedModel._keep_in_fp32_modules_strict is None, "other models of this process are as they were"


def test_a_family_under_another_name_is_that_family(tmp_path: Path) -> None:
    """Kimi-K2 is DeepSeek-V3, and its configuration names code of its repository."""
    model = build("DeepseekV3ForCausalLM", **OTHERS["deepseek v3, dense first layer"][2])
    first = load(saved(tmp_path / "deepseek", model))
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    second = load(saved(tmp_path / "kimi", model, model_type="kimi_k2", auto_map=code))
    assert second.fingerprint == first.fingerprint
    found = []
    for each in (first, second):
        with block_run(each, SCHEMES["poc2"], block_hash="a", public_key="b", seq_len=8) as run:
            found.append(run.distances([0, 1], batch_size=2))
    assert found[0] == found[1]


def test_a_family_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, llama(), model_type="nosuch", auto_map={"AutoConfig": "configuration.Config"})
    said = refused(folder, "has the model_type 'nosuch', which transformers")
    assert "no code of a model's repository is run" in said


def test_a_table_of_whole_numbers_is_not_called_quantised(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.gate.tid2eid"] = torch.arange(40)

    refused(saved(tmp_path, llama(), change), "tid2eid.* whole numbers")
