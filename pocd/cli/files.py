"""Files that commands read, `-` for standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from pocd.process import EndedError


def name_of(file: str) -> str:
    """Return the name of a file for people."""
    return "standard input" if file == "-" else file


def read_file(file: str, most_bytes: int, wanted: str, code: int) -> bytes:
    """Return the bytes of a file.

    Args:
        file: Path of the file, or `-`.
        most_bytes: Size above which the file is refused.
        wanted: What the file has to hold, for the message.
        code: Exit status where the file cannot be used.

    Raises:
        EndedError: The file cannot be read, or is too large.
    """
    try:
        if file == "-":
            raw = sys.stdin.buffer.read(most_bytes + 1)
        else:
            with Path(file).open("rb") as stream:
                raw = stream.read(most_bytes + 1)
    except OSError as error:
        raise EndedError(code, f"{name_of(file)} cannot be read: {error.strerror}") from None
    if len(raw) > most_bytes:
        raise EndedError(code, f"{name_of(file)} is larger than {most_bytes // 2**20} MiB; {wanted}")
    return raw
