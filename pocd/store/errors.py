"""The meaning of SQLite's errors for the daemon and its operator."""

from __future__ import annotations

import errno
import sqlite3
from typing import TYPE_CHECKING

from pocd.process import EXIT_CONFIG, EXIT_TEMPORARY, EndedError, may_pass

if TYPE_CHECKING:
    from pathlib import Path

CLOSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
"""Errors of the system for a folder that is closed to this process, such as by the service's sandbox."""


class StoreError(EndedError):
    """The store cannot be used; the message names the file and what to do.

    The status is `EXIT_CONFIG` where a person has to change something, and `EXIT_TEMPORARY` for what may pass.
    """

    def __init__(self, reason: str, code: int = EXIT_CONFIG) -> None:
        super().__init__(code, reason)


class StoreHeldError(StoreError):
    """Another process holds the store's lock: a daemon that is just ending, a backup, a shell."""


class StoreDamagedError(StoreError):
    """What is on disk is not what was written, or could not be read at this look."""


class StoreUnavailableError(Exception):
    """The store cannot write or read just now: a full disk, an I/O error. Nothing that is stored is lost."""


def unusable(path: Path, error: sqlite3.Error) -> StoreError:
    """Return the error for the operator when SQLite's `error` keeps the store at `path` from being opened."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_CORRUPT"):
        return StoreDamagedError(damaged(path, str(error)))
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        text = "another process holds it (is a second daemon running on it?); stop that one or choose another path"
        return StoreHeldError(f"store {path} cannot be used: {text}", EXIT_TEMPORARY)
    if name == "SQLITE_NOTADB":
        text = "it is not a SQLite database; choose another store.path (the file was not touched)"
        return StoreError(f"store {path} cannot be used: {text}")
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_NOMEM")):
        return StoreError(f"store {path} cannot be used now: {error} ({name}); check its disk", EXIT_TEMPORARY)
    return StoreError(f"store {path} cannot be opened: {error}; check store.path, its permissions and the free space")


def unopened(path: Path, error: OSError) -> StoreError:
    """Return the error for the operator when the system does not let the store at `path` be opened."""
    if may_pass(error):
        return StoreError(f"store {path} cannot be opened now: {error.strerror}; check its disk", EXIT_TEMPORARY)
    hint = "check store.path and its permissions"
    if error.errno in CLOSED:
        hint += (
            "; a service can write in /var/lib/pocd: another folder needs ReadWritePaths= (systemctl edit), has to "
            "belong to the service's user, and cannot be under /home or /root"
        )
    return StoreError(f"store {path} cannot be opened: {error}; {hint}")


def is_damage(error: sqlite3.Error) -> bool:
    """Tell whether SQLite read what nobody wrote: a damaged file, or a disk that could not be read."""
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))


def failure_of(path: Path, error: sqlite3.Error) -> Exception:
    """Return the exception for SQLite's `error` in the store at `path` while it is in use.

    A `StoreUnavailableError` for what may pass, and the error itself where the fault is ours.
    """
    name = getattr(error, "sqlite_errorname", "")
    if is_damage(error):
        return StoreUnavailableError(f"the store {path} cannot be read: {error} ({name}); it is looked at again")
    if isinstance(error, sqlite3.OperationalError) and name and name != "SQLITE_ERROR":  # that one: a wrong statement
        return StoreUnavailableError(f"the store {path} cannot be written: {error} ({name})")
    return error


def damaged(path: Path, finding: str) -> str:
    """Return the text for the operator about a damaged store at `path`, with the remedy."""
    return (
        f"store {path} is damaged: {finding}; the file was kept as it is. Move it and its -wal file away, save what "
        f"can be saved with `sqlite3 {path.name} .recover`, and start again with a new store"
    )
