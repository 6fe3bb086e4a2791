"""A decoder of the Llama form as one flat function over the loaded weights.

It computes what transformers' layers compute and leaves out what is never used: masks that are
plain causal, copies of grouped keys, and, where only the last position is wanted, all others after
the last layer's keys and values. A layer is a pure function of tensors, so that what is compiled
for one layer serves all of them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pocd.compute.experts import Mixture, can_mix, mix, mixture_of
from pocd.compute.layers import one_query

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pocd.compute.transforms import Join

    Layer = Callable[..., torch.Tensor]

# Classes whose layer is: residual + self_attn(input_layernorm(residual)), then residual +
# mlp(post_attention_layernorm(residual)), with RMS norms, rotary positions, and a gated MLP or a mixture of such.
FLAT_CLASSES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
ONE_WINDOW = ("mistral", "mixtral")  # model types whose configuration has the window of all layers


class Linear(NamedTuple):
    """A linear layer: a matrix [out, in] and a bias [out], or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Gated(NamedTuple):
    """The parameters of a gated MLP."""

    gate: Linear
    up: Linear
    down: Linear


class LayerWeights(NamedTuple):
    """A layer's parameters, which share memory with transformers' modules, so that drawn weights appear here."""

    input_norm: torch.Tensor
    query: Linear
    key: Linear
    value: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor
    mlp: Gated | Mixture


@dataclass(frozen=True, slots=True)
class Form:
    """The shape and functions that all layers of a model share.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        scale: Factor of the attention scores.
        epsilon: Epsilon of all RMS norms.
        activation: Activation function of every MLP's gate.
    """

    heads: int
    kv_heads: int
    scale: float
    epsilon: float
    activation: Callable[[torch.Tensor], torch.Tensor]


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return functional.rms_norm(x, weight.shape, weight, epsilon)
    # torch's own is one kernel on GPUs, but six passes over the data on the CPU.
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1]
    normed: torch.Tensor = x * mean_square.add_(epsilon).rsqrt_()
    return normed.mul_(weight)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding to [B, S, heads, head_dim]: rotate the halves of each head against each other."""
    turned, half = x * cos, x.shape[-1] // 2
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def run_layer(
    stream: torch.Tensor,
    weights: LayerWeights,
    turn: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    vector: torch.Tensor,
    *,
    form: Form,
    join: Join,
    first: int,
) -> torch.Tensor:
    """Run one layer with its transform, from position `first` on: [B, S, H] in, [B, S - first, H] out.

    Args:
        stream: Input hidden states [B, S, H].
        weights: Parameters of the layer.
        turn: Cosines and sines of the positions [1, S, 1, head_dim].
        mask: True where a query sees a key, bool [S, S]; None for plain causal attention.
        vector: Unit vector of the layer [H].
        form: Shape and functions of the model's layers.
        join: Computes the output from branch, residual and vector.
        first: First position of the output; earlier positions have keys and values only.
    """
    residual = _attend(stream, weights, turn, mask, form=form, first=first)
    h = _norm(residual, weights.mlp_norm, form.epsilon)
    if isinstance(weights.mlp, Mixture):
        branch = mix(h, weights.mlp, form.activation)
    else:
        gate = form.activation(functional.linear(h, *weights.mlp.gate))
        branch = functional.linear(gate.mul_(functional.linear(h, *weights.mlp.up)), *weights.mlp.down)
    return join(branch, residual, vector)


def _attend(
    stream: torch.Tensor,
    weights: LayerWeights,
    turn: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    *,
    form: Form,
    first: int,
) -> torch.Tensor:
    """Return the stream after attention, from position `first` on [B, S - first, H]."""
    cos, sin = turn
    h = _norm(stream, weights.input_norm, form.epsilon)
    query = functional.linear(h[:, first:], *weights.query).unflatten(-1, (form.heads, -1))
    key = functional.linear(h, *weights.key).unflatten(-1, (form.kv_heads, -1))
    value = functional.linear(h, *weights.value).unflatten(-1, (form.kv_heads, -1))
    if weights.query_norm is not None and weights.key_norm is not None:
        query = _norm(query, weights.query_norm, form.epsilon)
        key = _norm(key, weights.key_norm, form.epsilon)
    is_one_on_cpu = first > 0 and stream.device.type == "cpu"
    with one_query() if is_one_on_cpu else nullcontext():
        mixed = functional.scaled_dot_product_attention(
            _rotate(query, cos[:, first:], sin[:, first:]).transpose(1, 2),
            _rotate(key, cos, sin).transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None if mask is None else mask[first:],
            is_causal=mask is None and first == 0,
            scale=form.scale,
            enable_gqa=form.heads != form.kv_heads,
        )
    return functional.linear(mixed.transpose(1, 2).flatten(2), *weights.output).add_(stream[:, first:])


@dataclass(frozen=True, slots=True)
class FlatDecoder:
    """Runs a decoder of the Llama form without transformers' layers; called as `LayerDecoder` is.

    Attributes:
        layers: Parameters of each layer.
        windows: Sliding window of each layer in positions; None for all.
        norm: Weight of the final norm [H].
        rotary: transformers' module for cosines and sines.
        form: Shape and functions that the layers share.
        layer: Function that runs one layer: `run_layer`, or `run_layer` compiled.
        rotations: What `rotate` returns for the only sequence length that is run; None: each call asks it.
    """

    layers: Sequence[LayerWeights]
    windows: Sequence[int | None]
    norm: torch.Tensor
    rotary: Any
    form: Form
    layer: Layer = run_layer
    rotations: tuple[torch.Tensor, torch.Tensor] | None = None
    kind = "flat"

    def __call__(
        self, embeddings: torch.Tensor, join: Join, vectors: torch.Tensor, *, all_positions: bool = False
    ) -> torch.Tensor:
        """Return the last position's hidden state after the final norm [B, H], or all [B, S, H]; see `LayerDecoder`."""
        stream, length = embeddings, embeddings.shape[1]
        turn = self.rotations or self.rotate(embeddings)
        for index, (weights, window) in enumerate(zip(self.layers, self.windows, strict=True)):
            is_last = index == len(self.layers) - 1
            stream = self.layer(
                stream,
                weights,
                turn,
                _window_mask(length, window, embeddings.device),
                vectors[index],
                form=self.form,
                join=join,
                first=length - 1 if is_last and not all_positions else 0,  # the others are not used any more
            )
        return _norm(stream if all_positions else stream[:, -1], self.norm, self.form.epsilon)

    def rotate(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of the positions [1, S, 1, head_dim], in the model's dtype."""
        positions = torch.arange(embeddings.shape[1], device=embeddings.device).unsqueeze(0)
        cos, sin = self.rotary(embeddings, positions)
        return cos.unsqueeze(2), sin.unsqueeze(2)


def can_flatten(causal: Any) -> bool:  # noqa: ANN401 - transformers gives its classes no common type
    """Tell whether a model is of one of `FLAT_CLASSES`, with matrices of torch's own, not packed and not adapted.

    Its mixtures of experts have to be of a kind that is computed here, on its device and in its dtype.
    """
    if type(causal).__name__ not in FLAT_CLASSES:
        return False
    decoder = causal.get_decoder()
    return all(_is_plain(layer, decoder.norm.weight.dtype) for layer in decoder.layers)


def _is_plain(layer: Any, dtype: torch.dtype) -> bool:  # noqa: ANN401 - as above
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    if hasattr(mlp, "experts"):
        weights = [mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj]
        is_known = can_mix(mlp)
    else:
        weights, is_known = [], True
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    weights += [linear.weight for linear in linears]
    return (
        is_known
        and all(type(linear) is nn.Linear for linear in linears)
        and all(type(weight) is nn.Parameter and weight.dtype == dtype for weight in weights)
    )


def flatten(decoder: Any) -> FlatDecoder:  # noqa: ANN401 - as above
    """Return a flat decoder over the weights of a transformers decoder whose model `can_flatten`."""
    config, first = decoder.config, decoder.layers[0]
    # Mistral and Mixtral keep their window in the configuration, the Qwens in each layer; Llama has none, whatever
    # its configuration says.
    common = config.sliding_window if config.model_type in ONE_WINDOW else None
    return FlatDecoder(
        layers=[_weights(layer) for layer in decoder.layers],
        windows=[getattr(layer.self_attn, "sliding_window", common) for layer in decoder.layers],
        norm=decoder.norm.weight.detach(),
        rotary=decoder.rotary_emb,
        form=Form(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            scale=first.self_attn.scaling,
            epsilon=config.rms_norm_eps,
            activation=getattr(first.mlp, "experts", first.mlp).act_fn,
        ),
    )


def _weights(layer: Any) -> LayerWeights:  # noqa: ANN401 - as above
    attention, mlp = layer.self_attn, layer.mlp

    def linear(module: Any) -> Linear:  # noqa: ANN401 - as above
        return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())

    def gain(module: Any) -> torch.Tensor | None:  # noqa: ANN401 - as above
        return None if module is None else module.weight.detach()

    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),
        query=linear(attention.q_proj),
        key=linear(attention.k_proj),
        value=linear(attention.v_proj),
        query_norm=gain(getattr(attention, "q_norm", None)),
        key_norm=gain(getattr(attention, "k_norm", None)),
        output=linear(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        mlp=(
            mixture_of(mlp)
            if hasattr(mlp, "experts")
            else Gated(linear(mlp.gate_proj), linear(mlp.up_proj), linear(mlp.down_proj))
        ),
    )


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask of a sliding window, bool [S, S], True where a query sees a key; None if it hides no key."""
    if window is None or window >= length:
        return None
    ago = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return (ago >= 0) & (ago < window)
