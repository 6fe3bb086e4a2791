"""Classes of transformers that have no plain decoder here: each is refused by its name, or its distances are right."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pocd.compute.engine import block_run
from pocd.compute.model import adapt
from pocd.protocol.errors import ModelError
from pocd.protocol.schemes import SCHEMES
from tests.reference import plain
from tests.support.family_models import BASE, SEQ_LEN, WINDOW, decoder_of, layers_of


@dataclass(frozen=True)
class Hooked:
    """A decoder run by transformers itself; a layer's residual is what its output has besides the branch."""

    causal: Any
    branch: str

    def __call__(self, _weights: plain.Weights, x: plain.Array, step: plain.Step) -> plain.Array:
        branches: list[plain.Array] = []  # copied at once: Falcon goes on to change the tensor

        def catch(_module: object, _args: object, output: Any) -> None:  # noqa: ANN401 - tensor or tuple
            found = output[0] if isinstance(output, tuple) else output
            branches.append(found.detach().double().numpy().reshape(x.shape).copy())

        def replacing(layer: int) -> Any:  # noqa: ANN401 - a hook
            def replace(_module: object, _args: object, output: Any) -> Any:  # noqa: ANN401 - as above
                total = output[0] if isinstance(output, tuple) else output
                branch = branches.pop()
                changed = sum(step(layer, branch, total[0].double().numpy() - branch))
                new = torch.from_numpy(changed).float()[None]
                return (new, *output[1:]) if isinstance(output, tuple) else new

            return replace

        hooks = []
        for i, layer in enumerate(layers_of(self.causal)):
            hooks.append(layer.get_submodule(self.branch).register_forward_hook(catch))
            hooks.append(layer.register_forward_hook(replacing(i)))
        with torch.inference_mode():
            embeddings = torch.from_numpy(x).float()[None]
            states = decoder_of(self.causal)(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        found: plain.Array = states[0].double().numpy()
        return found


def build(name: str, **config: Any) -> Any:  # noqa: ANN401 - as in a configuration
    """Build a class that has no plain decoder here, from `BASE`, in evaluation mode."""
    form = re.sub("For.*|LMHead.*", "", name)
    entries = {key: deepcopy(value) for key, value in (BASE | config).items() if value is not ...}
    model = getattr(transformers, name)(getattr(transformers, f"{form}Config")(**entries))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


OWN: dict[str, Any] = dict.fromkeys(["rope_parameters", "num_key_value_heads"], ...)  # it has its own, or none
FALCON: dict[str, Any] = {"num_key_value_heads": ..., "new_decoder_architecture": False}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi": ("PhiForCausalLM", "mlp", {}),
    "gpt j": ("GPTJForCausalLM", "mlp", OWN | {"rotary_dim": 4, "n_positions": 64}),
    "cohere": ("CohereForCausalLM", "mlp", {}),
    "cohere 2": ("Cohere2ForCausalLM", "mlp", {"sliding_window": WINDOW}),
    "stablelm, parallel": ("StableLmForCausalLM", "mlp", {"use_parallel_residual": True}),
    "stablelm, sequential": ("StableLmForCausalLM", "mlp", {"use_parallel_residual": False}),
    "falcon, parallel": ("FalconForCausalLM", "mlp", FALCON | {"parallel_attn": True}),
    "falcon, sequential": ("FalconForCausalLM", "mlp", FALCON | {"parallel_attn": False, "alibi": True}),
    "starcoder 2": ("Starcoder2ForCausalLM", "mlp", {"sliding_window": WINDOW}),
    "olmo 3": ("Olmo3ForCausalLM", "post_feedforward_layernorm", {"sliding_window": WINDOW}),
    "glm 4": ("Glm4ForCausalLM", "post_mlp_layernorm", {"head_dim": 8}),
    "gpt oss": (
        "GptOssForCausalLM",
        "mlp",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "granite, multiplied by 1": ("GraniteForCausalLM", "mlp", {"embedding_multiplier": 3.0}),
    "bloom": ("BloomForCausalLM", "mlp.dense_4h_to_h", OWN),
    "opt": ("OPTForCausalLM", "fc2", OWN | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_classes_are_refused_by_name_or_right(case: str) -> None:
    name, branch, config = OTHERS[case]
    causal = build(name, **config)
    weights = {key: value.detach().double().numpy() for key, value in causal.named_parameters()}
    embedding = next(key for key, value in causal.named_parameters() if value is causal.get_input_embeddings().weight)
    decoder = plain.Decoder(weights, Hooked(causal, branch), embedding)
    expected = [
        plain.distance(decoder, block_hash="ABC", public_key="key", nonce=nonce, seq_len=SEQ_LEN) for nonce in (0, 9)
    ]
    try:
        model = adapt(causal, name="small")
    except ModelError as error:
        assert name in str(error)  # noqa: PT017 - refusing is one of two good ends
        return
    with block_run(model, SCHEMES["poc2"], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
        assert run.distances([0, 9], batch_size=2) == pytest.approx(expected, abs=2e-5)


MLA: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SPARSE: dict[str, Any] = MLA | {"index_topk": 5, "index_n_heads": 2, "index_head_dim": 8}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "head_dim": 8,
    "layer_types": ["full_attention", "full_attention", "linear_attention"],
}


@pytest.mark.parametrize(
    ("name", "config"),
    [("DeepseekV32ForCausalLM", SPARSE), ("GlmMoeDsaForCausalLM", SPARSE), ("Qwen3NextForCausalLM", LINEAR)],
)
def test_what_cannot_carry_one_position_carries_all(name: str, config: dict[str, Any]) -> None:
    """An index of keys wants a cache of its own, and a linear attention a state."""
    causal = build(name, **config)
    weights = {key: value.detach().double().numpy() for key, value in causal.named_parameters()}
    decoder = plain.Decoder(weights, Hooked(causal, "mlp"), "model.embed_tokens.weight")
    model = adapt(causal, name="small")
    assert model.by_layers.carries_all
    assert "all positions go through its last layer" in model.decoder_reason
    for scheme in ("poc2", "poc3"):
        expected = [
            plain.result(decoder, block_hash="ABC", public_key="key", nonce=nonce, seq_len=SEQ_LEN, scheme=scheme)
            for nonce in (0, 9)
        ]
        with block_run(model, SCHEMES[scheme], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
            assert run.values([0, 9], batch_size=2).numpy() == pytest.approx(np.array(expected), abs=2e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GraniteForCausalLM", {"residual_multiplier": 0.5}),  # residual + branch / 2
        ("MiniMaxForCausalLM", {"head_dim": 8, "num_local_experts": 4}),  # the residual is scaled, too
        ("MambaForCausalLM", {}),  # no attention, no MLP
        ("BertLMHeadModel", OWN | {"is_decoder": True}),  # the sum is normalised
        ("OPTForCausalLM", OWN | {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),  # likewise
        ("T5ForConditionalGeneration", OWN | {"d_model": 32, "d_kv": 8, "d_ff": 48}),  # it needs an encoder's input
    ],
)
def test_layers_that_do_not_end_in_residual_and_branch_are_refused_by_name(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=name):
        adapt(build(name, **config), name="small")
