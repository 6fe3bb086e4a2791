"""Small models of transformers' classes that have no plain decoder here, each with what is special about it."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from tests.support.family_models import BASE, FULL, WINDOW, WINDOWED, decoder_of, layers_of, rope

if TYPE_CHECKING:
    from tests.reference import plain


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
    kind = getattr(transformers, f"{form}TextConfig", None) or getattr(transformers, f"{form}Config")
    model = getattr(transformers, name)(kind(**entries))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


OWN: dict[str, Any] = dict.fromkeys(["rope_parameters", "num_key_value_heads"], ...)  # it has its own, or none
FALCON: dict[str, Any] = {"num_key_value_heads": ..., "new_decoder_architecture": False}
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


EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
GROUPED: dict[str, Any] = EXPERTS | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
YARN = rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=8)
LONGROPE: dict[str, Any] = {"original_max_position_embeddings": 8}
LONG = rope(rope_type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 4.0, 8.0])
KIMI: dict[str, Any] = MLA | {
    "n_group": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.827,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
MAMBA: dict[str, Any] = {
    "head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "num_experts": 2,
}
CONVOLVED: dict[str, Any] = {"layer_types": [FULL, "conv", FULL]}
STREAMS: dict[str, Any] = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 40,
    "num_kv_shared_layers": 0,
}
GEMMA4: dict[str, Any] = STREAMS | {
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": WINDOW,
    "layer_types": [WINDOWED, WINDOWED, FULL],
    "rope_parameters": {WINDOWED: rope(), FULL: rope()},
}
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
    "llama, linear rotary": ("LlamaForCausalLM", "mlp", {"rope_parameters": rope(rope_type="linear", factor=4.0)}),
    "llama, dynamic rotary": ("LlamaForCausalLM", "mlp", {"rope_parameters": rope(rope_type="dynamic", factor=4.0)}),
    "qwen 2, yarn beyond its first positions": ("Qwen2ForCausalLM", "mlp", {"rope_parameters": YARN}),
    "qwen 3, yarn beyond its first positions": ("Qwen3ForCausalLM", "mlp", {"rope_parameters": YARN, "head_dim": 8}),
    "phi 3, longrope beyond its first positions": ("Phi3ForCausalLM", "mlp", LONGROPE | {"rope_parameters": LONG}),
    "phi 3, longrope within its first positions": (
        "Phi3ForCausalLM",
        "mlp",
        LONGROPE | {"rope_parameters": LONG, "original_max_position_embeddings": 32},
    ),
    "minimax m2": ("MiniMaxM2ForCausalLM", "mlp", {"head_dim": 8, "rotary_dim": 4, **EXPERTS}),
    "deepseek v3, dense first layer": ("DeepseekV3ForCausalLM", "mlp", MLA),
    "glm 4.5, dense first layer": ("Glm4MoeForCausalLM", "mlp", GROUPED | {"use_qk_norm": True, "head_dim": 8}),
    "glm 4.7 flash": ("Glm4MoeLiteForCausalLM", "mlp", MLA),
    "dots 1": ("Dots1ForCausalLM", "mlp", GROUPED | {"head_dim": 8, "n_shared_experts": 1}),
    "qwen 2 moe, shared experts": (
        "Qwen2MoeForCausalLM",
        "mlp",
        EXPERTS | {"shared_expert_intermediate_size": 24},
    ),
    "olmoe": ("OlmoeForCausalLM", "mlp", EXPERTS),
    "phi moe": ("PhimoeForCausalLM", "mlp", EXPERTS),
    "ernie 4.5": ("Ernie4_5ForCausalLM", "mlp", {"head_dim": 8}),
    "ernie 4.5 moe": (
        "Ernie4_5_MoeForCausalLM",
        "mlp",
        EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", "mlp", {"head_dim": 8}),
    "hunyuan moe": ("HunYuanMoEV1ForCausalLM", "mlp", EXPERTS | {"head_dim": 8, "moe_topk": 2}),
    "ministral 3": (
        "Ministral3ForCausalLM",
        "mlp",
        {"head_dim": 8, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
    ),
    "exaone 4": (
        "Exaone4ForCausalLM",
        "post_feedforward_layernorm",
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": [WINDOWED, WINDOWED, FULL]},
    ),
    "smollm 3, layers without positions": ("SmolLM3ForCausalLM", "mlp", {"no_rope_layers": [1, 1, 0]}),
    "seed oss": ("SeedOssForCausalLM", "mlp", {"head_dim": 8, "attention_bias": True}),
    "apertus": ("ApertusForCausalLM", "mlp", {}),
    "arcee": ("ArceeForCausalLM", "mlp", {"head_dim": 8}),
    "cwm": (
        "CwmForCausalLM",
        "mlp",
        {"head_dim": 8, "bos_token_id": 0, "sliding_window": WINDOW, "layer_types": [WINDOWED, FULL, WINDOWED]},
    ),
    "helium": ("HeliumForCausalLM", "mlp", {"head_dim": 8}),
    "nemotron": ("NemotronForCausalLM", "mlp", {"head_dim": 8}),
    "qwen 3 next": ("Qwen3NextForCausalLM", "mlp", LINEAR | {"layer_types": ["linear_attention", FULL, FULL]}),
    "kimi linear": (
        "KimiLinearForCausalLM",
        "mlp",
        MLA | {"num_experts": 4, "linear_num_heads": 4, "linear_head_dim": 8},
    ),
    "falcon h1, mamba and attention in each layer": ("FalconH1ForCausalLM", "feed_forward", MAMBA),
    "jamba": ("JambaForCausalLM", "feed_forward", MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "bamba": ("BambaForCausalLM", "feed_forward", MAMBA | {"attn_layer_indices": [1]}),
    "lfm 2": ("Lfm2ForCausalLM", "feed_forward", CONVOLVED),
    "lfm 2 moe": ("Lfm2MoeForCausalLM", "feed_forward", CONVOLVED | EXPERTS | {"num_dense_layers": 1}),
    "nemotron h": ("NemotronHForCausalLM", "mixer", MAMBA),
    "minimax 01": ("MiniMaxForCausalLM", "mlp", {"head_dim": 8, "num_local_experts": 4}),
    "minimax m3": ("MiniMaxM3VLForCausalLM", "mlp", EXPERTS | {"head_dim": 8, "rotary_dim": 4}),
    "kimi k2": ("DeepseekV3ForCausalLM", "mlp", KIMI),
    "deepseek v2": ("DeepseekV2ForCausalLM", "mlp", MLA),
    "deepseek v3.2, sparse attention": ("DeepseekV32ForCausalLM", "mlp", SPARSE),
    "glm 5, sparse attention": ("GlmMoeDsaForCausalLM", "mlp", SPARSE),
    "deepseek v4, four streams": ("DeepseekV4ForCausalLM", "mlp", MLA),
    "longcat flash": ("LongcatFlashForCausalLM", "mlp", MLA | {"num_layers": 2, "zero_expert_num": 2, "head_dim": 4}),
    "qwen 3.5": ("Qwen3_5ForCausalLM", "mlp", LINEAR | {"layer_types": ["linear_attention", FULL, FULL]}),
    "qwen 3.5 moe": ("Qwen3_5MoeForCausalLM", "mlp", LINEAR | {"layer_types": ["linear_attention", FULL, FULL]}),
    "llama 4": ("Llama4ForCausalLM", "feed_forward", EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 48}),
    "gemma 3n, four streams": ("Gemma3nForCausalLM", "mlp", {"head_dim": 8} | STREAMS),
    "gemma 4": ("Gemma4ForCausalLM", "post_feedforward_layernorm", GEMMA4 | {"hidden_size_per_layer_input": 0}),
    "gemma 4, layers with embeddings of tokens": ("Gemma4ForCausalLM", "post_feedforward_layernorm", GEMMA4),
    "mistral 4": ("Mistral4ForCausalLM", "mlp", MLA | {"rope_parameters": ...}),
    "ministral": ("MinistralForCausalLM", "mlp", {"head_dim": 8, "sliding_window": WINDOW}),
    "mimo v2 flash": (
        "MiMoV2FlashForCausalLM",
        "mlp",
        GROUPED | {"head_dim": 8, "v_head_dim": 8, "rope_parameters": ...},
    ),
    "exaone moe": ("ExaoneMoeForCausalLM", "mlp", GROUPED | {"head_dim": 8, "sliding_window": WINDOW}),
    "solar open": ("SolarOpenForCausalLM", "mlp", GROUPED | {"head_dim": 8}),
    "afmoe": ("AfmoeForCausalLM", "post_mlp_layernorm", EXPERTS | {"head_dim": 8, "sliding_window": WINDOW}),
    "flex olmo": ("FlexOlmoForCausalLM", "post_feedforward_layernorm", EXPERTS),
    "cohere 2 moe": ("Cohere2MoeForCausalLM", "mlp", EXPERTS | {"head_dim": 8}),
    "hunyuan 3": ("HYV3ForCausalLM", "mlp", EXPERTS | {"head_dim": 8}),
    "youtu": ("YoutuForCausalLM", "mlp", MLA),
    "olmo": ("OlmoForCausalLM", "mlp", {}),
    "nanochat": ("NanoChatForCausalLM", "mlp", {"head_dim": 8}),
    "vaultgemma": ("VaultGemmaForCausalLM", "mlp", {"head_dim": 8, "sliding_window": WINDOW}),
    "bitnet": ("BitNetForCausalLM", "mlp", {}),
    "jetmoe": ("JetMoeForCausalLM", "mlp", EXPERTS | {"kv_channels": 8}),
    "granite 3, multiplied by 0.5": ("GraniteForCausalLM", "mlp", {"residual_multiplier": 0.5}),
    "granite 4": ("GraniteMoeHybridForCausalLM", "shared_mlp", MAMBA | {"residual_multiplier": 0.5}),
}
