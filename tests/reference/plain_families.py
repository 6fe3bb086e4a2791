"""Decoders of transformers' families once more, plainly, in numpy's float64, sharing no code with pocd.

Each layer's output is residual + branch: the *branch* is what the layer adds last (the MLP's output, after its norm
where the family has one there), the *residual* the stream to which it adds it. A `Step` may change both.

Weights are named as in transformers; all numbers of an architecture are arguments, given by hand in test_families.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tests.reference import plain
from tests.reference.plain import Array, Step, Weights

Part = Callable[[Weights, str, Array, int], Array]  # weights, prefix, x [S, H], layer to [S, H]


def linear(w: Weights, name: str, x: Array) -> Array:
    y: Array = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    y: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain
    return y


def layer_norm(w: Weights, name: str, x: Array, eps: float) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return rms_norm(x, w[f"{name}.weight"], eps) + w[f"{name}.bias"]


def silu(x: Array) -> Array:
    y: Array = x / (1 + np.exp(-x))
    return y


def gelu(x: Array) -> Array:
    y: Array = x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return y


def gelu_tanh(x: Array) -> Array:
    y: Array = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return y


def frequencies(theta: float, size: int) -> Array:
    """Of rotary positions in the first `size` dimensions of a head."""
    return theta ** (-np.arange(0, size, 2) / size)


def stretched(plain_ones: Array, *, factor: float, low: float, high: float, trained: int) -> Array:
    """Llama 3's frequencies: wavelengths above trained/low are stretched, those below trained/high stay."""
    turns = trained * plain_ones / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - share) * plain_ones / factor + share * plain_ones


def rotate(x: Array, angles: Array) -> Array:
    """Turn the first 2·len(angles) dimensions of x [S, heads, D] by their positions, half against half."""
    half = len(angles)
    angle = np.arange(len(x))[:, None, None] * angles
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate([*turned, rest], -1)


def attend(q: Array, k: Array, v: Array, *, scale: float, window: int | None = None, cap: float | None = None) -> Array:
    """Causal attention of q [S, heads, D] to k and v [S, fewer heads, D]; each sees itself and window - 1 before."""
    length, heads, _ = q.shape
    age = np.arange(length)[:, None] - np.arange(length)
    seen = (age >= 0) & (age < (window or length))
    out = np.empty_like(q)
    for head in range(heads):
        shared = head // (heads // k.shape[1])
        scores = q[:, head] @ k[:, shared].T * scale
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        scores = np.where(seen, scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = share / share.sum(-1, keepdims=True) @ v[:, shared]
    return out.reshape(length, -1)


@dataclass(frozen=True)
class Attention:
    """Attention with rotary positions. What differs between layers is a sequence with an entry for each."""

    angles: Sequence[Array]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    scale: float | None = None  # 1/√head_dim
    windows: Sequence[int | None] = (None, None, None)
    cap: float | None = None
    eps: float = 0.01  # of the norms of q and k
    zero_centred: bool = False  # these norms' gains are 1 + weight

    def _split(self, w: Weights, prefix: str, x: Array) -> tuple[Array, Array, Array]:
        if f"{prefix}.qkv_proj.weight" not in w:
            q, k, v = (linear(w, f"{prefix}.{name}_proj", x) for name in "qkv")
            return q, k, v
        both, wide, narrow = linear(w, f"{prefix}.qkv_proj", x), self.heads, self.kv_heads
        q, k, v = np.split(both, [wide * self.head_dim, (wide + narrow) * self.head_dim], -1)
        return q, k, v

    def _normed(self, w: Weights, name: str, x: Array, heads: int) -> Array:
        """[S, heads · D] to [S, heads, D]; normed over each head, or over all where the weight is that long."""
        apart = x.reshape(len(x), heads, self.head_dim)
        if f"{name}.weight" not in w:
            return apart
        gain = w[f"{name}.weight"] + self.zero_centred
        if gain.size == self.head_dim:
            return rms_norm(apart, gain, self.eps)
        return rms_norm(x, gain, self.eps).reshape(apart.shape)

    def __call__(self, w: Weights, prefix: str, x: Array, layer: int) -> Array:
        q, k, v = self._split(w, prefix, x)
        q = rotate(self._normed(w, f"{prefix}.q_norm", q, self.heads), self.angles[layer])
        k = rotate(self._normed(w, f"{prefix}.k_norm", k, self.kv_heads), self.angles[layer])
        v = v.reshape(len(x), self.kv_heads, self.head_dim)
        scale = 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale
        mixed = attend(q, k, v, scale=scale, window=self.windows[layer], cap=self.cap)
        return linear(w, f"{prefix}.o_proj", mixed)


def gated_mlp(w: Weights, prefix: str, x: Array, _layer: int, act: Callable[[Array], Array] = silu) -> Array:
    if f"{prefix}.gate_up_proj.weight" in w:
        gate, up = np.split(linear(w, f"{prefix}.gate_up_proj", x), 2, -1)
    else:
        gate, up = linear(w, f"{prefix}.gate_proj", x), linear(w, f"{prefix}.up_proj", x)
    return linear(w, f"{prefix}.down_proj", act(gate) * up)


def gelu_gated_mlp(w: Weights, prefix: str, x: Array, layer: int) -> Array:
    return gated_mlp(w, prefix, x, layer, gelu_tanh)


@dataclass(frozen=True)
class Experts:
    """A mixture of gated MLPs, one position at a time; layers without a router have a single one."""

    top: int
    shares_sum_to_one: bool

    def __call__(self, w: Weights, prefix: str, x: Array, layer: int) -> Array:
        if f"{prefix}.gate.weight" not in w:
            return gated_mlp(w, prefix, x, layer)
        out = np.zeros_like(x)
        for position, state in enumerate(x):
            scores = w[f"{prefix}.gate.weight"] @ state
            share = np.exp(scores - scores.max())
            share /= share.sum()
            chosen = np.argsort(-share)[: self.top]
            total = share[chosen].sum() if self.shares_sum_to_one else 1
            for expert in chosen:
                gate, up = np.split(w[f"{prefix}.experts.gate_up_proj"][expert] @ state, 2)
                mixed = w[f"{prefix}.experts.down_proj"][expert] @ (silu(gate) * up)
                out[position] += share[expert] / total * mixed
        return out


@dataclass(frozen=True)
class RmsDecoder:
    """The form of Llama and its kin: RMS norms, and one of three places for them."""

    attention: Part
    mlp: Part = gated_mlp
    norms: str = "before"  # attention and MLP; or "after", or "both"
    eps: float = 0.01
    zero_centred: bool = False  # gains are 1 + weight
    layers: int = 3

    def __call__(self, w: Weights, x: Array, step: Step) -> Array:
        def norm(name: str, y: Array) -> Array:
            return rms_norm(y, w[f"model.{name}.weight"] + self.zero_centred, self.eps)

        for i in range(self.layers):
            p = f"layers.{i}"
            attention, mlp = f"model.{p}.self_attn", f"model.{p}.mlp"
            if self.norms == "before":
                residual = x + self.attention(w, attention, norm(f"{p}.input_layernorm", x), i)
                branch = self.mlp(w, mlp, norm(f"{p}.post_attention_layernorm", residual), i)
            elif self.norms == "after":
                residual = x + norm(f"{p}.post_attention_layernorm", self.attention(w, attention, x, i))
                branch = norm(f"{p}.post_feedforward_layernorm", self.mlp(w, mlp, residual, i))
            else:
                mixed = self.attention(w, attention, norm(f"{p}.input_layernorm", x), i)
                residual = x + norm(f"{p}.post_attention_layernorm", mixed)
                branch = self.mlp(w, mlp, norm(f"{p}.pre_feedforward_layernorm", residual), i)
                branch = norm(f"{p}.post_feedforward_layernorm", branch)
            branch, residual = step(i, branch, residual)
            x = residual + branch
        return norm("norm", x)


@dataclass(frozen=True)
class Gpt2:
    """GPT-2: learned positions, layer norms, matrices stored [in, out]; attention is weaker in later layers."""

    heads: int = 4
    eps: float = 0.01

    def __call__(self, w: Weights, x: Array, step: Step) -> Array:
        def matrix(name: str, y: Array) -> Array:
            z: Array = y @ w[f"{name}.weight"] + w[f"{name}.bias"]
            return z

        x = x + w["transformer.wpe.weight"][: len(x)]
        head_dim = x.shape[-1] // self.heads
        for i in range(3):
            p = f"transformer.h.{i}"
            qkv = matrix(f"{p}.attn.c_attn", layer_norm(w, f"{p}.ln_1", x, self.eps))
            q, k, v = (part.reshape(len(x), self.heads, head_dim) for part in np.split(qkv, 3, -1))
            mixed = attend(q, k, v, scale=1 / math.sqrt(head_dim) / (i + 1))
            residual = x + matrix(f"{p}.attn.c_proj", mixed)
            inner = gelu_tanh(matrix(f"{p}.mlp.c_fc", layer_norm(w, f"{p}.ln_2", residual, self.eps)))
            branch, residual = step(i, matrix(f"{p}.mlp.c_proj", inner), residual)
            x = residual + branch
        return layer_norm(w, "transformer.ln_f", x, self.eps)


@dataclass(frozen=True)
class GptNeoX:
    """GPT-NeoX: in the parallel form the MLP sees the layer's input, not the stream after attention."""

    parallel: bool
    heads: int = 4
    eps: float = 0.01
    angles: Array = field(default_factory=lambda: frequencies(10_000, 4))  # half of each head

    def __call__(self, w: Weights, x: Array, step: Step) -> Array:
        for i in range(3):
            p = f"gpt_neox.layers.{i}"
            qkv = linear(w, f"{p}.attention.query_key_value", layer_norm(w, f"{p}.input_layernorm", x, self.eps))
            # Head by head: its query, its key, its value.
            q, k, v = np.split(qkv.reshape(len(x), self.heads, -1), 3, -1)
            q, k = rotate(q, self.angles), rotate(k, self.angles)
            mixed = attend(q, k, v, scale=1 / math.sqrt(q.shape[-1]))
            residual = x + linear(w, f"{p}.attention.dense", mixed)
            seen = layer_norm(w, f"{p}.post_attention_layernorm", x if self.parallel else residual, self.eps)
            branch = linear(w, f"{p}.mlp.dense_4h_to_h", gelu(linear(w, f"{p}.mlp.dense_h_to_4h", seen)))
            branch, residual = step(i, branch, residual)
            x = residual + branch
        return layer_norm(w, "gpt_neox.final_layer_norm", x, self.eps)


def bundled(name: str) -> plain.Decoder:
    """The bundled model `name`, its file read by another reader than the engine's."""
    from safetensors.torch import load_file

    folder = Path(__file__).parent.parent.parent / "pocd" / "models" / name.removeprefix("bundled:")
    config: dict[str, Any] = orjson.loads((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    layers, head_dim, eps = config["num_hidden_layers"], config["head_dim"], config["rms_norm_eps"]
    attention = Attention(
        angles=[frequencies(config["rope_parameters"]["rope_theta"], head_dim)] * layers,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        windows=[None] * layers,
        eps=eps,
    )
    weights = {key: tensor.double().numpy() for key, tensor in tensors.items()}
    return plain.Decoder(weights, RmsDecoder(attention, eps=eps, layers=layers))
