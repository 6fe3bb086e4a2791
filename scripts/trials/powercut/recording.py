"""A program run with every write of its files recorded, by a library that is compiled here and preloaded there."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pocd.process import EXIT_CRASH, EndedError
from scripts.trials.powercut.disk import Operation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.trials.powercut.disk import Kind

RECORDER = Path(__file__).with_name("recorder.c")
LIMIT_SECONDS = 3600.0
MEMORY = Path("/dev/shm")  # noqa: S108 - it is used through tempfile; what is synced there is recorded all the same
_HEAD = struct.Struct("<cxHIq")  # kind, lengths of name and data, offset; then the name, then the data
_KINDS: dict[bytes, Kind] = {
    b"c": "create",
    b"m": "folder",
    b"w": "write",
    b"t": "truncate",
    b"s": "sync",
    b"u": "unlink",
    b"r": "rename",
}


def compiler() -> str | None:
    """Return the C compiler of this machine; None where there is none."""
    return shutil.which("cc") or shutil.which("gcc")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give an empty folder, in memory where the system has that: thousands of stores are opened in it."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


def recorded(beside: Path, folder: Path, runs: list[list[str]]) -> list[Operation]:
    """Run Python once after another, and return what was done to the files below `folder`, in order.

    Args:
        beside: A folder outside it, for the library and its log.
        folder: The folder that is watched.
        runs: Arguments of Python, for each run.

    Raises:
        EndedError: The library cannot be compiled, or a run fails.
    """
    library, log = beside / "recorder.so", beside / "operations"
    command = compiler()
    if command is None:
        raise EndedError(EXIT_CRASH, "a C compiler is needed, cc or gcc")
    _run([command, "-O1", "-shared", "-fPIC", "-o", str(library), str(RECORDER)], dict(os.environ))
    log.unlink(missing_ok=True)
    watched = {"LD_PRELOAD": str(library), "POWERCUT_FOLDER": str(folder.resolve()), "POWERCUT_LOG": str(log)}
    for arguments in runs:
        _run([sys.executable, *arguments], os.environ | watched)
    return list(_parsed(log.read_bytes()))


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(  # noqa: S603 - a command of our own
        command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    if done.returncode:
        raise EndedError(EXIT_CRASH, f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")


def _parsed(log: bytes) -> Iterator[Operation]:
    at = 0
    while at < len(log):
        kind, name, data, offset = _HEAD.unpack_from(log, at)
        at += _HEAD.size
        yield Operation(_KINDS[kind], log[at : at + name].decode(), offset, log[at + name : at + name + data])
        at += name + data
