"""Versions of what decides a worker's results, on whichever machine it runs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from pocd import __version__


def versions() -> dict[str, str]:
    """Return the versions of pocd, Python and torch on this machine; nothing is imported for that.

    Of torch without the build's name: "+cpu" and "+cu126" compute alike, and a cluster may have both.
    """
    try:
        torch = version("torch").partition("+")[0]
    except PackageNotFoundError:
        torch = "missing"
    return {"pocd": __version__, "python": platform.python_version(), "torch": torch}


def differences(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """Return in words which versions differ; empty where none does."""
    return ", ".join(
        f"{name} {theirs.get(name, 'missing')} instead of {ours[name]}"
        for name in ours
        if theirs.get(name) != ours[name]
    )
