"""The store's file: opening, checking, making and migrating it."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from pocd.store.errors import StoreError, damaged, unusable
from pocd.store.schema import APPLICATION_ID, MIGRATIONS, SCHEMA, VERSION

if TYPE_CHECKING:
    from pathlib import Path

LOOKED_THROUGH_BYTES = 256 * 2**20
"""A file up to this size is looked through for damage when it is opened (about a third of a second)."""

WAL_BYTES = 64 * 2**20  # what the write-ahead log is cut back to


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
            raise StoreError(damaged(path, finding.splitlines()[-1]))
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
