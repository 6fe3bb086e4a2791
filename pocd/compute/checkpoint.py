"""The files of a checkpoint: what is refused by its configuration and by what its tensors are, before they are read.

No checkpoint may give a wrong result silently, so each of its tensors is used exactly, is harmless, or is named in
a refusal. docs/models.md says what is refused and why.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from pocd.compute.fingerprint import checkpoint_files, named_files, opened
from pocd.protocol.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
NAMED = 3  # tensors that an error names, of all that it counts
REAL = frozenset({"F64", "F32", "F16", "BF16"})  # how files call what is no packed or scaled weight

HARMLESS = {
    r"(^|\.)rotary_emb\.inv_freq$": "a buffer of old files, computed from the configuration",
    r"(^|\.)position_ids$": "a buffer of old files: 0, 1, 2, …",
    r"\.(attn|attention)\.(masked_)?bias$": "the causal mask of GPT-2, GPT-J and GPT-NeoX, and its constant",
    r"^(model\.)?(visual|vision_tower|vision_model|multi_modal_projector)\.": "makes embeddings of images",
    r"\.(input|activation)_scale$": "rounds activations, which no host may do",
}
"""Tensors without a part in a result though they are in the files, with the reason. Prediction layers and others
that transformers' class lists itself (`_keys_to_ignore_on_load_unexpected`) are not reported as unexpected."""

PACKERS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside config.json in which other tools (ModelOpt, GPTQ, AWQ) say how the weights are packed."""

UNPACKED = "take the model's unquantised checkpoint (bfloat16), or dequantise it into a folder of its own first"


class Stored(NamedTuple):
    """A tensor as its file's header describes it.

    Attributes:
        dtype: Name of the element type in safetensors, such as BF16 or F8_E4M3.
        shape: Sizes of the dimensions.
        file: File that holds the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path


def some(names: Iterable[str]) -> str:
    """Return the first of the tensors `names`, in order, and how many there are, for an error."""
    ordered = sorted(names)
    counted = f"{len(ordered)} tensor{'s' if len(ordered) > 1 else ''}"
    return f"{counted} ({', '.join(ordered[:NAMED])}{', …' if len(ordered) > NAMED else ''})"


def is_harmless(name: str) -> bool:
    """Tell whether the tensor `name` has no part in a result."""
    return any(re.search(pattern, name) for pattern in HARMLESS)


def _values(config: object, *keys: str) -> Iterator[tuple[str, Any]]:
    """Give what the keys `keys` of a configuration and of its parts are set to; null sets nothing."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key in keys and value is not None:
                yield key, value
            elif key.endswith("_config"):
                yield from _values(value, *keys)


def _check_dtypes(source: str, written: object) -> None:
    for key, value in _values(written, "dtype", "torch_dtype"):
        if not isinstance(getattr(torch, str(value), None), torch.dtype):
            raise ModelError(
                f"{source}: config.json has the {key} {value!r}; write float32, float16 or bfloat16, or leave it out: "
                "model.dtype decides"
            )


def read_config(source: str, revision: str) -> tuple[Any, dict[str, Any] | None]:
    """Read the configuration, which may name no kernel of a hub (that is code) and no files elsewhere.

    Returns:
        The configuration, and how its weights are quantised as config.json says it; None: they are not.

    Raises:
        ModelError: Something in it is refused.
    """
    file = optional_file(source, revision, "config.json")
    written = json.loads(Path(file).read_bytes()) if file else {}
    if not isinstance(written, dict):
        raise ModelError(f"{source} cannot be loaded: its config.json holds no JSON object")
    _check_dtypes(source, written)
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        attention = getattr(part, "_attn_implementation", None)
        if "/" in str(attention or ""):
            raise ModelError(
                f"{source}: config.json names the kernel {attention!r} of a hub, and no code of others is run"
            )
    if getattr(config, "transformers_weights", None) is not None:
        raise ModelError(f"{source}: config.json names its weights (transformers_weights); call them {WEIGHTS}")
    found = [value for _, value in _values(written, "quantization_config", "compression_config")]
    if any(not isinstance(value, dict) or value != found[0] for value in found):
        raise ModelError(f"{source}: config.json has no single quantization_config, a JSON object; {UNPACKED}")
    return config, found[0] if found else None


def check_folder(source: str, revision: str) -> None:
    """Check what is beside the weights, and that only safetensors in the model's folder would be read.

    Raises:
        ModelError: A file leads elsewhere, or is about another kind of checkpoint.
    """
    if optional_file(source, revision, "adapter_config.json"):
        raise ModelError(f"{source} holds an adapter (adapter_config.json): merge it into the weights of its model")
    for file in PACKERS:
        if optional_file(source, revision, file):
            raise ModelError(f"{source} holds quantised weights of another tool ({file}): {UNPACKED}")
    index = optional_file(source, revision, INDEX)
    if index:
        named_files(Path(index))


def optional_file(source: str, revision: str, file: str) -> str | None:
    """Return the path of a model's file, which is downloaded where it is a hub's; None where there is none."""
    found: str | None = cached_file(
        source,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # of a file that the cache may lack for good
    )
    return found


def fetched(source: str, revision: str) -> Path:
    """Return the folder of a checkpoint whose weights are here; a hub's are downloaded."""
    if not Path(source).is_dir() and optional_file(source, revision, WEIGHTS) is None:
        index = optional_file(source, revision, INDEX)
        if index:
            get_checkpoint_shard_files(source, index, revision=revision)
        else:
            cached_file(source, WEIGHTS, revision=revision)  # says why it is not there
    return Path(str(cached_file(source, "config.json", revision=revision))).parent


def read_headers(folder: Path) -> dict[str, Stored]:
    """Return each tensor of the safetensors checkpoint in `folder`, by its name; only headers are read.

    Raises:
        ModelError: A file is missing or damaged, holds less than the index says, or a tensor is there twice.
    """
    stored: dict[str, Stored] = {}
    for file in checkpoint_files(folder):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                if name in stored:
                    raise ModelError(f"{file} and {stored[name].file.name} both hold {name}: remove the wrong one")
                part = tensors.get_slice(name)
                stored[name] = Stored(part.get_dtype(), tuple(part.get_shape()), file)
    index = folder / INDEX
    if index.is_file() and not (folder / WEIGHTS).is_file():
        lost = json.loads(index.read_bytes())["weight_map"].keys() - stored.keys()
        if lost:
            raise ModelError(
                f"{index} names {some(lost)} that its files do not hold: copy or download the model again, whole"
            )
    return stored


def check_stored(
    config: Any,  # noqa: ANN401 - each family has its own class
    quantization: Mapping[str, Any] | None,
    stored: Mapping[str, Stored],
    *,
    name: str,
    dtype: str,
    ranks: int,
) -> None:
    """Check that the tensors `stored` are read exactly, and have what is quantised dequantised on every device.

    Args:
        config: Configuration, in which this sets how quantised weights are loaded.
        quantization: How the weights are quantised as config.json says it; None: they are not.
        stored: Tensors of the checkpoint.
        name: Name of the model.
        dtype: Precision that the weights are loaded in.
        ranks: Number of processes that the model is split over.

    Raises:
        ModelError: Tensors are packed or scaled in a way that is not read exactly.
    """
    packed = {key for key, at in stored.items() if at.dtype not in REAL and not is_harmless(key)}
    if quantization is None:
        if packed:
            raise ModelError(
                f"model {name!r}: {some(packed)} are quantised or packed ({stored[min(packed)].dtype}), and its "
                f"config.json has no quantization_config: {UNPACKED}"
            )
        return
    method = quantization.get("quant_method")
    reason = f"quant_method {method!r} is not read exactly"
    if ranks > 1:
        reason = "quantised weights are not split exactly over several devices (model.parallel)"
    elif method == "fp8" and dtype != "bfloat16":
        reason = "FP8 is read exactly in bfloat16 only: set model.dtype = 'bfloat16'"
    elif method == "fp8":
        wrong = {key for key in packed if not _is_whole_fp8(key, stored, quantization.get("weight_block_size"))}
        wrong |= _scales_alone(stored)
        reason = f"{some(wrong)} are not FP8 in whole blocks of weight_block_size with their scales" if wrong else ""
    elif method == "mxfp4" and config.model_type == "gpt_oss":
        wrong = {key for key in packed if not _is_whole_mxfp4(key, stored)}
        reason = f"{some(wrong)} are not MXFP4 blocks with their scales" if wrong else ""
    if reason:
        raise ModelError(f"model {name!r} is quantised (quantization_config), and {reason}; or {UNPACKED}")
    # Else transformers rounds activations on cards that can, and hosts differ.
    config.quantization_config = {**quantization, "dequantize": True}


def _is_whole_fp8(name: str, stored: Mapping[str, Stored], block: object) -> bool:
    """Tell whether an FP8 matrix is made of whole blocks, each with a scale: transformers guesses others' size."""
    weight, scale = stored[name], stored.get(f"{name}_scale_inv")
    if weight.dtype != "F8_E4M3" or len(weight.shape) != 2 or scale is None or scale.dtype not in REAL:
        return False
    if block is None:
        return scale.shape in {(), (1,), (1, 1)}
    if not isinstance(block, list) or not len(block) == len(scale.shape) == 2:
        return False
    return weight.shape == tuple(size * count for size, count in zip(block, scale.shape, strict=True))


def _scales_alone(stored: Mapping[str, Stored]) -> set[str]:
    """Return the scales of weights that are no FP8, which they would be multiplied with."""
    scales = {key: stored.get(key.removesuffix("_scale_inv")) for key in stored if key.endswith("_scale_inv")}
    return {key for key, weight in scales.items() if weight is None or weight.dtype != "F8_E4M3"}


def _is_whole_mxfp4(name: str, stored: Mapping[str, Stored]) -> bool:
    """Tell whether a tensor is one of a pair: blocks of 16 bytes, and a scale for each."""
    root = name.removesuffix("_blocks").removesuffix("_scales")
    blocks, scales = stored.get(f"{root}_blocks"), stored.get(f"{root}_scales")
    if root == name or blocks is None or scales is None:
        return False
    return blocks.dtype == scales.dtype == "U8" and blocks.shape == (*scales.shape, 16)
