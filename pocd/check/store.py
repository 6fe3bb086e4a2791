"""Checks of the store: can it be used, how fast does its disk sync, how much room is there? They change nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import statistics
import struct
import tempfile
from typing import TYPE_CHECKING

from pocd.check.finding import Finding, green, red, yellow
from pocd.delivery.keeper import MIB
from pocd.store.place import exposure
from pocd.store.schema import APPLICATION_ID, VERSION

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pocd.config.settings import StoreSettings

AS_ITS_USER = "check as the daemon's user (sudo pocd check does, where it is a service)"
SYNCS = 5
SLOW_SYNC = 0.020  # seconds; each batch of nonces waits for one
# SQLite's file format, section 1.3, and os_unix.c for where it locks.
_MAGIC = b"SQLite format 3\0"
_LOCKS = struct.Struct("hhqqi")  # struct flock of 64-bit Linux
_FIRST_LOCK, _LOCK_BYTES = 0x40000000, 512


def holder(path: Path) -> int | None:
    """Return the id of the process that holds the store at `path`, as a running daemon does, or None.

    The kernel is asked without taking a lock: a daemon that starts just now is not disturbed.
    """
    try:
        with path.open("rb") as file:
            question = _LOCKS.pack(fcntl.F_WRLCK, os.SEEK_SET, _FIRST_LOCK, _LOCK_BYTES, 0)
            kind, _, _, _, process = _LOCKS.unpack(fcntl.fcntl(file, fcntl.F_GETLK, question))
    except OSError:
        return None  # what is wrong with the file is another finding
    return None if kind == fcntl.F_UNLCK else process


def chain_of(path: Path) -> str | None:
    """Return the id of the chain that the store at `path`, which nobody holds, belongs to; None if unknown.

    It is read as if nobody could write it, which makes no files beside it; what only the write-ahead log holds, after
    a crash, is not seen.
    """
    if not path.is_file():
        return None
    with contextlib.suppress(sqlite3.Error):
        uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            row = connection.execute("SELECT value FROM meta WHERE key = 'chain_id'").fetchone()
            return None if row is None else str(row[0])
    return None


def check_store(path: Path, held: int | None) -> Finding:
    """Check whether this user could run a daemon on the store."""
    try:
        return _check_folder(path) or _check_file(path, held)
    except PermissionError as error:
        text = f"user {os.geteuid()} may not look at {error.filename or path}"
        return red("store", text, AS_ITS_USER)


def _check_folder(path: Path) -> Finding | None:
    name, folder = "store", _existing(path.parent)
    if not folder.is_dir():
        return red(name, f"{path} cannot be made: {folder} is not a folder", "choose another store.path")
    if os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        return None
    mend = "give it the folder (chown)" if folder == path.parent else f"make it the folder {path.parent}"
    remedy = f"{AS_ITS_USER}; if this is it, {mend}, mount it writable, or choose another store.path"
    return red(name, f"{folder} cannot be written by user {os.geteuid()}", remedy)


def _check_file(path: Path, held: int | None) -> Finding:
    name, user = "store", f"user {os.geteuid()}"
    if not path.exists() and not path.is_symlink():
        return green(name, f"{path} will be made at the first start; {_existing(path.parent)} is writable by {user}")
    problem = _problem(path)
    if problem is not None:
        return red(name, *problem)
    if told := exposure(path):
        text, _, remedy = told.rpartition(": ")
        return yellow(name, text, remedy)
    return green(
        name, f"{path}, writable by {user}" if held is None else f"{path} is held by process {held}: pocd runs"
    )


def _problem(path: Path) -> tuple[str, str] | None:
    """Return the problem of the file at `path` and the remedy; None where there is none."""
    if not path.is_file():
        return f"{path} is not a file", "choose another store.path"
    for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        if file.exists() and not os.access(file, os.R_OK | os.W_OK, effective_ids=True):
            return (
                f"{file} cannot be written by user {os.geteuid()}; it belongs to user {file.stat().st_uid}",
                f"give it back to the daemon's user: chown --reference={path.parent} {file}",
            )
    return _foreign(path)


def _foreign(path: Path) -> tuple[str, str] | None:
    """Return why the file at `path` is not our store or is too new, and the remedy; None where it is usable."""
    with path.open("rb") as stream:
        head = stream.read(100)
    if not head:
        return None  # SQLite's empty database
    if len(head) < 100 or not head.startswith(_MAGIC):
        return f"{path} is not a SQLite database", "choose another store.path"
    pages, version, application = (int.from_bytes(head[at : at + 4]) for at in (28, 60, 68))
    empty = application == 0 and pages <= 1  # made, and what is in it may yet be in the write-ahead log
    if application != APPLICATION_ID and not empty:
        return f"{path} is another program's database", "choose another store.path"
    if version > VERSION:
        return f"{path} has version {version}, made by a newer pocd (this one writes {VERSION})", "install that pocd"
    return None


def check_syncs(path: Path, monotonic: Callable[[], float]) -> Finding | None:
    """Check how long the store's disk takes to sync; None where `check_store` has reported its problem already."""
    name = "fsync"
    try:
        if _check_folder(path):
            return None
        folder = _existing(path.parent)
        seconds = median_sync(folder, monotonic)
    except PermissionError:
        return None
    except OSError as error:
        return red(name, f"{path.parent} cannot be written: {error.strerror}", "make room on this disk, or mend it")
    text = f"{seconds * 1000:.1f} ms in {folder}, the median of {SYNCS}"
    if seconds > SLOW_SYNC:
        return yellow(name, text, "put store.path on a local SSD, away from what else keeps this disk busy")
    return green(name, text)


def median_sync(folder: Path, monotonic: Callable[[], float]) -> float:
    """Return the seconds that writing and syncing 4 KiB in `folder` takes; the file is removed again.

    Raises:
        OSError: The folder cannot be written.
    """
    took = []
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".pocd-check-", buffering=0) as file:
        for _ in range(SYNCS):
            began = monotonic()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            took.append(monotonic() - began)
    return statistics.median(took)


def check_space(store: StoreSettings) -> Finding | None:
    """Check that the store's disk has more room than has to stay free."""
    try:
        folder = _existing(store.path.parent)
    except PermissionError:
        return None
    free = shutil.disk_usage(folder).free // MIB
    text = f"{free} MiB free in {folder}, of which store.free_space_mib = {store.free_space_mib} stay free"
    if free < store.free_space_mib:
        return red("disk space", f"{text}: mining waits", "make room on this disk, or lower store.free_space_mib")
    return green("disk space", text)


def _existing(folder: Path) -> Path:
    """Return `folder`, or the nearest above it that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())
