"""The models that `bench.engine` and `bench.agreement` measure: the bundled ones, and shapes of larger ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from pocd.compute.model import adapt
from pocd.protocol.names import BUNDLED

if TYPE_CHECKING:
    from pocd.compute.model import Model

LARGE = ("qwen3-0.6b", "llama-1b")  # random weights of their shapes
NAMES = ("bundled:tiny-qwen3", "bundled:tiny-llama", *LARGE)


def random_model(family: str, **shape: Any) -> Any:  # noqa: ANN401 - what transformers takes and gives
    """Return a model of random weights, with a small vocabulary, which `poc2` does not use."""
    torch.manual_seed(0)
    small = {"vocab_size": 256, "tie_word_embeddings": True, "max_position_embeddings": 4096}
    config = getattr(transformers, f"{family}Config")(**small, **shape)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def rounded(causal: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - transformers gives its classes no common type
    """Round a model's weights, and nothing else: `to` would round the frequencies of its positions too."""
    for parameter in causal.parameters():
        parameter.data = parameter.data.to(dtype)
    return causal


def build(name: str, dtype: torch.dtype, device: torch.device) -> Model:
    """Make one of `NAMES`, on a device and in a precision."""
    if name == "qwen3-0.6b":
        causal = random_model(
            "Qwen3",
            num_hidden_layers=28,
            hidden_size=1024,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=3072,
        )
    elif name == "llama-1b":
        causal = random_model(
            "Llama",
            num_hidden_layers=16,
            hidden_size=2048,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            intermediate_size=8192,
        )
    else:
        causal = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED / name.removeprefix("bundled:"))
    return adapt(rounded(causal, dtype).to(device), name=name)
