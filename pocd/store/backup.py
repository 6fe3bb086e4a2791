"""Copies of the store: made while it is in use, and put back.

SQLite's online backup copies what is committed, page by page, while others go on writing.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from pocd.process import EXIT_CRASH
from pocd.store.errors import StoreError, damaged, unusable
from pocd.store.opening import renew_epoch, sync, wal_of
from pocd.store.schema import APPLICATION_ID, VERSION

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAGES = 256  # copied at once; then the store's own thread gets its turn
PAUSE_SECONDS = 0.001


class BackupError(StoreError):
    """A copy cannot be made or put back; the message names the file and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, EXIT_CRASH)


def back_up(source: sqlite3.Connection, file: Path, step: Callable[[], object] = lambda: None) -> int:
    """Copy the store that `source` has open into the new `file`, which is on disk when this returns.

    Args:
        source: The connection; others may use it meanwhile, in their thread.
        file: A path where nothing is.
        step: Called after each piece; an error that it raises ends the copy.

    Returns:
        Bytes of the copy.

    Raises:
        BackupError: The file is there already, or cannot be written.
    """

    def pause(*_: object) -> None:
        step()
        time.sleep(PAUSE_SECONDS)

    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise BackupError(f"{file} is there already and was left as it is: name a new file") from None
    except OSError as error:
        raise BackupError(f"{file} cannot be made: {error.strerror}; name a file where this user may write") from None
    try:
        with closing(sqlite3.connect(file, isolation_level=None)) as copy:
            copy.execute("PRAGMA synchronous = OFF")  # it is synced once, at the end
            source.backup(copy, pages=PAGES, progress=pause, sleep=PAUSE_SECONDS)
            copy.execute("PRAGMA journal_mode = DELETE")
            renew_epoch(copy)
        _sync(file)
    except BaseException as error:
        file.unlink(missing_ok=True)
        if isinstance(error, (sqlite3.Error, OSError)):
            raise BackupError(f"{file} cannot be written: {error}; nothing is left of it") from error
        raise
    return file.stat().st_size


def back_up_closed(path: Path, file: Path) -> int:
    """Copy the store at `path`, which no daemon holds; see `back_up`."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None)) as source:
            source.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            return back_up(source, file)
    except sqlite3.Error as error:
        raise unusable(path, error) from error


def restore(path: Path, file: Path, stamp: str) -> Path | None:
    """Put the copy `file` at `path`; what was there, with its write-ahead log, is moved aside. No daemon may hold it.

    Args:
        path: The store's path.
        file: A copy, which is kept.
        stamp: Part of the name of what is moved aside.

    Returns:
        Where the earlier store is; None where there was none.

    Raises:
        BackupError: The copy is not a whole store that this pocd can use, or the files cannot be written.
    """
    _check_copy(file)
    made = path.with_name(f"{path.name}.restoring")
    aside = path.with_name(f"{path.name}.{stamp}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, made)
        owner = (path if path.exists() else path.parent).stat()
        os.chown(made, owner.st_uid, owner.st_gid)
        _sync(made)
        moved = path.exists()
        for end in ("-wal", "-shm", ""):  # in this order: without its log a file may miss what was stored last
            with suppress(FileNotFoundError):
                path.with_name(path.name + end).rename(aside.with_name(aside.name + end))
        made.rename(path)
        _sync(path)
    except OSError as error:
        with suppress(OSError):
            made.unlink(missing_ok=True)  # half a copy would keep what a full disk lacks
        raise BackupError(f"{file} cannot be put at {path}: {error.strerror}") from error
    return aside if moved else None


def _check_copy(file: Path) -> None:
    """Refuse what is not a whole store of ours."""
    if not file.is_file():
        raise BackupError(f"{file} is not a file")
    if wal_of(file).exists() and wal_of(file).stat().st_size:
        raise BackupError(f"{file} has a write-ahead log beside it: it is a store, not a copy by `pocd outbox backup`")
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as copy:
            (application,) = copy.execute("PRAGMA application_id").fetchone()
            (version,) = copy.execute("PRAGMA user_version").fetchone()
            (finding,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as error:
        raise BackupError(f"{file} cannot be read as a store: {error}") from error
    if application != APPLICATION_ID or version > VERSION:
        raise BackupError(f"{file} is not a store of this pocd")
    if finding != "ok":
        raise BackupError(damaged(file, finding.splitlines()[-1]))


def _sync(file: Path) -> None:
    """Bring a file and its name to the disk."""
    sync(file)
    sync(file.parent)
