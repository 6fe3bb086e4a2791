"""Whether a model in memory holds each tensor of its checkpoint, exactly, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pocd.compute.harmless import is_harmless
from pocd.compute.loading import ROUTER_BIASES
from pocd.compute.stored import some
from pocd.protocol.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

RESTORE = "restore the config.json that belongs to these weights, or take a checkpoint without them"


def check_loaded(causal: Any, report: Mapping[str, Any], *, name: str, dtype: torch.dtype) -> None:  # noqa: ANN401 - transformers gives its classes no common type
    """Check that loading used each tensor of the checkpoint, and drew none at random.

    transformers only warns of all this, and runs what nobody else would get.

    Args:
        causal: The model.
        report: transformers' report of the loading: keys that are missing, unexpected or of another shape.
        name: Name of the model.
        dtype: Precision that the model was loaded in.

    Raises:
        ModelError: Tensors are missing, left over, of another shape, rounded or packed; the message names them.
    """
    owner = f"model {name!r}"
    if lacking := report["missing_keys"]:
        raise ModelError(
            f"{owner} lacks weights, {some(lacking)}: copy or download it again, whole, with its own config.json"
        )
    if other := {f"{key}: {list(found)}, not {list(wanted)}" for key, found, wanted in report["mismatched_keys"]}:
        raise ModelError(f"{owner}: {some(other)} have another shape than config.json says; {RESTORE}")
    if unused := {key for key in report["unexpected_keys"] if not is_harmless(key)}:
        raise ModelError(f"{owner}: {some(unused)} are used by nothing that config.json describes; {RESTORE}")
    if untied := causal.get_expanded_tied_weights_keys(all_submodels=True).keys() - causal.all_tied_weights_keys.keys():
        raise ModelError(
            f"{owner}: {some(untied)} differ from what config.json ties them to (tie_word_embeddings); {RESTORE}"
        )
    weights = dict(causal.named_parameters())
    if packed := {key for key, tensor in weights.items() if tensor.dtype not in {dtype, torch.float32}}:
        raise ModelError(f"{owner}: {some(packed)} are not in {dtype}, but packed; take an unquantised checkpoint")
    tensors = {**weights, **dict(causal.named_buffers())}
    if rounded := {key for key in tensors if key.endswith(ROUTER_BIASES) and tensors[key].dtype != torch.float32}:
        raise ModelError(f"{owner}: {some(rounded)} pick experts and were rounded; set model.dtype = 'float32'")
