"""A disk that forgets what was not synced: the files, and what a power cut may leave of them.

What is assumed of it is what SQLite's documentation assumes: a sync brings what a file holds to the disk, the sync of a
folder brings its names; a write harms no byte beside those that it writes. All else may be lost, in part or in whole:
names in the order in which they were made, bytes in any order, a sector at a time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

SECTOR = 512
GARBAGE_SHARE = 0.1  # of the sectors that were not written whole

Kind = Literal["create", "folder", "write", "truncate", "sync", "unlink", "rename"]

Left = Literal["nothing", "all", "torn", "any"]
"""What is left of the writes that were not synced: none, all, the first ones with the last one torn, or any sectors."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a program did to a file, or to a folder's names.

    Attributes:
        kind: The system's call.
        name: The file's path, relative to the disk's root; "" is the root.
        offset: Where it was written, or the new length.
        data: What was written, or the new name.
    """

    kind: Kind
    name: str
    offset: int = 0
    data: bytes = b""


@dataclass(slots=True)
class File:
    """A file: what is on the disk for certain, and the writes and truncations since its last sync, in order."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[Operation] = field(default_factory=list)

    def sync(self) -> None:
        """Bring everything to the disk."""
        for operation in self.pending:
            _apply(self.synced, operation)
        self.pending.clear()

    def left(self, how: Left, chance: random.Random) -> bytes:
        """Return what a power cut leaves of the file."""
        content = bytearray(self.synced)
        if how == "any":
            share = chance.random()
            for operation in self.pending:
                for piece in _sectors(operation):
                    _keep_or_not(content, piece, share, chance)
        elif how != "nothing":
            whole = len(self.pending) if how == "all" else chance.randint(0, len(self.pending))
            for operation in self.pending[:whole]:
                _apply(content, operation)
            for torn in self.pending[whole : whole + 1]:
                if torn.kind == "write":
                    _write(content, torn.offset, torn.data[: chance.randint(0, len(torn.data))])
        return bytes(content)


@dataclass(frozen=True, slots=True)
class NameChange:
    """A change of a folder's names: one is taken away, one is given to a file (None for a folder), or both."""

    removed: str | None = None
    given: str | None = None
    file: File | None = None

    @property
    def folder(self) -> str:
        """The folder whose names change."""
        return (self.given or self.removed or "").rpartition("/")[0]

    def apply(self, names: dict[str, File | None]) -> None:
        """Change `names` so."""
        if self.removed is not None:
            names.pop(self.removed, None)
        if self.given is not None:
            names[self.given] = self.file


class Disk:
    """Files by their names, as a program made them, and what is certain of both.

    Args:
        files: The files that are there and synced at the beginning.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._names: dict[str, File | None] = {folder: None for name in files for folder in _folders(name)}
        self._names |= {name: File(bytearray(content)) for name, content in files.items()}
        self._synced = dict(self._names)
        self._pending: list[NameChange] = []

    def do(self, operation: Operation) -> None:
        """Follow one operation of the program."""
        name = operation.name
        match operation.kind:
            case "write" | "truncate":
                if file := self._names.get(name):
                    file.pending.append(operation)
            case "sync":
                if file := self._names.get(name):
                    file.sync()
                else:
                    self._sync_folder(name)
            case "create":
                self._change(NameChange(given=name, file=File()))
            case "folder":
                self._change(NameChange(given=name))
            case "unlink":
                self._change(NameChange(removed=name))
            case "rename":
                self._change(NameChange(name, operation.data.decode(), self._names.get(name)))

    def _change(self, change: NameChange) -> None:
        self._pending.append(change)
        change.apply(self._names)

    def _sync_folder(self, folder: str) -> None:
        for change in self._pending:
            if change.folder == folder:
                change.apply(self._synced)
        self._pending = [change for change in self._pending if change.folder != folder]

    def left(self, how: Left, chance: random.Random) -> dict[str, bytes]:
        """Return the files that a power cut leaves now, by name."""
        names = dict(self._synced)
        count = len(self._pending)
        last = {"nothing": 0, "all": count}.get(how, chance.choice((0, count, chance.randint(0, count))))
        for change in self._pending[:last]:
            change.apply(names)
        return {
            name: file.left(how, chance)
            for name, file in names.items()
            if file is not None and all(folder in names for folder in _folders(name))
        }


def _folders(name: str) -> list[str]:
    """Return the folders that a file lies in, below the root."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


def _apply(content: bytearray, operation: Operation) -> None:
    if operation.kind == "write":
        _write(content, operation.offset, operation.data)
    else:
        del content[operation.offset :]
        content.extend(bytes(operation.offset - len(content)))


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if data:
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data


def _sectors(operation: Operation) -> list[Operation]:
    """Return the pieces of a write, one for each sector that it touches; a truncation is one."""
    if operation.kind != "write":
        return [operation]
    start, stop = operation.offset, operation.offset + len(operation.data)
    edges = [start, *range((start // SECTOR + 1) * SECTOR, stop, SECTOR), stop]
    return [
        Operation("write", operation.name, first, operation.data[first - start : last - start])
        for first, last in itertools.pairwise(edges)
    ]


def _keep_or_not(content: bytearray, piece: Operation, share: float, chance: random.Random) -> None:
    """Apply a piece, leave it out, or leave garbage in its place."""
    if chance.random() < share:
        _apply(content, piece)
    elif piece.kind == "write" and chance.random() < GARBAGE_SHARE:
        _write(content, piece.offset, chance.randbytes(len(piece.data)))
