"""The reference receiver's store: one SQLite file, written by one thread."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from pocd.store.database import CallRefusedError, DatabaseThread
from pocd.store.place import Place
from pocd.tasks import within

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

P = ParamSpec("P")
T = TypeVar("T")

BatchKind = Literal["generated", "validated"]

MAX_WAITING = 64
"""Calls that may wait for the store; one more is refused."""

CALL_TIMEOUT_S = 30.0
BUSY_TIMEOUT_S = 5.0
"""Seconds to wait for another process that holds the file."""

PAGE_BYTES = 32 * 1024 * 1024
"""Bytes of bodies after which a page of batches ends early."""

_NEWEST_ROUNDS = 20
_APPLICATION_ID = 0x706F6372  # "pocr" in the file's header: this is a receiver's file and no other

# The totals are kept, not counted: with 100,000 batches of nonces a count reads the whole file.
# AUTOINCREMENT goes on after a clear, so a reader that pages by seq never misses what came later.
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE batches (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    id          TEXT    NOT NULL UNIQUE,
    kind        TEXT    NOT NULL,
    received_at TEXT    NOT NULL,
    attempts    INTEGER NOT NULL DEFAULT 1,
    body        BLOB    NOT NULL
);
CREATE INDEX batches_by_kind ON batches (kind, seq);
CREATE TABLE rounds (
    round        INTEGER PRIMARY KEY,
    block_hash   TEXT    NOT NULL,
    public_key   TEXT    NOT NULL,
    block_height INTEGER NOT NULL,
    nonces       INTEGER NOT NULL,
    batches      INTEGER NOT NULL,
    first_at     TEXT    NOT NULL,
    last_at      TEXT    NOT NULL,
    last_seq     INTEGER NOT NULL,
    UNIQUE (block_hash, public_key)
);
CREATE INDEX rounds_by_last_seq ON rounds (last_seq);
CREATE TABLE nonces (
    round INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    PRIMARY KEY (round, nonce)
) WITHOUT ROWID;
CREATE TABLE totals (
    batches           INTEGER NOT NULL DEFAULT 0,
    nonces            INTEGER NOT NULL DEFAULT 0,
    distinct_nonces   INTEGER NOT NULL DEFAULT 0,
    duplicates        INTEGER NOT NULL DEFAULT 0,
    conflicts         INTEGER NOT NULL DEFAULT 0,
    rejected          INTEGER NOT NULL DEFAULT 0,
    validated_batches INTEGER NOT NULL DEFAULT 0
);
INSERT INTO totals DEFAULT VALUES;
PRAGMA application_id = {_APPLICATION_ID};
COMMIT;
"""


class ReceiverStoreError(Exception):
    """The store cannot be opened, read or written; the message names the file."""


class ReceiverStoreBusyError(ReceiverStoreError):
    """The store is overloaded or too slow; the operation may still be done: try again."""


class ArrivalOutcome(Enum):
    """Outcome of a batch's arrival."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A well-formed batch, as it arrived.

    Attributes:
        id: The batch's webhook-id; a repeat has the same id and the same body.
        kind: Kind of the batch, by the route it came by.
        received_at: Time of arrival in UTC, ISO 8601.
        body: Exact bytes of the body, a JSON object.
        block_hash: Block hash of the round, like the fields below as in the body.
    """

    id: str
    kind: BatchKind
    received_at: str
    body: bytes
    block_hash: str
    block_height: int
    public_key: str
    nonces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A batch from the store; `attempts` is how often it arrived, the first time included."""

    seq: int
    id: str
    kind: BatchKind
    received_at: str
    attempts: int
    body: bytes


@dataclass(frozen=True, slots=True)
class ReceiverTotals:
    """Counts since the last clear.

    `batches`, `nonces` and `distinct_nonces` are of generated batches; a nonce is distinct within its
    (block_hash, public_key).
    """

    batches: int
    nonces: int
    distinct_nonces: int
    duplicates: int
    conflicts: int
    rejected: int
    validated_batches: int


@dataclass(frozen=True, slots=True)
class RoundStats:
    """Counts of one (block_hash, public_key); the height is the first batch's, times are UTC ISO 8601."""

    block_hash: str
    block_height: int
    public_key: str
    nonces: int
    batches: int
    first_at: str
    last_at: str


class Store:
    """The receiver's batches and counts. Built by `open`; safe for many coroutines of one event loop.

    When a call that changes something returns, the change is on disk.
    """

    def __init__(self, path: Path, thread: DatabaseThread[_Database]) -> None:
        self._path = path
        self._thread = thread

    @classmethod
    async def open(cls, path: Path) -> Store:
        """Open the file at `path`, made if missing; close the store when done.

        Raises:
            ReceiverStoreError: The file cannot be opened or made, or is not a receiver's store.
        """
        opened = partial(DatabaseThread, partial(_Database, path), name="receiver-store", most_waiting=MAX_WAITING)
        return cls(path, await _bounded(path, asyncio.to_thread(opened)))

    async def close(self) -> None:
        """Close the file, after the calls that wait; the store is of no use afterwards.

        Raises:
            ReceiverStoreError: SQLite reports an error; what was answered before is on disk nevertheless.
        """
        await _bounded(self._path, asyncio.to_thread(self._thread.close))

    async def add(self, arrival: Arrival) -> ArrivalOutcome:
        """Commit a batch to disk, or recognise it: the same id is a repeat if its bytes are the same.

        Raises:
            ReceiverStoreError: The batch may not be on disk; the sender has to try again.
        """
        return await self._run(_Database.add, arrival)

    async def count_rejected(self) -> None:
        """Count a batch that was refused before it reached the store.

        Raises:
            ReceiverStoreError: The batch was not counted.
        """
        await self._run(_Database.count_rejected)

    async def stats(self) -> tuple[ReceiverTotals, list[RoundStats]]:
        """Return the counts, and the 20 rounds with the latest generated batches, the newest first.

        Raises:
            ReceiverStoreError: The counts cannot be read.
        """
        return await self._run(_Database.stats)

    async def page(self, after: int, limit: int, kind: BatchKind | None) -> tuple[list[StoredBatch], int | None]:
        """Return up to `limit` batches with a seq above `after`, ascending, and the `after` of the next page.

        A page ends early, but not before its first batch, where its bodies pass `PAGE_BYTES` bytes. The
        next page is None when this one is the last.

        Raises:
            ReceiverStoreError: The batches cannot be read.
        """
        return await self._run(_Database.page, after, limit, kind)

    async def clear(self) -> ReceiverTotals:
        """Forget all batches and counts, and return what the counts were.

        Raises:
            ReceiverStoreError: Nothing was forgotten, or all of it but the answer came too late.
        """
        return await self._run(_Database.clear)

    async def _run(self, work: Callable[Concatenate[_Database, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await _bounded(self._path, self._thread(work, *args, **kwargs))


async def _bounded(path: Path, call: Coroutine[Any, Any, T]) -> T:
    """Wait for a call of the store at `path`, but not for ever; errors name the file."""
    try:
        return await within(CALL_TIMEOUT_S, call)
    except TimeoutError as error:
        raise ReceiverStoreBusyError(f"{path}: no answer within {CALL_TIMEOUT_S:g} s") from error
    except CallRefusedError as error:
        raise ReceiverStoreBusyError(f"{path} {error}") from None
    except sqlite3.Error as error:
        raise ReceiverStoreError(f"{path}: {error}") from error


class _Database:
    """The SQLite file. All of it runs in the store's thread, the construction too."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            self._prepare(path)
            self._place = Place(path)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, path: Path) -> None:
        (application_id,) = self._db.execute("PRAGMA application_id").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application_id == 0 and tables == 0:
            self._db.executescript(_SCHEMA)
        elif application_id != _APPLICATION_ID:
            raise ReceiverStoreError(f"{path}: is a database, but not a receiver's")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("SELECT * FROM totals").fetchone()  # makes the log's file, if it was not there

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if change := self._place.change():  # what is stored elsewhere nobody would find
            raise ReceiverStoreError(f"{change}: nothing more is stored; put it back, or restart the receiver")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # A full disk may have rolled back already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def add(self, arrival: Arrival) -> ArrivalOutcome:
        with self._transaction():
            known = self._db.execute("SELECT seq, kind, body FROM batches WHERE id = ?", (arrival.id,)).fetchone()
            if known is None:
                self._insert(arrival)
                return ArrivalOutcome.STORED
            seq, kind, body = known
            if (kind, body) != (arrival.kind, arrival.body):
                self._db.execute("UPDATE totals SET conflicts = conflicts + 1")
                return ArrivalOutcome.CONFLICT
            self._db.execute("UPDATE batches SET attempts = attempts + 1 WHERE seq = ?", (seq,))
            self._db.execute("UPDATE totals SET duplicates = duplicates + 1")
            return ArrivalOutcome.DUPLICATE

    def _insert(self, arrival: Arrival) -> None:
        (seq,) = self._db.execute(
            "INSERT INTO batches (id, kind, received_at, body) VALUES (?, ?, ?, ?) RETURNING seq",
            (arrival.id, arrival.kind, arrival.received_at, arrival.body),
        ).fetchone()
        if arrival.kind == "validated":
            self._db.execute("UPDATE totals SET validated_batches = validated_batches + 1")
            return

        (round_,) = self._db.execute(
            "INSERT INTO rounds (block_hash, public_key, block_height, nonces, batches, first_at, last_at, last_seq)"
            " VALUES (?, ?, ?, ?, 1, ?, ?, ?)"
            " ON CONFLICT (block_hash, public_key) DO UPDATE SET nonces = nonces + excluded.nonces,"
            " batches = batches + 1, last_at = excluded.last_at, last_seq = excluded.last_seq"
            " RETURNING round",
            (
                arrival.block_hash,
                arrival.public_key,
                arrival.block_height,
                len(arrival.nonces),
                arrival.received_at,
                arrival.received_at,
                seq,
            ),
        ).fetchone()
        new = self._db.executemany(
            "INSERT OR IGNORE INTO nonces (round, nonce) VALUES (?, ?)", ((round_, nonce) for nonce in arrival.nonces)
        ).rowcount
        self._db.execute(
            "UPDATE totals SET batches = batches + 1, nonces = nonces + ?, distinct_nonces = distinct_nonces + ?",
            (len(arrival.nonces), new),
        )

    def count_rejected(self) -> None:
        self._db.execute("UPDATE totals SET rejected = rejected + 1")

    def stats(self) -> tuple[ReceiverTotals, list[RoundStats]]:
        rounds = self._db.execute(
            "SELECT block_hash, block_height, public_key, nonces, batches, first_at, last_at"
            " FROM rounds ORDER BY last_seq DESC LIMIT ?",
            (_NEWEST_ROUNDS,),
        )
        return self._totals(), [RoundStats(*row) for row in rounds]

    def _totals(self) -> ReceiverTotals:
        row = self._db.execute(
            "SELECT batches, nonces, distinct_nonces, duplicates, conflicts, rejected, validated_batches FROM totals"
        ).fetchone()
        return ReceiverTotals(*row)

    def page(self, after: int, limit: int, kind: BatchKind | None) -> tuple[list[StoredBatch], int | None]:
        # One row more than asked tells whether there is a next page.
        if kind is None:
            rows = self._db.execute(
                "SELECT seq, id, kind, received_at, attempts, body FROM batches WHERE seq > ? ORDER BY seq LIMIT ?",
                (after, limit + 1),
            )
        else:
            rows = self._db.execute(
                "SELECT seq, id, kind, received_at, attempts, body FROM batches"
                " WHERE kind = ? AND seq > ? ORDER BY seq LIMIT ?",
                (kind, after, limit + 1),
            )
        page: list[StoredBatch] = []
        size = 0
        for row in rows:
            batch = StoredBatch(*row)
            size += len(batch.body)
            if page and (len(page) == limit or size > PAGE_BYTES):
                return page, page[-1].seq
            page.append(batch)
        return page, None

    def clear(self) -> ReceiverTotals:
        with self._transaction():
            totals = self._totals()
            self._db.execute("DELETE FROM batches")
            self._db.execute("DELETE FROM rounds")
            self._db.execute("DELETE FROM nonces")
            self._db.execute("DELETE FROM totals")
            self._db.execute("INSERT INTO totals DEFAULT VALUES")
            return totals
