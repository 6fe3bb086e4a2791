"""A short name for a checkpoint, by which hosts notice that theirs differ (docs/protocol.md section 5).

It finds mistakes (another model, revision, fine-tuning, quantisation, or configuration), not fraud: only a sample of
each tensor counts. It is taken from the files, before any conversion, so it is the same for every dtype, device and
sharding.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import torch

from pocd.compute.checkpoint import is_tied, read_config
from pocd.compute.stored import read_headers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import nn

    from pocd.compute.stored import Stored
    from pocd.compute.ways import Way

FORM = "v2-"  # what fingerprints of this form begin with; the first form had no configuration, and no such beginning

SAMPLE = 64  # elements of each tensor, evenly spaced, the first and the last among them


def _sample(tensor: torch.Tensor) -> bytes:
    """Return a tensor's sample as float32 bytes, little-endian; float16 and bfloat16 are exact in it."""
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLE, flat.numel())
    places = [i * (flat.numel() - 1) // max(1, count - 1) for i in range(count)]
    return flat[places].to("cpu", torch.float32).numpy().astype("<f4").tobytes()


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], configuration: Mapping[str, Any]) -> str:
    """Return `FORM` and 32 hex digits: SHA-256 over names, shapes and samples in the order of the names, and JSON."""
    digest = hashlib.sha256()
    for name, shape, sample in sorted((name, list(tensor.shape), _sample(tensor)) for name, tensor in tensors):
        digest.update(f"{name}\0{shape}\0".encode())
        digest.update(sample)
    digest.update(json.dumps(configuration, sort_keys=True, separators=(",", ":"), default=str).encode())
    return FORM + digest.hexdigest()[:32]


IRRELEVANT = re.compile(
    r"_.*|.*_token_(id|ids|index)|.*dropout.*|.*pdrop|output_.*|initializer_.*|(vision|audio)_config"
    r"|transformers_version|(torch_)?dtype|architectures|auto_map|name_or_path|use_cache|return_dict|id2label|label2id"
    r"|problem_type|.*aux_loss.*|quantization_config|compression_config"
)
"""Keys of configurations without a part in a result: versions, names, training, tokens, and how tensors are stored."""


def deciding(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration decides a result, in one form however it was written.

    Args:
        config: The configuration as transformers understands it.
        defaults: Configuration of the class where nothing is written; an equal value counts as not written.
    """
    return {
        key: _one_form(value)
        for key, value in config.items()
        if not IRRELEVANT.fullmatch(key) and (key == "model_type" or _one_form(value) != _one_form(defaults.get(key)))
    }


def _one_form(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a value of JSON in one of its forms: whole numbers as such, without keys that are null or said twice."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (list, tuple)):
        return [_one_form(each) for each in value]
    if isinstance(value, dict):
        twice = {"type"} if "rope_type" in value else set()
        return {key: _one_form(each) for key, each in value.items() if each is not None and key not in twice}
    return value


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """Return the configuration of a class where nothing is written; empty where it wants something."""
    try:
        defaults: dict[str, Any] = kind().to_dict()
    except (TypeError, ValueError):
        return {}
    return defaults


def configuration_of(config: Any, way: Way | None) -> dict[str, Any]:  # noqa: ANN401 - each family has its own class
    """Return what decides a result beside the tensors: the configuration of the text model, and the way of weights."""
    text = config.get_text_config()
    defaults = _defaults(type(text))
    decides = deciding({**text.to_dict(), "tie_word_embeddings": is_tied(config)}, defaults)
    return {"config": decides, "weights": {"dequantised": None if way is None else way.decides}}


def stored_fingerprint(stored: Mapping[str, Stored], config: Any, way: Way | None) -> str:  # noqa: ANN401 - as above
    """Return the fingerprint of a checkpoint: its tensors, its configuration, and how its weights are quantised."""
    return fingerprint(((name, at.read(scattered=True)) for name, at in stored.items()), configuration_of(config, way))


def checkpoint_fingerprint(folder: Path) -> str:
    """Return the fingerprint of the safetensors checkpoint in `folder`."""
    return stored_fingerprint(read_headers(folder), *read_config(str(folder), "main"))


def module_fingerprint(module: nn.Module) -> str:
    """Return the fingerprint of a transformers model that was made in memory; a tied tensor counts once."""
    return fingerprint(module.named_parameters(), configuration_of(module.config, None))
