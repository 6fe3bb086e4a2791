"""The store's file: opening, checking, making and migrating it; and the meaning of SQLite's errors."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from pocd.store.schema import APPLICATION_ID, MIGRATIONS, SCHEMA, VERSION

if TYPE_CHECKING:
    from pathlib import Path

LOOKED_THROUGH_BYTES = 256 * 2**20
"""A file up to this size is looked through for damage when it is opened (about a third of a second)."""

WAL_BYTES = 64 * 2**20  # what the write-ahead log is cut back to


class StoreError(Exception):
    """The store cannot be used; the message names the file and what to do."""


class StoreUnavailableError(Exception):
    """The store cannot write or read just now: a full disk, an I/O error. Nothing that is stored is lost."""


def open_store(path: Path) -> sqlite3.Connection:
    """Open the store at `path`, making it and its folder where they are missing.

    The connection holds the file alone, writes ahead (WAL) and fsyncs each transaction.

    Raises:
        StoreError: The file cannot be written, is damaged, is held by another daemon, or is not ours.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"store {path} cannot be opened: {error}; check store.path and its permissions") from error
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        version = _check(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")  # not before the check: it rewrites the file's header
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        connection.execute("PRAGMA foreign_keys = ON")
        _bring_up_to_date(connection, version)
    except sqlite3.Error as error:
        connection.close()
        raise unusable(path, error) from error
    except StoreError:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection, path: Path) -> int:
    """Refuse a foreign, newer or damaged file, changing nothing; return its version, 0 for an empty file."""
    connection.execute("BEGIN IMMEDIATE")  # takes the lock that a second daemon will miss
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and application != APPLICATION_ID:
        raise StoreError(f"store {path} is another program's database; choose another store.path")
    if version > VERSION:
        raise StoreError(
            f"store {path} has version {version}, made by a newer pocd (this one writes {VERSION}); "
            "install that pocd again, the file was not touched"
        )
    # A larger file would hold up every start; what is damaged in it is found when it is read.
    if path.stat().st_size <= LOOKED_THROUGH_BYTES:
        (finding,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if finding != "ok":
            raise StoreError(_damaged(path, finding.splitlines()[-1]))
    connection.execute("COMMIT")
    assert isinstance(version, int)
    return version if tables else 0


def _bring_up_to_date(connection: sqlite3.Connection, version: int) -> None:
    """Make the tables, or change those of an earlier version, in one transaction."""
    if version == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    if version == 0:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        statements = SCHEMA
    else:
        statements = [statement for earlier in range(version, VERSION) for statement in MIGRATIONS[earlier]]
    for statement in statements:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def unusable(path: Path, error: sqlite3.Error) -> StoreError:
    """Return the error for the operator when SQLite's `error` keeps the store at `path` from being opened."""
    if is_damaged(error):
        return StoreError(_damaged(path, str(error)))
    text = str(error)
    if "locked" in text:
        text = "another process holds it (is a second daemon running on it?); stop that one or choose another path"
    elif "not a database" in text:
        text = "it is not a SQLite database; choose another store.path (the file was not touched)"
    else:
        text = f"{text}; check store.path, its permissions and the free space"
    return StoreError(f"store {path} cannot be used: {text}")


def is_damaged(error: sqlite3.Error) -> bool:
    """Tell whether `error` means that what is on disk is not what was written."""
    return getattr(error, "sqlite_errorname", "").startswith("SQLITE_CORRUPT")


def failure_of(path: Path, error: sqlite3.Error) -> Exception:
    """Return the exception for SQLite's `error` in the store at `path` while it is in use.

    A `StoreError` for a damaged file, a `StoreUnavailableError` for what may pass, and the error itself where the
    fault is ours.
    """
    if is_damaged(error):
        return StoreError(_damaged(path, str(error)))
    if isinstance(error, sqlite3.OperationalError) and not isinstance(error, sqlite3.ProgrammingError):
        name = getattr(error, "sqlite_errorname", "")
        if name and name != "SQLITE_ERROR":  # that one is a wrong statement
            return StoreUnavailableError(f"the store {path} cannot be written: {error} ({name})")
    return error


def _damaged(path: Path, finding: str) -> str:
    return (
        f"store {path} is damaged: {finding}; the file was kept as it is. Move it and its -wal file away, save what "
        f"can be saved with `sqlite3 {path.name} .recover`, and start again with a new store"
    )
