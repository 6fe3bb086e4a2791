"""Whether a model in memory holds each tensor of its checkpoint, exactly, and nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from pocd.compute.harmless import is_harmless
from pocd.compute.loading import ROUTER_BIASES
from pocd.compute.stored import some
from pocd.protocol.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

RESTORE = "restore the config.json that belongs to these weights, or take a checkpoint without them"


def _head(causal: Any) -> set[str]:  # noqa: ANN401 - transformers gives its classes no common type
    """Return the names of the output matrix's parameters."""
    head = causal.get_output_embeddings()
    own = set() if head is None else {id(tensor) for tensor in head.parameters()}
    return {name for name, tensor in causal.named_parameters() if id(tensor) in own}


def _is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether all elements, or those that this rank holds, are numbers: some kernels of attention hide others."""
    own = getattr(tensor, "to_local", lambda: tensor)()
    return not own.numel() or all(math.isfinite(end.item()) for end in own.aminmax())


def check_loaded(causal: Any, report: Mapping[str, Any], *, name: str, dtype: torch.dtype) -> None:  # noqa: ANN401 - transformers gives its classes no common type
    """Check that loading used each tensor of the checkpoint, and drew none at random.

    transformers only warns of all this, and runs what nobody else would get.

    Args:
        causal: The model.
        report: transformers' report of the loading: keys that are missing, unexpected or of another shape.
        name: Name of the model.
        dtype: Precision that the model was loaded in.

    Raises:
        ModelError: Tensors are missing, left over, of another shape, rounded, packed or no numbers; it names them.
    """
    owner = f"model {name!r}"
    lacking = set(report["missing_keys"])
    if lacking and lacking <= _head(causal):
        raise ModelError(
            f"{owner} has no output matrix: its files lack {', '.join(sorted(lacking))} of the decoder of text, and "
            'config.json does not say that it is the embedding: if it is, write "tie_word_embeddings": true there, '
            "else take a whole copy of the model"
        )
    if lacking:
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
    if wild := {key for key, tensor in weights.items() if not _is_finite(tensor)}:
        wider = ", or set model.dtype = 'bfloat16'" if dtype == torch.float16 else ""
        raise ModelError(f"{owner}: {some(wild)} hold NaN or infinity in {dtype}; copy or download it again{wider}")
    tensors = {**weights, **dict(causal.named_buffers())}
    if rounded := {key for key in tensors if key.endswith(ROUTER_BIASES) and tensors[key].dtype != torch.float32}:
        raise ModelError(f"{owner}: {some(rounded)} pick experts and were rounded; set model.dtype = 'float32'")
