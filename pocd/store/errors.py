"""The meaning of SQLite's errors for the daemon and its operator."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from pocd.process import ForeseenError

if TYPE_CHECKING:
    from pathlib import Path


class StoreError(ForeseenError):
    """The store cannot be used; the message names the file and what to do."""


class StoreUnavailableError(Exception):
    """The store cannot write or read just now: a full disk, an I/O error. Nothing that is stored is lost."""


def unusable(path: Path, error: sqlite3.Error) -> StoreError:
    """Return the error for the operator when SQLite's `error` keeps the store at `path` from being opened."""
    if isdamaged(error):
        return StoreError(damaged(path, str(error)))
    text = str(error)
    if "locked" in text:
        text = "another process holds it (is a second daemon running on it?); stop that one or choose another path"
    elif "not a database" in text:
        text = "it is not a SQLite database; choose another store.path (the file was not touched)"
    else:
        text = f"{text}; check store.path, its permissions and the free space"
    return StoreError(f"store {path} cannot be used: {text}")


def isdamaged(error: sqlite3.Error) -> bool:
    """Tell whether `error` means that what is on disk is not what was written."""
    return getattr(error, "sqlite_errorname", "").startswith("SQLITE_CORRUPT")


def failure_of(path: Path, error: sqlite3.Error) -> Exception:
    """Return the exception for SQLite's `error` in the store at `path` while it is in use.

    A `StoreError` for a damaged file, a `StoreUnavailableError` for what may pass, and the error itself where the
    fault is ours.
    """
    if isdamaged(error):
        return StoreError(damaged(path, str(error)))
    if isinstance(error, sqlite3.OperationalError) and not isinstance(error, sqlite3.ProgrammingError):
        name = getattr(error, "sqlite_errorname", "")
        if name and name != "SQLITE_ERROR":  # that one is a wrong statement
            return StoreUnavailableError(f"the store {path} cannot be written: {error} ({name})")
    return error


def damaged(path: Path, finding: str) -> str:
    """Return the text for the operator about a damaged store at `path`, with the remedy."""
    return (
        f"store {path} is damaged: {finding}; the file was kept as it is. Move it and its -wal file away, save what "
        f"can be saved with `sqlite3 {path.name} .recover`, and start again with a new store"
    )
