"""Whether the open store is still the file at its path: what is written elsewhere, nobody will find."""

from __future__ import annotations

import stat
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING

from pocd.store.backup import BackupError, back_up
from pocd.store.errors import StoreUnavailableError
from pocd.store.opening import sync, wal_of

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

SAVED = ".saved-"  # between the store's name and the number of a copy


class Place:
    """The files of a store that was just opened, compared with what is at their paths later.

    Attributes:
        path: The store's path.
        saved: The copy of the open store that lies beside its path, while another file or none is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved: Path | None = None
        self._device = path.parent.stat().st_dev
        self._files = {each: _identity(each) for each in (path, wal_of(path))}

    def change(self) -> str | None:
        """Return which file is no longer at its path; None where all are."""
        for each, opened in self._files.items():
            found = _identity(each)
            if found != opened:
                what = "is gone" if found is None else "is another file than the one in use"
                return f"the store's file {each} {what}"
        return None

    def check(self) -> None:
        """Make sure that the files which were opened are still those at their paths.

        Raises:
            StoreUnavailableError: One was removed, replaced, or its disk was unmounted.
        """
        if change := self.change():
            raise StoreUnavailableError(f"{change}: nothing more is stored. Put it back where it was, or {self.remedy}")

    @property
    def remedy(self) -> str:
        """What to do to go on with what is in use, for the operator."""
        if self.saved:
            return (
                f"stop pocd and take up the copy of what is in use with `pocd outbox restore {self.saved}`; "
                "a start without that takes what is at store.path"
            )
        return (
            "save what is in use with `pocd outbox backup FILE`; then restart pocd, which takes what is at store.path"
        )

    def save(self, db: sqlite3.Connection) -> None:
        """Copy the open store beside its path, where its files are no longer there; else drop a copy made before.

        Where its folder is not there, or its disk was unmounted, the files are whole elsewhere: nothing is copied.
        """
        if not self.change():
            if self.saved:
                self.saved.unlink(missing_ok=True)
                self.saved = None
        elif not self.saved and self._has_folder():
            name = self.path.name + SAVED
            file = next(file for number in count(1) if not (file := self.path.with_name(f"{name}{number}")).exists())
            with suppress(BackupError):  # of a full disk; it is tried again
                back_up(db, file)
                self.saved = file

    def leave(self) -> None:
        """Leave files that a start can take, once the store is closed: a removed one is replaced by its copy."""
        if not self.saved or not self.saved.exists():
            return
        wal = wal_of(self.path)
        if _identity(self.path) is None:
            wal.unlink(missing_ok=True)  # it would be taken for the log of what is put there
            self.saved.rename(self.path)
            sync(self.path.parent)
            self.saved = None
        elif _identity(self.path) != self._files[self.path] and _identity(wal) == self._files[wal]:
            wal.unlink()  # the log of the file that was replaced; the copy has what is in it

    def _has_folder(self) -> bool:
        folder = _identity(self.path.parent)
        return folder is not None and folder[0] == self._device


def copies(path: Path) -> list[Path]:
    """Return the copies that were saved beside the store at `path` and not taken away since, oldest first."""
    return sorted(path.parent.glob(f"{path.name}{SAVED}*"), key=lambda file: file.stat().st_mtime)


def exposure(path: Path) -> str | None:
    """Return how every user of the host could take the store at `path` away, and the remedy; None where none can."""
    mode = path.parent.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return (
            f"every user of this host may write {path.parent} (mode {stat.S_IMODE(mode):04o}), and so remove or "
            f"replace the store: chmod o-w {path.parent}"
        )
    if path.stat().st_mode & stat.S_IWOTH:
        return f"every user of this host may write the store {path}: chmod o-w {path}"
    return None


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the file's device and number there; None where there is none, or none can be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
