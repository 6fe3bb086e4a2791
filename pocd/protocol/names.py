"""Names of models, precisions and devices; without torch, so that mistakes are reported at once."""

from __future__ import annotations

import math
import re
import stat
from pathlib import Path
from typing import Literal, get_args

from pocd.protocol.errors import InputError, ModelAwayError, ModelError
from pocd.protocol.schemes import RANDOM_HEAD_DIM, VECTOR_SIZE, Scheme

BUNDLED = Path(__file__).resolve().parent.parent / "models"

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
Compile = Literal["auto", "always", "never"]
ChainKind = Literal["cometbft", "evm", "gonka"]
OnRounding = Literal["warn", "refuse"]  # where rounding decides too much
# How far two honest distances of one nonce in one dtype may lie apart, where distances are made in 8192 dimensions:
# docs/protocol.md, "Agreement", measured there.
TOLERANCE: dict[str, float] = {"float32": 1e-5, "float16": 5e-4, "bfloat16": 2e-3}
PRODUCT_ROUNDING = 2.0
# How far two honest vectors' numbers may lie apart on the bundled models where their standard deviation is 1. Of a
# vector of unit length it is 12^(-1/2).
VECTOR_TOLERANCE: dict[str, float] = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.15}
LARGEST_BATCH = 2**16  # positions of a batch where batch_size is "auto": more of them make no device faster
DEVICE_PATTERN = r"^(cpu|cuda(:[0-9]+)?)$"


def default_tolerance(dtype: str, scheme: Scheme, hidden_size: int) -> float:
    """Return how far two honest distances of one nonce in `dtype`, or numbers of its vector, may lie apart.

    Without a head distances are made in the hidden space, where they vary √(8192/H) times as much; and a product
    magnifies rounding.
    """
    if scheme.output == "vector":
        return VECTOR_TOLERANCE[dtype] * (VECTOR_SIZE**-0.5 if scheme.head == "pick" else 1.0)
    scale = PRODUCT_ROUNDING * math.sqrt(RANDOM_HEAD_DIM / hidden_size) if scheme.head == "none" else 1.0
    return TOLERANCE[dtype] * scale


def largest_batch_size(seq_len: int) -> int:
    """Return the largest batch size, in nonces, that batch_size = "auto" can come to: a power of two, or 1."""
    return 1 << max(0, (LARGEST_BATCH // seq_len).bit_length() - 1)


def check_dtype(name: str) -> None:
    """Raise an InputError for an unknown precision."""
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; allowed are: {', '.join(DTYPES)}")


def check_device(name: str) -> None:
    """Raise an InputError for a name that no device can have; this does not check that the device exists."""
    if not re.fullmatch(DEVICE_PATTERN, name):
        raise InputError(f"device {name!r} is unknown; allowed are: cpu, cuda, cuda:N")


def _is_file(path: Path) -> bool:
    """Tell whether a file is there; a folder that may not be looked into raises, in every version of Python."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def resolve(name: str, revision: str | None = None) -> str:
    """Turn a configured name into what transformers loads: a local path or a hub id.

    Raises:
        ModelAwayError: The local folder does not exist, or is empty.
        ModelError: The bundled model does not exist, the folder holds none, or it has a revision.
        OSError: The local folder cannot be looked at.
    """
    is_local = name.startswith(("bundled:", "/", "./", "../", "~"))
    if is_local and revision is not None:
        raise ModelError(f"model {name!r} is a folder; a revision ({revision!r}) belongs to a hub id")
    if name.startswith("bundled:"):
        path = BUNDLED / name.removeprefix("bundled:")
        if not (path / "config.json").is_file():
            known = ", ".join(sorted(f"bundled:{p.parent.name}" for p in BUNDLED.glob("*/config.json")))
            raise ModelError(f"model {name!r} is not bundled; the bundled ones are: {known}")
        return str(path)
    if is_local:
        path = Path(name).expanduser()
        if not _is_file(path / "config.json"):
            missing = f"model {name!r}: there is no {path / 'config.json'}"
            if not path.exists() or (path.is_dir() and not any(path.iterdir())):
                raise ModelAwayError(
                    f"{missing}, nor anything beside it; mount what holds it, or give a model's folder"
                )
            raise ModelError(f"{missing}; give a model's folder")
        return str(path)
    return name
