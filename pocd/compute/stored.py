"""The tensors of a safetensors checkpoint as its files hold them: described by the headers, mapped one at a time."""

from __future__ import annotations

import json
import mmap
import struct
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from pocd.protocol.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
NAMED = 3  # tensors that an error names, of all that it counts

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # a power of two by its exponent; torch 2.6 has no such type
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types that are read, by their names in safetensors."""


class Stored(NamedTuple):
    """A tensor as its file's header describes it.

    Attributes:
        dtype: Name of the element type in safetensors, such as BF16 or F8_E4M3.
        shape: Sizes of the dimensions.
        file: File that holds the tensor.
        begin: Place of its first byte in the file.
        end: Place after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int = 0
    end: int = 0

    def read(self, *, scattered: bool = False) -> torch.Tensor:
        """Return the tensor. It is mapped by itself, so that its pages go when nobody holds it any more.

        Args:
            scattered: Whether only some elements will be looked at: nothing beside them is read from the disk.
        """
        if self.begin == self.end:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        page = self.begin - self.begin % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), self.end - page, access=mmap.ACCESS_COPY, offset=page)
        if scattered:
            mapped.madvise(mmap.MADV_RANDOM)
        count = (self.end - self.begin) // DTYPES[self.dtype].itemsize
        return torch.frombuffer(mapped, dtype=DTYPES[self.dtype], count=count, offset=self.begin - page).reshape(
            self.shape
        )


def some(names: Iterable[str]) -> str:
    """Return the first of the tensors `names`, in order, and how many there are, for an error."""
    ordered = sorted(names)
    counted = f"{len(ordered)} tensor{'s' if len(ordered) > 1 else ''}"
    return f"{counted} ({', '.join(ordered[:NAMED])}{', …' if len(ordered) > NAMED else ''})"


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: one, or those that an index names."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
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
    if not file.is_file():
        raise ModelError(f"{file} cannot be loaded: it is missing, or no file; copy or download it again")
    try:
        with safe_open(file, framework="np") as tensors:  # torch's reserves memory for all of the file
            yield tensors
    except SafetensorError as error:
        raise ModelError(f"{file} cannot be loaded: it is damaged ({error}); copy or download it again") from error


def _headers(path: Path) -> Iterator[tuple[str, Stored]]:
    """Give each tensor of a file by its name; safetensors' own code has checked that places and sizes agree."""
    with opened(path), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name, Stored(entry["dtype"], tuple(entry["shape"]), path, begin, end)


def read_headers(folder: Path) -> dict[str, Stored]:
    """Return each tensor of the safetensors checkpoint in `folder`, by its name; only headers are read.

    Raises:
        ModelError: A file is missing or damaged, holds less than the index says, or a tensor is there twice.
    """
    stored: dict[str, Stored] = {}
    for file in checkpoint_files(folder):
        for name, found in _headers(file):
            if name in stored:
                raise ModelError(f"{file} and {stored[name].file.name} both hold {name}: remove the wrong one")
            stored[name] = found
    index = folder / INDEX
    if index.is_file() and not (folder / WEIGHTS).is_file():
        lost = json.loads(index.read_bytes())["weight_map"].keys() - stored.keys()
        if lost:
            raise ModelError(
                f"{index} names {some(lost)} that its files do not hold: copy or download the model again, whole"
            )
    return stored
