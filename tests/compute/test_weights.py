"""Weights drawn per block hash: what is drawn, and that nothing is left of it."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pocd.compute.engine import block_run
from pocd.compute.flat import Gated, flatten
from pocd.compute.model import Model, adapt, load_model
from pocd.compute.weights import drawn_weights
from pocd.protocol.names import BUNDLED, DTYPES
from pocd.protocol.schemes import SCHEMES
from tests.reference import plain
from tests.support.family_models import FAMILIES

if TYPE_CHECKING:
    from pocd.protocol.schemes import WeightSource

BLOCK = "block_alpha"
ROUNDING = 0.02 * plain.NORMAL_ROUNDING
DRAWING: list[WeightSource] = ["drawn", "embedding drawn"]


def untied() -> Model:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
    )
    return adapt(LlamaForCausalLM(config), name="untied")


def bits(model: Model) -> dict[str, bytes]:
    """Every tensor of a model, byte by byte; tied ones under both their names."""
    return {
        name: bytes(tensor.view(-1).view(torch.uint8).tolist()) for name, tensor in model.causal.state_dict().items()
    }


def drawn(name: str, shape: torch.Size) -> torch.Tensor:
    numbers = plain.normal(plain.seed32(f"{BLOCK}_{name}"), shape.numel())
    return 0.02 * torch.from_numpy(numbers).view(shape)


@pytest.mark.parametrize("weights", DRAWING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_back_bit_for_bit_and_the_file_is_not_touched(dtype: str, weights: WeightSource) -> None:
    file = BUNDLED / "tiny-qwen3" / "model.safetensors"
    digest = sha256(file.read_bytes()).digest()
    model = load_model("bundled:tiny-qwen3", dtype=dtype, device="cpu")
    model.causal.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan  # also what equals nothing
    before, places = bits(model), {name: tensor.data_ptr() for name, tensor in model.causal.state_dict().items()}
    with drawn_weights(model.causal, weights, BLOCK):
        inside = bits(model)
        assert inside["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]
        # In place: what computes with these tensors sees the drawn ones.
        assert model.causal.model.embed_tokens.weight.data_ptr() == places["model.embed_tokens.weight"]
    assert bits(model) == before
    assert {name: tensor.data_ptr() for name, tensor in model.causal.state_dict().items()} == places
    assert model.causal.lm_head.weight is model.causal.model.embed_tokens.weight, "tied again"
    assert sha256(file.read_bytes()).digest() == digest


@pytest.mark.parametrize("weights", DRAWING)
def test_weights_come_back_after_a_failure_inside(weights: WeightSource) -> None:
    model = untied()
    before = bits(model)
    with pytest.raises(KeyError), drawn_weights(model.causal, weights, BLOCK):
        raise KeyError
    assert bits(model) == before


def test_every_parameter_is_drawn_by_its_name_and_norm_weights_are_one() -> None:
    model = load_model("bundled:tiny-qwen3", dtype="float32", device="cpu")
    with drawn_weights(model.causal, "drawn", BLOCK):
        for name, parameter in model.causal.named_parameters():
            expected = torch.ones_like(parameter) if "norm" in name else drawn(name, parameter.shape)
            assert torch.allclose(parameter, expected, atol=ROUNDING), name
        assert model.causal.lm_head.weight is model.causal.model.embed_tokens.weight, "equal, so still tied"


def test_biases_and_biases_of_norms_are_drawn() -> None:
    torch.manual_seed(2)
    model = adapt(GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2)), name="x")
    with drawn_weights(model.causal, "drawn", BLOCK):
        for name, parameter in model.causal.named_parameters():
            is_gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
            expected = torch.ones_like(parameter) if is_gain else drawn(name, parameter.shape)
            assert torch.allclose(parameter, expected, atol=ROUNDING), name


def test_a_drawn_embedding_leaves_all_else_and_unties_the_head() -> None:
    model = load_model("bundled:tiny-llama", dtype="float32", device="cpu")
    before = bits(model)
    with drawn_weights(model.causal, "embedding drawn", BLOCK):
        inside = bits(model)
        name = "model.embed_tokens.weight"
        embedding = model.causal.model.embed_tokens.weight
        assert torch.allclose(embedding, drawn(name, embedding.shape), atol=ROUNDING)
        assert inside == before | {name: inside[name]}, "lm_head keeps the trained values while they differ"


def test_the_head_of_random_embed_is_the_drawn_embedding_also_in_an_untied_model() -> None:
    model = untied()
    with block_run(model, SCHEMES["random-embed"], block_hash=BLOCK, public_key="k", seq_len=4) as run:
        assert run.head is not None
        assert torch.allclose(run.head, drawn("model.embed_tokens.weight", run.head.shape), atol=ROUNDING)
    with block_run(model, SCHEMES["random-weights"], block_hash=BLOCK, public_key="k", seq_len=4) as run:
        assert run.head is not None
        assert torch.allclose(run.head, drawn("lm_head.weight", run.head.shape), atol=ROUNDING)
    with block_run(model, SCHEMES["trained"], block_hash=BLOCK, public_key="k", seq_len=4) as run:
        assert run.head is model.causal.lm_head.weight


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_round_leaves_the_bare_model_behind(scheme: str) -> None:
    model = load_model("bundled:tiny-qwen3", dtype="bfloat16", device="cpu")
    before, bare = bits(model), bare_outputs(model)
    with block_run(model, SCHEMES[scheme], block_hash=BLOCK, public_key="k", seq_len=8) as run:
        run.values([0, 1], batch_size=2)
    assert bits(model) == before
    assert torch.equal(bare_outputs(model), bare)
    for module in model.causal.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def bare_outputs(model: Model) -> torch.Tensor:
    inputs = torch.linspace(-1, 1, 2 * 5 * model.hidden_size).view(2, 5, model.hidden_size)
    with torch.inference_mode():
        decoder: Any = model.causal.get_decoder()
        states: torch.Tensor = decoder(inputs_embeds=inputs.to(model.dtype), use_cache=False).last_hidden_state
    return states


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_matrices_of_one_input_become_one_in_memory_that_is_not_doubled(family: str) -> None:
    """As on a GPU."""
    causal = FAMILIES[family].build()
    model = adapt(causal, name=family)
    before = {name: weight.clone() for name, weight in causal.named_parameters()}
    with torch.inference_mode():  # as a model is loaded; its weights can be drawn all the same
        decoders = [flatten(causal.model, merge=True) for _ in range(2)]
    assert all(torch.equal(weight, before[name]) for name, weight in causal.named_parameters())
    memory = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in causal.parameters()}
    assert sum(memory.values()) == sum(weight.nbytes for weight in causal.parameters())
    for first, second in zip(*(decoder.layers for decoder in decoders), strict=True):
        pairs = [(first.attention, second.attention)]
        if isinstance(first.mlp, Gated) and isinstance(second.mlp, Gated):
            pairs.append((first.mlp.gate_up, second.mlp.gate_up))
        for merged, again in pairs:
            assert merged.whole is not None
            assert again.whole is not None
            assert merged.whole.weight.data_ptr() == again.whole.weight.data_ptr(), "nothing is moved again"
            with drawn_weights(causal, "drawn", BLOCK):
                assert torch.equal(merged.whole.weight, torch.cat([part.weight for part in merged.parts]))
                assert merged.whole.weight.std() < 0.03, "these are the drawn ones"
    found = []
    for decoder in (decoders[0], model.by_layers):
        with block_run(
            replace(model, decoder=decoder), SCHEMES["random-weights"], block_hash=BLOCK, public_key="k", seq_len=6
        ) as run:
            found.append(run.distances(range(4), batch_size=4))
    assert found[0] == pytest.approx(found[1], abs=2e-5)
