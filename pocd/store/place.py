"""Whether the open store is still the file at its path: what is written elsewhere, nobody will find."""

from __future__ import annotations

import contextlib
import stat
from typing import TYPE_CHECKING

from pocd.store.errors import StoreUnavailableError
from pocd.store.opening import wal_of

if TYPE_CHECKING:
    from pathlib import Path


class Place:
    """The files of a store that was just opened, to be compared with what is at their paths later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._device = path.parent.stat().st_dev
        self._files = {each: _identity(each) for each in (path, wal_of(path))}

    def is_empty(self) -> bool:
        """Tell whether the file was removed from its folder, which is still on the same disk."""
        folder = _identity(self.path.parent)
        return folder is not None and folder[0] == self._device and _identity(self.path) is None

    def check(self) -> None:
        """Make sure that the files which were opened are still those at their paths.

        Raises:
            StoreUnavailableError: One was removed, replaced, or its disk was unmounted.
        """
        for each, opened in self._files.items():
            found = _identity(each)
            if found != opened:
                what = "is gone" if found is None else "is another file than the one in use"
                raise StoreUnavailableError(
                    f"the store's file {each} {what}: nothing more is stored. Put it back where it was, or save what "
                    "is in use with `pocd outbox backup FILE`; then restart pocd, which takes what is at store.path"
                )


def exposure(path: Path) -> str | None:
    """Return how other users of this host can change the store at `path`, and the remedy; None where they cannot."""
    for each in (path.parent, path):
        with contextlib.suppress(OSError):  # what is not there yet is made for its owner
            mode = each.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                return f"every user of this host can write {each} (mode {stat.S_IMODE(mode):04o}): chmod o-w {each}"
    return None


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the file's device and number there; None where there is none, or none can be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
