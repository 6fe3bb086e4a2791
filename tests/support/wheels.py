"""Wheels of packages that are installed here, made again."""

from __future__ import annotations

import zipfile
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def rebuild(name: str, folder: Path, source: Path | None = None) -> Path:
    """Make the wheel of an installed package of plain Python.

    Args:
        name: The package.
        folder: Where the wheel is written.
        source: Folder of the package's code, where it is installed in place (editable).
    """
    package = metadata.distribution(name)
    made = folder / f"{name.replace('-', '_')}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for file in package.files or []:
            if file.suffix not in {".pyc", ".pth"} and file.name != "direct_url.json" and ".." not in file.parts:
                archive.write(str(file.locate()), str(file))
        for each in sorted(source.rglob("*")) if source else []:
            if each.is_file() and each.suffix != ".pyc":
                archive.write(each, each.relative_to(source.parent if source else each))
    return made
