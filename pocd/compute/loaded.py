"""Whether a model in memory holds each tensor of its checkpoint, exactly, and nothing else."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from pocd.compute.checkpoint import is_harmless, some
from pocd.protocol.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

RESTORE = "restore the config.json that belongs to these weights, or take a checkpoint without them"

ROUTER_BIASES = ("e_score_correction_bias", "expert_bias")
"""Biases that pick a mixture's experts: float32 in every dtype, as they differ by less than bfloat16 can tell."""


@contextmanager
def exact_router_biases() -> Iterator[None]:
    """Have transformers keep `ROUTER_BIASES` in float32, also in classes that do not say it themselves (MiniMax-M2)."""
    before = PreTrainedModel._keep_in_fp32_modules_strict  # noqa: SLF001 - there is no argument for it
    PreTrainedModel._keep_in_fp32_modules_strict = list(ROUTER_BIASES)  # noqa: SLF001 - as above
    try:
        yield
    finally:
        PreTrainedModel._keep_in_fp32_modules_strict = before  # noqa: SLF001 - as above


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
    if getattr(causal, "hf_quantizer", None) is not None:
        raise ModelError(f"{owner} stays quantised when it is loaded; take an unquantised checkpoint")
    weights = dict(causal.named_parameters())
    if packed := {key for key, tensor in weights.items() if tensor.dtype not in {dtype, torch.float32}}:
        raise ModelError(f"{owner}: {some(packed)} are not in {dtype}, but packed; take an unquantised checkpoint")
    tensors = {**weights, **dict(causal.named_buffers())}
    if rounded := {key for key in tensors if key.endswith(ROUTER_BIASES) and tensors[key].dtype != torch.float32}:
        raise ModelError(f"{owner}: {some(rounded)} pick experts and were rounded; set model.dtype = 'float32'")
