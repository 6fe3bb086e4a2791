"""Nonces in, distances out (docs/protocol.md section 3)."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pocd.compute.errors import InputError, NonFiniteError
from pocd.compute.random import normal, seeds_tensor, unit_normal
from pocd.compute.transforms import layer_transforms, reflect_in_order
from pocd.nonces import LARGEST_NONCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pocd.compute.model import Model
    from pocd.compute.schemes import Scheme


@dataclass(frozen=True, slots=True)
class BlockRun:
    """A model prepared for one block hash and one public key; see `block_run`."""

    model: Model
    scheme: Scheme
    block_hash: str
    public_key: str
    seq_len: int
    head: torch.Tensor  # float32 [D, H]
    target: torch.Tensor  # float32 [D], unit length

    @torch.inference_mode()
    def distances(self, nonces: Sequence[int], *, batch_size: int) -> list[float]:
        """Compute the distance of each nonce.

        Every batch has the same shape: a short one is padded by repeating its last nonce.
        So a distance does not depend on how many others were asked for.

        Args:
            nonces: In [0, 2**63), any order.
            batch_size: Nonces per forward pass.

        Returns:
            Distances in [0, 2], in the order of `nonces`.

        Raises:
            InputError: A nonce is out of range.
            NonFiniteError: The model gave NaN or infinity.
        """
        for nonce in nonces:
            if not 0 <= nonce <= LARGEST_NONCE:
                raise InputError(f"nonce {nonce} is outside 0 to 2**63 - 1")
        found: list[float] = []
        for start in range(0, len(nonces), batch_size):
            batch = list(nonces[start : start + batch_size])
            padded = batch + batch[-1:] * (batch_size - len(batch))
            values = self._batch(padded)[: len(batch)]
            if not torch.isfinite(values).all():
                raise NonFiniteError(
                    f"model {self.model.name!r} in {self.model.dtype} gave NaN or infinity for scheme "
                    f"{self.scheme.name!r} in nonces {batch[0]} to {batch[-1]}; try another dtype, or check the weights"
                )
            found.extend(values.tolist())
        return found

    def _batch(self, nonces: Sequence[int]) -> torch.Tensor:
        """Distances of one batch, float32 [B]."""
        model = self.model
        owner = f"{self.block_hash}_{self.public_key}"
        seeds = seeds_tensor([f"{owner}_nonce{nonce}" for nonce in nonces], model.device)
        inputs = normal(seeds, self.seq_len * model.hidden_size)
        embeddings = inputs.to(model.dtype).view(len(nonces), self.seq_len, model.hidden_size)
        states = model.decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        h = states[:, -1].float()

        count = self.scheme.reflections
        texts = [f"{owner}_nonce_{nonce}_hidden_r{r}" for nonce in nonces for r in range(count)]
        seeds = seeds_tensor(texts, model.device).view(len(nonces), count)
        h = reflect_in_order(h, unit_normal(seeds, model.hidden_size))
        h = h / h.norm(dim=-1, keepdim=True)
        z = h @ self.head.T
        distances: torch.Tensor = (z / z.norm(dim=-1, keepdim=True) - self.target).norm(dim=-1)
        return distances


@contextmanager
def block_run(model: Model, scheme: Scheme, *, block_hash: str, public_key: str, seq_len: int) -> Iterator[BlockRun]:
    """Prepare `model` for one block hash: draw head, target and layer vectors, attach the transforms.

    When the context ends the model is bare again.

    Raises:
        InputError: `seq_len` is not one that the model can take.
    """
    if not 1 <= seq_len <= model.max_positions:
        raise InputError(f"seq_len {seq_len} is outside 1 to {model.max_positions}, the positions of {model.name!r}")
    # The head's product counts as float32 (section 3): no TF32 on any device.
    torch.backends.cuda.matmul.allow_tf32 = False
    size, dim = model.hidden_size, scheme.output_dim

    def one(text: str) -> torch.Tensor:
        return seeds_tensor([text], model.device)[0]

    head = normal(one(f"{block_hash}_lm_head"), size * dim).view(dim, size) * 0.02
    target = unit_normal(one(f"{block_hash}_target"), dim)
    layer_texts = [f"{block_hash}_layer_{i}_householder" for i in range(len(model.layers))]
    vectors = unit_normal(seeds_tensor(layer_texts, model.device), size).to(model.dtype)
    with layer_transforms(model, vectors):
        yield BlockRun(model, scheme, block_hash, public_key, seq_len, head, target)
