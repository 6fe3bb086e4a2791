"""The models of tests/data/poc2.json and poc3.json: random weights by a formula, so that anyone can build them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pocd.compute.random import normal, seeds_tensor
from tests.reference import plain
from tests.reference import plain_families as pf

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMS: dict[str, tuple[Any, Any]] = {
    "Qwen3ForCausalLM": (Qwen3Config, Qwen3ForCausalLM),
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
}


def build(entry: dict[str, Any]) -> PreTrainedModel:
    """Build one entry's model: matrices 0.02 * normal(seed32("{label}_{name}")), norm weights 1."""
    config_class, model_class = FORMS[entry["architecture"]]
    model: PreTrainedModel = model_class(config_class(vocab_size=256, **entry["config"]))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
        else:
            seed = seeds_tensor([f"{entry['weights_label']}_{name}"])[0]
            parameter.data.copy_(0.02 * normal(seed, parameter.numel()).view_as(parameter))
    model.eval()
    return model


def plainly(entry: dict[str, Any], model: PreTrainedModel) -> plain.Decoder:
    """The plain decoder of the same weights."""
    config = entry["config"]
    layers, head_dim, eps = config["num_hidden_layers"], config["head_dim"], config["rms_norm_eps"]
    attention = pf.Attention(
        angles=[pf.frequencies(config["rope_theta"], head_dim)] * layers,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        windows=[None] * layers,
        eps=eps,
    )
    weights = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    return plain.Decoder(weights, pf.RmsDecoder(attention, eps=eps, layers=layers))
