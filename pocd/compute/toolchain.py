"""What torch's compiler needs of a host. This does not import torch, so that every process may ask."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that torch's compiler lacks on this host.

    Attributes:
        text: The lack, for people.
        remedy: What to do about it.
    """

    text: str
    remedy: str


def find_lack(
    device: str, environment: Mapping[str, str], *, include: Path | None = None, cache: Path | None = None
) -> Lack | None:
    """Return what torch's compiler lacks; None where nothing is missing.

    Args:
        device: Kind of device to compile for: cpu or cuda.
        environment: The environment of the process that compiles.
        include: Folder of Python's own headers; None for this Python's.
        cache: Folder of what Triton compiles; None for what the environment says.
    """
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return Lack("triton, torch's compiler for GPUs, is not installed", "install triton beside torch")
    variable, language, names = ("CC", "C", ["gcc", "clang"]) if device == "cuda" else ("CXX", "C++", ["g++"])
    names = [environment[variable]] if variable in environment else names
    if not any(shutil.which(name, path=environment.get("PATH")) for name in names):
        package = "gcc" if device == "cuda" else "g++"
        return Lack(f"there is no {language} compiler ({' or '.join(names)})", f"install one (Debian: {package})")
    header = (include or Path(sysconfig.get_paths()["include"])) / "Python.h"
    if not header.is_file():
        return Lack(f"there is no {header}", "install this Python's headers (Debian: python3-dev)")
    folder = cache or Path(environment.get("TRITON_CACHE_DIR", Path.home() / ".triton"))
    if device == "cuda" and not _is_executable(folder):
        return Lack(
            f"nothing in {folder} may be executed: it is mounted noexec", "set worker.cache to a folder without noexec"
        )
    return None


def _is_executable(folder: Path) -> bool:
    """Tell whether what lies in a folder, or will once that is made, may be executed."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return not os.statvfs(there).f_flag & os.ST_NOEXEC
