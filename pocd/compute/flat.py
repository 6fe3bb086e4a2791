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


class Linears(NamedTuple):
    """Linear layers that have the same input.

    Attributes:
        parts: The layers.
        whole: All of them as one layer, which shares their memory; None where each is computed by itself.
    """

    parts: tuple[Linear, ...]
    whole: Linear | None


class Gated(NamedTuple):
    """The parameters of a gated MLP.

    Attributes:
        gate_up: The gate, and what it is multiplied with, each [I, H].
        down: The output [H, I].
    """

    gate_up: Linears
    down: Linear


class LayerWeights(NamedTuple):
    """A layer's parameters, which share memory with transformers' modules, so that drawn weights appear here.

    Attributes:
        input_norm: Gain of the norm before attention [H].
        attention: Queries [heads·head_dim, H], keys and values, each [kv_heads·head_dim, H].
        query_norm: Gain of the queries' norm [head_dim]; None where there is none.
        key_norm: Gain of the keys' norm [head_dim]; None where there is none.
        output: Attention's output [H, heads·head_dim].
        mlp_norm: Gain of the norm before the MLP [H].
        mlp: A gated MLP, or a mixture of such.
    """

    input_norm: torch.Tensor
    attention: Linears
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
        branch = functional.linear(_gate(h, weights.mlp.gate_up, form.activation), *weights.mlp.down)
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
    query, key, value = _project(h, weights.attention, form, first)
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


def _gate(h: torch.Tensor, gate_up: Linears, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the activated gate times what it is multiplied with [B, S, I]."""
    if gate_up.whole is None:  # one after the other: the memory of the first output serves the second
        gate, up = gate_up.parts
        return activation(functional.linear(h, *gate)).mul_(functional.linear(h, *up))
    left, right = functional.linear(h, *gate_up.whole).chunk(2, dim=-1)
    return activation(left).mul_(right)


def _project(h: torch.Tensor, attention: Linears, form: Form, first: int) -> list[torch.Tensor]:
    """Return queries from position `first` on, and keys and values of all, each [B, positions, heads, head_dim]."""
    heads = [form.heads, form.kv_heads, form.kv_heads]
    if attention.whole is not None and first == 0:
        return list(functional.linear(h, *attention.whole).unflatten(-1, (sum(heads), -1)).split(heads, dim=-2))
    # Contiguous: else it is a product for each nonce, which cuBLAS is free to sum in half precision.
    inputs = h[:, first:].contiguous(), h, h
    return [
        functional.linear(x, *part).unflatten(-1, (count, -1))
        for x, part, count in zip(inputs, attention.parts, heads, strict=True)
    ]


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
        and len({projection.bias is None for projection in linears[:3]}) == 1
        and all(type(linear) is nn.Linear for linear in linears)
        and all(type(weight) is nn.Parameter and weight.dtype == dtype for weight in weights)
    )


def flatten(decoder: Any, *, merge: bool) -> FlatDecoder:  # noqa: ANN401 - as above
    """Return a flat decoder over the weights of a transformers decoder whose model `can_flatten`.

    Args:
        decoder: The decoder.
        merge: Whether matrices of one input become one, in new memory, of which the modules' own weights are parts. It
            is slower on the CPU, where it would also end that a checkpoint is mapped.
    """
    config, first = decoder.config, decoder.layers[0]
    # Mistral and Mixtral keep their window in the configuration, the Qwens in each layer; Llama has none, whatever
    # its configuration says.
    common = config.sliding_window if config.model_type in ONE_WINDOW else None
    return FlatDecoder(
        layers=[_weights(layer, merge=merge) for layer in decoder.layers],
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


def _weights(layer: Any, *, merge: bool) -> LayerWeights:  # noqa: ANN401 - as above
    attention, mlp = layer.self_attn, layer.mlp

    def gain(module: Any) -> torch.Tensor | None:  # noqa: ANN401 - as above
        return None if module is None else module.weight.detach()

    def linears(*modules: nn.Linear) -> Linears:
        whole = _merged(modules) if merge else None  # first, as it moves the parts
        return Linears(tuple(map(_linear, modules)), whole)

    weights = LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),
        attention=linears(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=gain(getattr(attention, "q_norm", None)),
        key_norm=gain(getattr(attention, "k_norm", None)),
        output=_linear(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        mlp=(
            mixture_of(mlp)
            if hasattr(mlp, "experts")
            else Gated(linears(mlp.gate_proj, mlp.up_proj), _linear(mlp.down_proj))
        ),
    )
    torch.cuda.empty_cache()  # else what the parts had is kept, of all layers; does nothing without a GPU
    return weights


def _linear(module: nn.Linear) -> Linear:
    return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _merged(modules: Sequence[nn.Linear]) -> Linear:
    """Return linear layers of one input as one layer."""
    biases = [module.bias for module in modules if module.bias is not None]
    return Linear(_joined([module.weight for module in modules]), _joined(biases) if biases else None)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Move tensors below one another, unless they are; each then is a part of what is returned."""
    first, memory = parts[0].detach(), parts[0].untyped_storage()
    places = [part.data_ptr() for part in parts]
    ends = [part.data_ptr() + part.nbytes for part in parts]
    is_joined = places[1:] == ends[:-1] and ends[-1] <= memory.data_ptr() + memory.nbytes()
    if is_joined and all(part.is_contiguous() for part in parts):
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    with torch.inference_mode(mode=False), torch.no_grad():  # weights may be drawn in place, which inference forbids
        whole = torch.cat([part.detach() for part in parts])
        for part, own in zip(parts, whole.split(list(map(len, parts))), strict=True):
            part.data = own
    return whole


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask of a sliding window, bool [S, S], True where a query sees a key; None if it hides no key."""
    if window is None or window >= length:
        return None
    ago = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return (ago >= 0) & (ago < window)
