"""The files of a checkpoint beside its weights: where they are, what they say, and what is refused for it.

No checkpoint may give a wrong result silently, so each of its tensors is used exactly, is harmless, or is named in
a refusal. docs/models.md says what is refused and why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from pocd.compute.stored import INDEX, WEIGHTS, named_files
from pocd.compute.ways import UNPACKED, Way, read_way
from pocd.protocol.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKERS = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which other tools say how the weights are packed where config.json does not, and their methods."""

SAME = {"kimi_k2": "deepseek_v3"}
"""Model types that are another family's in all but the name, down to the keys of their configurations."""

QUANTISED = ("quantization_config", "compression_config")  # what a configuration calls the way of quantisation


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


def is_tied(config: Any) -> bool:  # noqa: ANN401 - each family has its own class
    """Tell whether the output matrix is the embedding; some families have no word for it."""
    return bool(getattr(config, "tie_word_embeddings", False))


def read_config(source: str, revision: str) -> tuple[Any, Way | None]:
    """Read the configuration, which may name no kernel of a hub (that is code) and no files elsewhere.

    Returns:
        The configuration, which says nothing of quantisation, and how the weights are quantised; None: they are not.

    Raises:
        ModelError: Something in it is refused.
    """
    written = _json(source, revision, "config.json")
    _check_dtypes(source, written)
    model_type = written.get("model_type")
    if model_type in SAME:
        own = {key: value for key, value in written.items() if key not in ("auto_map", "model_type")}
        config: Any = CONFIG_MAPPING[SAME[model_type]].from_dict(own)
    elif model_type is not None and model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{source}: config.json has the model_type {model_type!r}, which transformers {transformers.__version__} "
            "does not know, and no code of a model's repository is run: take a model of a family in docs/models.md, "
            "or a transformers that knows this one"
        )
    else:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    parts = [config, *(part for key in config.sub_configs if (part := getattr(config, key, None)) is not None)]
    for part in parts:
        attention = getattr(part, "_attn_implementation", None)
        if "/" in str(attention or ""):
            raise ModelError(
                f"{source}: config.json names the kernel {attention!r} of a hub, and no code of others is run"
            )
        for key in QUANTISED:  # transformers would quantise, or round activations
            if hasattr(part, key):
                delattr(part, key)
    if getattr(config, "transformers_weights", None) is not None:
        raise ModelError(f"{source}: config.json names its weights (transformers_weights); call them {WEIGHTS}")
    text = config.get_text_config()
    if isinstance(text, dict):
        raise ModelError(f"{source}: config.json has a text_config, and a {config.model_type} model has none")
    if text is not config and "tie_word_embeddings" not in written:
        config.tie_word_embeddings = getattr(text, "tie_word_embeddings", is_tied(config))
    return config, _read_way(source, revision, written, text.model_type)


def _read_way(source: str, revision: str, written: dict[str, Any], model_type: str) -> Way | None:
    found = [value for _, value in _values(written, *QUANTISED)]
    if any(not isinstance(value, dict) or value != found[0] for value in found):
        raise ModelError(f"{source}: config.json has no single quantization_config, a JSON object; {UNPACKED}")
    place = "quantization_config"
    for file, method in () if found else PACKERS.items():
        if not found and optional_file(source, revision, file):
            place, said = file, _json(source, revision, file)
            inner = said.get("quantization") or {}
            if not isinstance(inner, dict):
                raise ModelError(f"{source}: the quantization in its {file} is no JSON object; {UNPACKED}")
            found = [{"quant_method": method, **said, **inner}]
    if not found:
        return None
    try:
        return read_way(found[0], model_type)
    except ModelError as error:
        raise ModelError(f"{source} is quantised ({place}), and {error}; {UNPACKED}") from error


def _json(source: str, revision: str, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the model; empty where there is none.

    Raises:
        ModelError: The file is no JSON object, gives one name two values, or has a NaN.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if other := sorted({key for key, value in pairs if value != found[key]}):
            raise ModelError(f"{source}: {name} says {other[0]!r} twice, and not the same: keep the right one")
        return found

    def constant(word: str) -> float:
        if word == "NaN":
            raise ModelError(f"{source}: {name} has a NaN in place of a number: restore the file")
        return float(word)  # Infinity is a limit in some families

    file = optional_file(source, revision, name)
    try:
        written = json.loads(Path(file).read_bytes(), object_pairs_hook=once, parse_constant=constant) if file else {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source} cannot be loaded: its {name} is no JSON ({error}); restore the file") from error
    if not isinstance(written, dict):
        raise ModelError(f"{source} cannot be loaded: its {name} holds no JSON object")
    return written


def check_folder(source: str, revision: str) -> None:
    """Check what is beside the weights, and that only safetensors in the model's folder would be read.

    Raises:
        ModelError: A file leads elsewhere, or is about another kind of checkpoint.
    """
    if optional_file(source, revision, "adapter_config.json"):
        raise ModelError(f"{source} holds an adapter (adapter_config.json): merge it into the weights of its model")
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
