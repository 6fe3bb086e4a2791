"""The models that the benchmarks measure or predict: the bundled ones, and shapes of larger ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from pocd.compute.model import adapt
from pocd.protocol.names import BUNDLED

if TYPE_CHECKING:
    from pocd.compute.model import Model

# Random weights are all that is had of them.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": (
        "Qwen3",
        {
            "num_hidden_layers": 28,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
        },
    ),
    "llama-1b": (
        "Llama",
        {
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
        },
    ),
    "llama-8b": (
        "Llama",
        {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14336,
        },
    ),
    "qwen3-32b": (
        "Qwen3",
        {
            "num_hidden_layers": 64,
            "hidden_size": 5120,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 25600,
        },
    ),
    "qwen3-30b-a3b": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 48,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
    ),
}
LARGE = tuple(SHAPES)
MADE_ON_HOST = ("qwen3-0.6b", "llama-1b")  # the same weights for every device; the others would take minutes there
NAMES = ("bundled:tiny-qwen3", "bundled:tiny-llama", *LARGE)


def config_of(family: str, shape: dict[str, Any]) -> Any:  # noqa: ANN401 - what transformers gives
    """Return a configuration with a small vocabulary, which `poc2` does not use."""
    small = {"vocab_size": 256, "tie_word_embeddings": True, "max_position_embeddings": 4096}
    return getattr(transformers, f"{family}Config")(**small | shape)


def random_model(family: str, **shape: Any) -> Any:  # noqa: ANN401 - what transformers takes and gives
    """Return a model of random weights in float32, on the CPU."""
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config_of(family, shape))


def made_on(device: str, dtype: torch.dtype, family: str, shape: dict[str, Any]) -> Any:  # noqa: ANN401 - as above
    """Return a model of random weights that is made on a device and in a precision, with no other memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return random_model(family, **shape)
    finally:
        torch.set_default_dtype(before)


def rounded(causal: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - transformers gives its classes no common type
    """Round a model's weights, and nothing else: `to` would round the frequencies of its positions too."""
    for parameter in causal.parameters():
        parameter.data = parameter.data.to(dtype)
    return causal


def build(name: str, dtype: torch.dtype, device: torch.device) -> Model:
    """Make one of `NAMES`, on a device and in a precision."""
    if name not in SHAPES:
        causal = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED / name.removeprefix("bundled:"))
    elif name in MADE_ON_HOST:
        family, shape = SHAPES[name]
        causal = random_model(family, **shape)
    else:
        return adapt(made_on(str(device), dtype, *SHAPES[name]), name=name, fingerprint=name)
    return adapt(rounded(causal, dtype).to(device), name=name)
