"""docs/protocol.md section 3 once more, plainly: one nonce at a time, numpy and Python integers, own decoder.

Written from the protocol's text and sharing no code with pocd, so that the two can be held against each other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
MASK = 0xFFFFFFFF


def seed32(text: str) -> int:
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest()[:8], 16)


def hash32(i: int, seed: int) -> int:
    def rotl(x: int, r: int) -> int:
        return ((x << r) | (x >> (32 - r))) & MASK

    k = (i * 0xCC9E2D51) & MASK
    k = (rotl(k, 15) * 0x1B873593) & MASK
    h = (rotl(seed ^ k, 13) * 5 + 0xE6546B64) & MASK
    h ^= h >> 16
    h = (h * 0x85EBCA6B) & MASK
    h ^= h >> 13
    h = (h * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


def _hashes(seed: int, n: int) -> npt.NDArray[np.uint32]:
    """`hash32` of 0 … n - 1 at once, in numpy's wrapping uint32."""
    i = np.arange(n, dtype=np.uint32)

    def rotl(x: npt.NDArray[np.uint32], r: int) -> npt.NDArray[np.uint32]:
        return (x << np.uint32(r)) | (x >> np.uint32(32 - r))

    k = rotl(i * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    h = rotl(np.uint32(seed) ^ k, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def uniform(seed: int, n: int) -> npt.NDArray[np.float32]:
    return _hashes(seed, n).astype(np.float32) / np.float32(2**32)


def normal(seed: int, n: int) -> npt.NDArray[np.float32]:
    m = -(-n // 2)
    u = uniform(seed, 2 * m)
    u1, u2 = np.maximum(u[:m], np.float32(1e-10)), u[m:]
    radius = np.sqrt(np.float32(-2) * np.log(u1))
    angle = np.float32(2 * np.pi) * u2
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


def unit(text: str, n: int) -> Array:
    v = normal(seed32(text), n).astype(np.float64)
    return v / np.linalg.norm(v)


def reflect(x: Array, v: Array) -> Array:
    return x - 2 * (x @ v)[..., None] * v


@dataclass
class Decoder:
    """A Llama or Qwen3 form decoder in float64, from named weights [out, in]."""

    weights: dict[str, Array]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float

    def _norm(self, x: Array, name: str) -> Array:
        normed: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.weights[name]
        return normed

    def _rotate(self, x: Array) -> Array:
        """Rotary positions on [S, heads, head_dim], halves rotated against each other."""
        half = self.head_dim // 2
        frequency = 1.0 / self.theta ** (np.arange(half) / half)
        angle = np.arange(len(x))[:, None] * frequency
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def _attention(self, x: Array, prefix: str) -> Array:
        length = len(x)

        def project(name: str, heads: int) -> Array:
            return (x @ self.weights[f"{prefix}.{name}_proj.weight"].T).reshape(length, heads, self.head_dim)

        q, k, v = project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads)
        if f"{prefix}.q_norm.weight" in self.weights:
            q, k = self._norm(q, f"{prefix}.q_norm.weight"), self._norm(k, f"{prefix}.k_norm.weight")
        q, k = self._rotate(q), self._rotate(k)
        group = self.heads // self.kv_heads
        out = np.empty_like(q)
        causal = np.tril(np.ones((length, length), dtype=bool))
        for head in range(self.heads):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(self.head_dim)
            scores = np.where(causal, scores, -np.inf)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = share / share.sum(-1, keepdims=True) @ v[:, head // group]
        mixed: Array = out.reshape(length, -1) @ self.weights[f"{prefix}.o_proj.weight"].T
        return mixed

    def _mlp(self, x: Array, prefix: str) -> Array:
        gate = x @ self.weights[f"{prefix}.gate_proj.weight"].T
        up = x @ self.weights[f"{prefix}.up_proj.weight"].T
        out: Array = (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"{prefix}.down_proj.weight"].T
        return out

    def last_hidden(self, x: Array, block_hash: str) -> Array:
        """The last position after the final norm, layers transformed by `block_hash`; x is [S, H]."""
        for i in range(self.layers):
            p = f"model.layers.{i}"
            v = unit(f"{block_hash}_layer_{i}_householder", x.shape[-1])
            residual = x + self._attention(self._norm(x, f"{p}.input_layernorm.weight"), f"{p}.self_attn")
            branch = self._mlp(self._norm(residual, f"{p}.post_attention_layernorm.weight"), f"{p}.mlp")
            branch, residual = (
                reflect(y / (np.linalg.norm(y, axis=-1, keepdims=True) + 1e-8), v) for y in (branch, residual)
            )
            x = residual + branch
        last: Array = self._norm(x, "model.norm.weight")[-1]
        return last


def distance(decoder: Decoder, *, block_hash: str, public_key: str, nonce: int, seq_len: int) -> float:
    """The distance of one nonce under `poc2`, in float64 but for the generator."""
    size, dim = decoder.weights["model.norm.weight"].size, 8192
    flat = normal(seed32(f"{block_hash}_{public_key}_nonce{nonce}"), seq_len * size)
    h = decoder.last_hidden(flat.astype(np.float64).reshape(seq_len, size), block_hash)
    for r in range(8):
        h = reflect(h, unit(f"{block_hash}_{public_key}_nonce_{nonce}_hidden_r{r}", size))
    h /= np.linalg.norm(h)
    head = normal(seed32(f"{block_hash}_lm_head"), size * dim).astype(np.float64).reshape(dim, size) * 0.02
    z = head @ h
    return float(np.linalg.norm(z / np.linalg.norm(z) - unit(f"{block_hash}_target", dim)))
