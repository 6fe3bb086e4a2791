"""A decoder of the Llama form as one flat function over the loaded weights.

It computes what transformers' layers compute and leaves out what is never used: masks that are
plain causal, copies of grouped keys, and, where only the last position is wanted, all others after
the last layer's keys and values. As it has no hooks it can be compiled whole.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from pocd.compute.layers import one_query

if TYPE_CHECKING:
    from pocd.compute.transforms import Join

# Classes whose layer is: residual + self_attn(input_layernorm(residual)), then residual +
# mlp(post_attention_layernorm(residual)), with RMS norms, rotary positions and a gated MLP.
FLAT_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def _norm(x: torch.Tensor, norm: Any) -> torch.Tensor:  # noqa: ANN401 - each family has its own RMSNorm class
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    # torch's own is one kernel on GPUs, but six passes over the data on the CPU.
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1]
    normed: torch.Tensor = x * mean_square.add_(norm.variance_epsilon).rsqrt_()
    return normed.mul_(norm.weight)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn [B, S, heads, head_dim] by its positions: the halves of each head against each other."""
    turned, half = x * cos, x.shape[-1] // 2
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


class FlatDecoder:
    """Runs a decoder of the Llama form without transformers' layers; called as `LayerDecoder` is."""

    kind = "flat"

    def __init__(self, decoder: Any) -> None:  # noqa: ANN401 - transformers gives its classes no common type
        config = decoder.config
        self._decoder = decoder
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        # Mistral keeps its window in the configuration, the Qwens in each layer; Llama has none, whatever its
        # configuration says.
        common = config.sliding_window if config.model_type == "mistral" else None
        self._windows = [getattr(layer.self_attn, "sliding_window", common) for layer in decoder.layers]

    def __call__(
        self, embeddings: torch.Tensor, join: Join, vectors: torch.Tensor, *, all_positions: bool = False
    ) -> torch.Tensor:
        """Return the last position's hidden state after the final norm [B, H], or all [B, S, H]; see `LayerDecoder`."""
        stream, length = embeddings, embeddings.shape[1]
        turn = self._rotations(embeddings)
        layers = self._decoder.layers
        for index, layer in enumerate(layers):
            is_last = index == len(layers) - 1
            first = length - 1 if is_last and not all_positions else 0  # positions before it are not used any more
            mask = _window_mask(length, self._windows[index], embeddings.device)
            with one_query() if first else nullcontext():
                residual = self._attend(layer, stream, first, turn, mask)
            branch = _mlp(layer.mlp, _norm(residual, layer.post_attention_layernorm))
            stream = join(branch, residual, vectors[index])
        return _norm(stream if all_positions else stream[:, -1], self._decoder.norm)

    def _rotations(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions [1, S, 1, head_dim], in the model's dtype."""
        positions = torch.arange(embeddings.shape[1], device=embeddings.device).unsqueeze(0)
        cos, sin = self._decoder.rotary_emb(embeddings, positions)
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def _attend(
        self,
        layer: Any,  # noqa: ANN401 - as above
        stream: torch.Tensor,
        first: int,
        turn: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the stream after attention, from position `first` on [B, S - first, H]."""
        attention, (cos, sin) = layer.self_attn, turn
        h = _norm(stream, layer.input_layernorm)
        query = attention.q_proj(h[:, first:]).unflatten(-1, (self._heads, -1))
        key = attention.k_proj(h).unflatten(-1, (self._kv_heads, -1))
        value = attention.v_proj(h).unflatten(-1, (self._kv_heads, -1))
        if hasattr(attention, "q_norm"):
            query, key = _norm(query, attention.q_norm), _norm(key, attention.k_norm)
        mixed = functional.scaled_dot_product_attention(
            _rotate(query, cos[:, first:], sin[:, first:]).transpose(1, 2),
            _rotate(key, cos, sin).transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None if mask is None else mask[first:],
            is_causal=mask is None and first == 0,
            scale=attention.scaling,
            enable_gqa=self._heads != self._kv_heads,
        )
        residual: torch.Tensor = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return residual.add_(stream[:, first:])


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which keys each query sees, bool [S, S], where a window leaves some out; None is plain causal."""
    if window is None or window >= length:
        return None
    ago = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return (ago >= 0) & (ago < window)


def _mlp(mlp: Any, h: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - as above
    branch: torch.Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)).mul_(mlp.up_proj(h)))
    return branch
