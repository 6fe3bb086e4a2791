"""The scheme `poc2` in plain torch, one nonce at a time: docs/protocol.md sections 2 and 3, read line by line.

For transformers models of the Llama form (llama, mistral, qwen2, qwen3), on any device and in any dtype. It shares no
code with pocd: it is one more truth, and the slow baseline of a benchmark.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

MASK = 0xFFFFFFFF
HEAD_DIM = 8192


def seed32(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def hash32(i: torch.Tensor, seed: int) -> torch.Tensor:
    """int64 in, int64 out; products that overflow are right in their lower 32 bits."""

    def rotl(x: torch.Tensor, bits: int) -> torch.Tensor:
        return ((x << bits) | (x >> (32 - bits))) & MASK

    k = (i * 0xCC9E2D51) & MASK
    k = (rotl(k, 15) * 0x1B873593) & MASK
    h = (rotl(seed ^ k, 13) * 5 + 0xE6546B64) & MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


def uniform(seed: int, n: int, device: torch.device) -> torch.Tensor:
    return hash32(torch.arange(n, device=device), seed).to(torch.float32) / 2**32


def normal(seed: int, n: int, device: torch.device) -> torch.Tensor:
    m = (n + 1) // 2
    u = uniform(seed, 2 * m, device)
    radius = torch.sqrt(-2 * torch.log(u[:m].clamp(min=1e-10)))
    angle = 2 * math.pi * u[m:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:n]


def unit(text: str, n: int, device: torch.device) -> torch.Tensor:
    v = normal(seed32(text), n, device)
    return v.div(v.norm())


def reflect(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return x - 2 * (x * v).sum(-1, keepdim=True) * v


def normalise_and_reflect(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    wide = x.float()  # the norm of a large float16 activation would overflow
    return reflect(wide / (wide.norm(dim=-1, keepdim=True) + 1e-8), v.float()).to(x.dtype)


class PlainRun:
    """A model prepared for one block hash; its hooks are there while a distance is computed."""

    def __init__(self, causal: Any, block_hash: str, public_key: str, seq_len: int) -> None:  # noqa: ANN401 - transformers gives its classes no common type
        self.decoder = causal.eval().model
        self.size = int(causal.config.hidden_size)
        weight = next(self.decoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.block_hash, self.public_key, self.seq_len = block_hash, public_key, seq_len
        flat = normal(seed32(f"{block_hash}_lm_head"), self.size * HEAD_DIM, self.device)
        self.head = flat.view(HEAD_DIM, self.size) * 0.02
        self.target = unit(f"{block_hash}_target", HEAD_DIM, self.device)
        self.vectors = [
            unit(f"{block_hash}_layer_{i}_householder", self.size, self.device).to(self.dtype)
            for i in range(len(self.decoder.layers))
        ]

    def _hook(self, layer: Any, v: torch.Tensor) -> list[RemovableHandle]:  # noqa: ANN401 - a decoder layer of any family
        caught: dict[str, torch.Tensor] = {}

        def catch_residual(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            caught["residual"] = args[0]

        def catch_branch(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
            caught["branch"] = output

        def replace_output(_module: nn.Module, _args: object, _output: object) -> torch.Tensor:
            branch = normalise_and_reflect(caught.pop("branch"), v)
            return normalise_and_reflect(caught.pop("residual"), v) + branch

        return [
            layer.post_attention_layernorm.register_forward_pre_hook(catch_residual),
            layer.mlp.register_forward_hook(catch_branch),
            layer.register_forward_hook(replace_output),
        ]

    def _unit(self, text: str) -> torch.Tensor:
        return unit(text, self.size, self.device)

    @torch.inference_mode()
    def distance(self, nonce: int) -> float:
        owner = f"{self.block_hash}_{self.public_key}"
        flat = normal(seed32(f"{owner}_nonce{nonce}"), self.seq_len * self.size, self.device)
        x = flat.view(1, self.seq_len, self.size).to(self.dtype)
        hooks = [self._hook(layer, v) for layer, v in zip(self.decoder.layers, self.vectors, strict=True)]
        try:
            h = self.decoder(inputs_embeds=x, use_cache=False).last_hidden_state[0, -1].float()
        finally:
            for hook in (hook for group in hooks for hook in group):
                hook.remove()
        for r in range(8):
            h = reflect(h, self._unit(f"{owner}_nonce_{nonce}_hidden_r{r}"))
        z = self.head @ (h / h.norm())
        return float((z / z.norm() - self.target).norm())
