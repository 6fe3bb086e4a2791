"""Small random models of transformers' families with all that is special about each, and their plain decoders."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from tests.reference import plain
from tests.reference import plain_families as pf

SEQ_LEN = 13
WINDOW = 5  # of attention where it slides; shorter than the sequence
EPS = 0.01  # large, so that it matters
WINDOWED, FULL = "sliding_attention", "full_attention"


def rope(theta: float = 10_000.0, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - as in a configuration
    return {"rope_type": "default", "rope_theta": theta, **more}


BASE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": EPS,
    "rope_parameters": rope(),
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def angles(theta: float = 10_000.0, size: int = 8) -> list[plain.Array]:
    return [pf.frequencies(theta, size)] * 3


@dataclass(frozen=True)
class Family:
    """A transformers class, a configuration, and the plain decoder that should give the same.

    Attributes:
        form: The class without `Config` and `ForCausalLM`.
        config: What differs from `BASE`; `...` leaves an entry out.
        run: The plain decoder.
        branch: The submodule of a layer that gives the branch.
        embedding: The parameter that holds the input embedding.
    """

    form: str
    config: dict[str, Any]
    run: Any
    branch: str = "mlp"
    embedding: str = "model.embed_tokens.weight"

    def build(self) -> Any:  # noqa: ANN401 - transformers gives its classes no common type
        """Build the model in training mode, as transformers does; every parameter is random, norms' too."""
        # Copied, as configurations write into what they are given.
        entries = {key: deepcopy(value) for key, value in (BASE | self.config).items() if value is not ...}
        form = self.form.removesuffix("Text")
        config = getattr(transformers, f"{self.form}Config")(**entries)
        name = f"{form}LMHeadModel" if form == "GPT2" else f"{form}ForCausalLM"
        model = getattr(transformers, name)(config)
        generator = torch.Generator().manual_seed(1)
        for key, parameter in model.named_parameters():
            around = 1.0 if plain.NORM_WEIGHT.search(key) else 0.0
            parameter.data.copy_(around + 0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    def plain(self, model: torch.nn.Module) -> plain.Decoder:
        weights = {key: value.detach().double().numpy() for key, value in model.named_parameters()}
        return plain.Decoder(weights, self.run, self.embedding)


def neox(*, parallel: bool) -> Family:
    config = {
        "use_parallel_residual": parallel,
        "rope_parameters": rope(partial_rotary_factor=0.5),
        "layer_norm_eps": EPS,
        "rms_norm_eps": ...,
        "num_key_value_heads": ...,
    }
    return Family("GPTNeoX", config, pf.GptNeoX(parallel=parallel), embedding="gpt_neox.embed_in.weight")


def qwen3_moe(*, shares_sum_to_one: bool, **config: Any) -> Family:  # noqa: ANN401 - as in a configuration
    common = {
        "head_dim": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": shares_sum_to_one,
    }
    attention = pf.Attention(angles(size=12), head_dim=12)
    experts = pf.Experts(top=2, shares_sum_to_one=shares_sum_to_one)
    return Family("Qwen3Moe", common | config, pf.RmsDecoder(attention, experts))


FAMILIES = {
    "llama": Family(
        "Llama",
        {
            "head_dim": 12,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": rope(500.0),
            "sliding_window": WINDOW,  # as left over in some checkpoints; Llama's attention knows no window
        },
        pf.RmsDecoder(pf.Attention(angles(500, 12), head_dim=12)),
    ),
    "llama 3, stretched rotary": Family(
        "Llama",
        {
            "rope_parameters": rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            )
        },
        pf.RmsDecoder(pf.Attention([pf.stretched(pf.frequencies(10_000, 8), factor=8, low=1, high=4, trained=32)] * 3)),
    ),
    "mistral": Family(
        "Mistral", {"sliding_window": WINDOW}, pf.RmsDecoder(pf.Attention(angles(), windows=[WINDOW] * 3))
    ),
    "mixtral": Family(
        "Mixtral",
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        pf.RmsDecoder(pf.Attention(angles(), windows=[WINDOW] * 3), pf.Experts(top=2, shares_sum_to_one=True)),
    ),
    "qwen2": Family(
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        pf.RmsDecoder(pf.Attention(angles(), windows=[None, WINDOW, WINDOW])),
    ),
    "qwen3": Family(
        "Qwen3",
        {
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": [WINDOWED, FULL, WINDOWED],
        },
        pf.RmsDecoder(pf.Attention(angles(size=12), head_dim=12, windows=[WINDOW, None, WINDOW])),
    ),
    "qwen3 moe": qwen3_moe(shares_sum_to_one=False, mlp_only_layers=[1]),
    "qwen3 moe, shares sum to one": qwen3_moe(shares_sum_to_one=True, decoder_sparse_step=2),
    "gemma": Family(
        "Gemma",
        {"head_dim": 12},
        pf.RmsDecoder(pf.Attention(angles(size=12), head_dim=12), pf.gelu_gated_mlp, zero_centred=True),
    ),
    "gemma 2": Family(
        "Gemma2",
        {
            "head_dim": 12,
            "attention_bias": True,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        pf.RmsDecoder(
            pf.Attention(angles(size=12), head_dim=12, scale=24**-0.5, windows=[WINDOW, None, WINDOW], cap=2.0),
            pf.gelu_gated_mlp,
            norms="both",
            zero_centred=True,
        ),
        branch="post_feedforward_layernorm",
    ),
    "gemma 3": Family(
        "Gemma3Text",
        {
            "head_dim": 12,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "layer_types": [WINDOWED, FULL, WINDOWED],
            "rope_parameters": {WINDOWED: rope(100.0), FULL: rope(1e6, rope_type="linear", factor=8.0)},
        },
        pf.RmsDecoder(
            pf.Attention(
                [pf.frequencies(100, 12), pf.frequencies(1e6, 12) / 8, pf.frequencies(100, 12)],
                head_dim=12,
                scale=24**-0.5,
                windows=[WINDOW, None, WINDOW],
                zero_centred=True,
            ),
            pf.gelu_gated_mlp,
            norms="both",
            zero_centred=True,
        ),
        branch="post_feedforward_layernorm",
    ),
    "phi 3": Family(
        "Phi3",
        {"sliding_window": WINDOW, "rope_parameters": rope(partial_rotary_factor=0.5), "resid_pdrop": 0.1},
        pf.RmsDecoder(pf.Attention(angles(size=4), windows=[WINDOW] * 3)),
    ),
    "olmo 2": Family(
        "Olmo2",
        {"attention_bias": True},
        pf.RmsDecoder(pf.Attention(angles()), norms="after"),
        branch="post_feedforward_layernorm",
    ),
    "gpt 2": Family(
        "GPT2",
        {
            "n_inner": 48,
            "layer_norm_epsilon": EPS,
            "scale_attn_by_inverse_layer_idx": True,
            "rms_norm_eps": ...,
            "num_key_value_heads": ...,
            "intermediate_size": ...,
        },
        pf.Gpt2(),
        embedding="transformer.wte.weight",
    ),
    "gpt neox, parallel": neox(parallel=True),
    "gpt neox, sequential": neox(parallel=False),
}


def decoder_of(model: Any) -> Any:  # noqa: ANN401 - transformers gives its classes no common type
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "h") or hasattr(decoder, "layers") else decoder.model


def layers_of(model: Any) -> Any:  # noqa: ANN401 - as above
    decoder = decoder_of(model)
    return decoder.h if hasattr(decoder, "h") else decoder.layers
