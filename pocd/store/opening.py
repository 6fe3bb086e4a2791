"""The store's file: opening, checking, making and migrating it."""

from __future__ import annotations

import os
import re
import sqlite3
import struct
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from pocd.store.errors import StoreDamagedError, StoreError, StoreHeldError, damaged, unopened, unusable
from pocd.store.schema import APPLICATION_ID, MIGRATIONS, SCHEMA, VERSION

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LOOKED_THROUGH_BYTES = 256 * 2**20
"""A file up to this size is looked through for damage when it is opened (about a third of a second)."""

WAL_BYTES = 64 * 2**20  # what the write-ahead log is cut back to
MARK = "INSERT INTO meta VALUES ('commits', '1') ON CONFLICT DO UPDATE SET value = value + 1"
"""Part of every transaction: so the page with the epoch is in every write-ahead log."""

HELD_SECONDS = 10.0  # that a start waits for another process: a predecessor still ending, a backup
TRY_SECONDS = 0.1
READ_BYTES = 2**20


def open_store(
    path: Path, *, thorough: bool = False, waiting: Callable[[str], None] = lambda _: None
) -> sqlite3.Connection:
    """Open the store at `path`, making it and its folder where they are missing.

    The connection holds the file alone, writes ahead (WAL) and fsyncs each transaction. A lock that another process
    holds is waited for, some seconds. Damage is believed when it is found twice in a file that can be read.

    Args:
        path: The store's file.
        thorough: Whether to look through a file of any size, and its indexes as well.
        waiting: Told once why it waits.

    Raises:
        StoreError: The file cannot be written, is damaged, is held by another daemon, or is not ours.
    """
    deadline, told, suspected = time.monotonic() + HELD_SECONDS, False, False
    while True:
        try:
            return _open(path, thorough=thorough)
        except StoreHeldError as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                waiting(str(error))
                told = True
            time.sleep(TRY_SECONDS)
        except StoreDamagedError:
            _read_through(path)
            if suspected:
                raise
            suspected = True


def _open(path: Path, *, thorough: bool) -> sqlite3.Connection:
    try:
        _make_folder(path.parent)
        if path.exists() and not path.is_file():  # SQLite opens a pipe or a device, and takes its errors for the disk's
            raise StoreError(f"store {path} cannot be used: it is no plain file; choose another store.path")
        _refuse_mixture(path)
        # A backup runs in another thread: the library serialises calls.
        connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    except OSError as error:
        raise unopened(path, error) from error
    except sqlite3.Error as error:
        raise _why_not(path, error) from error
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        version = _check(connection, path, thorough=thorough)
        connection.execute("PRAGMA journal_mode = WAL")  # not before the check: it rewrites the file's header
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        connection.execute("PRAGMA foreign_keys = ON")
        _bring_up_to_date(connection, version)
        with suppress(sqlite3.OperationalError):  # on a full disk the old one does
            renew_epoch(connection)
    except sqlite3.Error as error:
        connection.close()
        raise unusable(path, error) from error
    except StoreError:
        connection.close()
        raise
    return connection


def _make_folder(folder: Path) -> None:
    """Make a folder that only its user may enter, and those above it where they are missing; their names are synced."""
    for each in reversed([folder, *folder.parents]):
        if not each.is_dir():
            each.mkdir(mode=0o700, exist_ok=True)
            with suppress(OSError):  # some file systems sync no folder
                sync(each.parent)


def sync(path: Path) -> None:
    """Bring what is written to a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_not(path: Path, error: sqlite3.Error) -> StoreError:
    """Ask the system why the file cannot be opened: SQLite does not say."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
    except OSError as found:
        return unopened(path, found)
    return unusable(path, error)


def _read_through(path: Path) -> None:
    """Read the files of a store that seems damaged: SQLite takes some errors of a disk for damage.

    No connection of this process may be open: to close a file gives up the locks that it has on it.

    Raises:
        StoreError: A file cannot be read.
    """
    try:
        for each in (path, wal_of(path)):
            if each.exists():
                with each.open("rb", buffering=0) as stream:
                    while stream.read(READ_BYTES):
                        pass
    except OSError as error:
        raise unopened(path, error) from error


def wal_of(path: Path) -> Path:
    """Return the file of the write-ahead log of the store at `path`."""
    return path.with_name(f"{path.name}-wal")


def renew_epoch(connection: sqlite3.Connection) -> None:
    """Give the file a name for its life from now on, which its write-ahead log has as well (see `MARK`)."""
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('renewing', '1')")
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', lower(hex(randomblob(16))))")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # into the file; the log begins anew
    connection.execute("DELETE FROM meta WHERE key = 'renewing'")


def _refuse_mixture(path: Path) -> None:
    """Refuse a file that was put back beside the write-ahead log of another time: SQLite would mix them.

    Raises:
        StoreError: The file's epoch is not the log's.
    """
    wal = wal_of(path)
    if not (path.exists() and wal.exists() and wal.stat().st_size):
        return
    file, both = _epoch(path, "immutable=1"), _epoch(path, "cache=private")
    # What was torn by a lost power is mended by the log; and while the epoch is renewed, the two may differ.
    if file and both and "renewing" not in both and re.fullmatch("[0-9a-f]{32}", file.get("epoch", "")):
        if file["epoch"] == both.get("epoch"):
            return
        raise StoreError(
            f"store {path} was put back beside {wal.name}, the write-ahead log of another time; nothing was touched. "
            f"Move both away, and put a copy back with `pocd outbox restore FILE`"
        )


def _epoch(path: Path, how: str) -> dict[str, str]:
    """Return the store's marks without changing it: of the file alone, or of file and log."""
    try:
        uri = f"{path.resolve().as_uri()}?mode=ro&{how}"
        with closing(sqlite3.connect(uri, uri=True, timeout=0)) as connection:
            return dict(connection.execute("SELECT key, value FROM meta WHERE key IN ('epoch', 'renewing')").fetchall())
    except sqlite3.Error:
        return {}  # the opening finds out why


def _check(connection: sqlite3.Connection, path: Path, *, thorough: bool) -> int:
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
    if thorough or path.stat().st_size <= LOOKED_THROUGH_BYTES:
        check = "integrity_check" if thorough else "quick_check"
        (finding,) = connection.execute(f"PRAGMA {check}(1)").fetchone()
        if finding != "ok":
            raise StoreDamagedError(damaged(path, finding.splitlines()[-1]))
    connection.execute("COMMIT")
    assert isinstance(version, int)
    return version if tables else 0


def _bring_up_to_date(connection: sqlite3.Connection, version: int) -> None:
    """Make the tables, or change those of an earlier version, in one transaction."""
    if version == VERSION:
        return
    connection.create_function("packed", 2, struct.pack, deterministic=True)
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
