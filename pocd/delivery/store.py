"""The outbox's file: opened, checked, and made where it is missing."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 2
APPLICATION_ID = 0x706F6364  # "pocd"

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE totals (checked INTEGER NOT NULL, valid INTEGER NOT NULL, stored INTEGER NOT NULL,
  delivered INTEGER NOT NULL) STRICT;
INSERT INTO totals VALUES (0, 0, 0, 0);
CREATE TABLE rounds (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, round TEXT NOT NULL,
  seen_at REAL NOT NULL) STRICT;
-- What one node has checked of one round; islands is a JSON list of [start, stop] above the cursor.
CREATE TABLE progress (round INTEGER NOT NULL REFERENCES rounds, node_id INTEGER NOT NULL,
  node_count INTEGER NOT NULL, cursor INTEGER NOT NULL, islands TEXT NOT NULL,
  checked INTEGER NOT NULL, valid INTEGER NOT NULL,
  PRIMARY KEY (round, node_id, node_count)) STRICT, WITHOUT ROWID;
-- Valid nonces that no batch holds yet.
CREATE TABLE proofs (number INTEGER PRIMARY KEY AUTOINCREMENT, round INTEGER NOT NULL REFERENCES rounds,
  node_id INTEGER NOT NULL, nonce INTEGER NOT NULL, distance REAL NOT NULL, found_at REAL NOT NULL,
  fingerprint TEXT) STRICT;
CREATE TABLE batches (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, kind TEXT NOT NULL,
  nonces INTEGER NOT NULL, body BLOB NOT NULL, created_at REAL NOT NULL) STRICT;
CREATE TABLE deliveries (batch INTEGER NOT NULL REFERENCES batches, receiver TEXT NOT NULL,
  attempts INTEGER NOT NULL, next_at REAL NOT NULL, last_error TEXT, delivered_at REAL,
  PRIMARY KEY (receiver, batch)) STRICT, WITHOUT ROWID;
CREATE INDEX pending ON deliveries (receiver, batch) WHERE delivered_at IS NULL;
CREATE INDEX pending_of_batch ON deliveries (batch) WHERE delivered_at IS NULL;
"""

# What makes a store of each version one of the next. Proofs of version 1 do not say which weights they are of.
MIGRATIONS = {1: "ALTER TABLE proofs ADD COLUMN fingerprint TEXT"}


class StoreError(Exception):
    """The store cannot be used; the message names the file and what to do."""


class StoreUnavailableError(Exception):
    """The open store cannot take a write now; the message names the file and what to do."""


def open_store(path: Path) -> sqlite3.Connection:
    """Open the store at `path`, making it and its folder where they are missing.

    The connection holds the file alone, writes ahead (WAL) and fsyncs each transaction.

    Raises:
        StoreError: The file cannot be written, is held by another daemon, or is not ours.
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
    """Refuse what is not ours, changing nothing; return the store's version, 0 where it has yet to be made."""
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
    connection.execute("COMMIT")
    assert isinstance(version, int)
    return version if tables else 0


def _bring_up_to_date(connection: sqlite3.Connection, version: int) -> None:
    """Make the tables, or change those of an earlier version, in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    if version == 0:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        for statement in SCHEMA.split(";\n"):
            connection.execute(statement)
    else:
        for earlier in range(version, VERSION):
            connection.execute(MIGRATIONS[earlier])
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def unusable(path: Path, error: sqlite3.Error) -> StoreError:
    """Say of the store at `path` what SQLite's `error` means for the operator."""
    text = str(error)
    if "locked" in text:
        text = "another process holds it (is a second daemon running on it?); stop that one or choose another path"
    elif "not a database" in text:
        text = "it is not a SQLite database; choose another store.path (the file was not touched)"
    else:
        text = f"{text}; check store.path, its permissions and the free space"
    return StoreError(f"store {path} cannot be used: {text}")
