"""A short name for a checkpoint's weights, by which hosts notice that theirs differ (docs/protocol.md section 5).

It finds mistakes (another model, revision, fine-tuning, or quantisation), not fraud: only a sample of
each tensor counts. It is taken from the files, before any conversion, so it is the same for every
dtype, device, sharding and version of transformers.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from pocd.protocol.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import nn

SAMPLE = 64  # elements of each tensor, evenly spaced, the first and the last among them


def _sample(tensor: torch.Tensor) -> bytes:
    """Return a tensor's sample as float32 bytes, little-endian; float16 and bfloat16 are exact in it."""
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLE, flat.numel())
    places = [i * (flat.numel() - 1) // max(1, count - 1) for i in range(count)]
    return flat[places].to("cpu", torch.float32).numpy().astype("<f4").tobytes()


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return 32 hex digits: SHA-256 over names, shapes and samples, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}\0{list(tensor.shape)}\0".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()[:32]


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads: one, or those that an index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in named_files(index)]


def named_files(index: Path) -> list[str]:
    """Return the files that the index of a checkpoint names, each a path from the model's folder.

    Raises:
        ModelError: One is no safetensors file in that folder. A pickle is a program. A link in the folder may lead
            out of it, as in a hub's cache, but no path in a file that others wrote.
    """
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} cannot be loaded: it is no index of weights ({type(error).__name__}); copy or download it again"
        ) from error
    for name in names:
        if not isinstance(name, str):
            raise ModelError(f"{index} cannot be loaded: it names {name!r} as a file; copy or download it again")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise ModelError(f"{index} names {name!r}, which is no safetensors file in its folder")
    return names


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Give the tensors of a safetensors file; a ModelError says that it is missing or damaged, and which it is."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise ModelError(f"{file} cannot be loaded: it is missing; copy or download it again") from error
    except SafetensorError as error:
        raise ModelError(f"{file} cannot be loaded: it is damaged ({error}); copy or download it again") from error


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the name and the tensor of each weight of the safetensors checkpoint in `folder`."""
    for file in checkpoint_files(folder):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                yield name, tensors.get_tensor(name)  # mapped, not read: only the sample's pages are


def checkpoint_fingerprint(folder: Path) -> str:
    """Return the fingerprint of the safetensors checkpoint in `folder`."""
    return fingerprint(checkpoint_tensors(folder))


def module_fingerprint(module: nn.Module) -> str:
    """Return the fingerprint of a model that was made in memory; a tied tensor counts once."""
    return fingerprint(module.named_parameters())
