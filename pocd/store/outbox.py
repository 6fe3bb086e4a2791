"""The outbox: proofs, batches and their deliveries, in one SQLite file that survives anything but its disk.

Everything here is synchronous and runs in one thread, see `thread.py`. Each public method that
writes is one transaction, fsynced before it returns (WAL, synchronous FULL). What was found is in `proofs.py`, single
deliveries in `deliveries.py`; pruning, which keeps the file small, is in `upkeep.py`.
"""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

import orjson

from pocd.process import EXIT_TEMPORARY
from pocd.store.errors import StoreError, StoreUnavailableError, unusable
from pocd.store.opening import MARK, open_store
from pocd.store.place import Place
from pocd.store.progress import progress_in
from pocd.store.requested import refuse_more_shares, register_callback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pocd.protocol.nonces import Node
    from pocd.protocol.proof import Round
    from pocd.store.progress import RoundProgress

_SET_META = "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value"


@dataclass(frozen=True, slots=True)
class Totals:
    """The funnel since the store was made: numbers of nonces, each on disk.

    Every stored nonce is in one of the later stages or still on its way to a receiver. `delivered` means accepted by
    every receiver; `dead`, `expired` and `withdrawn` that one will not get it unless it is sent again; `purged` that
    an operator gave it up.
    """

    checked: int = 0
    valid: int = 0
    stored: int = 0
    delivered: int = 0
    dead: int = 0
    expired: int = 0
    withdrawn: int = 0
    purged: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """A round to be mined, and by which node of the miner.

    Attributes:
        by_chain: A block of the chain began it; else the admin API asked for it.
        callback: Name of the receiver of the round's batches beside the configured ones.
        callback_url: URL of that receiver; None where it is a configured one.
    """

    round: Round
    node: Node
    by_chain: bool = True
    callback: str | None = None
    callback_url: str | None = None


@dataclass(frozen=True, slots=True)
class Queue:
    """Numbers of one receiver's batches and their nonces, by state. Delivered and purged ones are counted for ever."""

    pending_batches: int = 0
    pending_nonces: int = 0
    delivered_batches: int = 0
    delivered_nonces: int = 0
    dead_batches: int = 0
    dead_nonces: int = 0
    expired_batches: int = 0
    expired_nonces: int = 0
    withdrawn_batches: int = 0
    withdrawn_nonces: int = 0
    purged_batches: int = 0
    purged_nonces: int = 0


@dataclass(frozen=True, slots=True)
class ReceiverState:
    """Health of a receiver. Times in seconds since the epoch.

    Attributes:
        failures: Number of failed attempts in a row.
        next_at: Time of the next attempt.
        error: Error of the last attempt; None when it succeeded.
        parked_at: Time when the receiver asked for no more batches (HTTP 410); None if it did not.
        parked_url: The masked URL that answered so.
        url: The receiver's URL, if it came with a callback URL through the API.
    """

    failures: int = 0
    next_at: float = 0.0
    error: str | None = None
    parked_at: float | None = None
    parked_url: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class KnownChain:
    """The chain that the store belongs to, and the greatest height seen on it."""

    chain_id: str
    height: int


class Outbox:
    """The open store. Call it from the thread that opened it only; its public attributes may be read anywhere.

    Attributes:
        db: The connection, for the modules of this room.
        totals: The funnel's counts.
        queues: Counts of each receiver's queue, by name; also of receivers that are no longer configured.
        receivers: Health of each receiver, by name.
        control: The admin API's last decision on mining (see `pocd.mining.control`); None while the chain decides.
        chain: The chain that the store belongs to, once one was seen.
        place: The store's files.
        suspect: Whether SQLite read what nobody wrote; then `look_again` comes before anything else.
        unread: How often a stored body could not be read, each time from the file opened anew.
    """

    def __init__(self, connection: sqlite3.Connection, place: Place) -> None:
        self.db = connection
        self.place = place
        self.suspect = False
        self.unread = 0
        self.totals, self.queues, self.receivers = self._read_views()
        self.control = self._read_meta("control")
        self.chain = self._read_chain()

    @classmethod
    def open(cls, path: Path, waiting: Callable[[str], None] = lambda _: None) -> Self:
        """Open the store at `path`, making it where it is missing.

        Args:
            path: The store's file.
            waiting: Told once why it waits, where another process holds the file.

        Raises:
            StoreError: The store cannot be used, see `open_store`.
        """
        connection = open_store(path, waiting=waiting)
        try:
            return cls(connection, Place(path))
        except sqlite3.Error as error:
            connection.close()
            raise unusable(path, error) from error

    def look_again(self) -> None:
        """Open the file anew and look through all of it, after SQLite read what nobody wrote.

        Raises:
            StoreUnavailableError: The file cannot be read or opened now.
            StoreError: The file is damaged.
        """
        self.place.check()  # to close a file that was removed is to lose it
        self.db.close()
        try:
            self.db = open_store(self.place.path, thorough=True)
        except StoreError as error:
            if error.code == EXIT_TEMPORARY:
                raise StoreUnavailableError(str(error)) from error
            raise
        self.place = Place(self.place.path)
        self.suspect = False

    def keep_place(self) -> None:
        """Make sure that the open file is the one at the store's path, as `Place.check` does; save it aside if not.

        Raises:
            StoreUnavailableError: The open file is not the one at the store's path.
        """
        self.place.save(self.db)
        self.place.check()

    def close(self) -> None:
        """Close the file; its lock goes with it. Where it was removed, what it held is put back at its path."""
        self.place.save(self.db)
        self.db.close()
        self.place.leave()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Do all that happens in the context, or nothing of it.

        Raises:
            StoreUnavailableError: The open file is not the one at the store's path.
        """
        self.place.check()
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute(MARK)
            views = self._read_views()  # before the commit: what is committed must not be reported as failed
            self._commit()
        except BaseException:
            if self.db.in_transaction:  # a full disk or an I/O error may have rolled back already
                self.db.execute("ROLLBACK")
            raise
        # Plain attributes, replaced whole: other threads may read them at any time.
        self.totals, self.queues, self.receivers = views

    def _commit(self) -> None:
        self.db.execute("COMMIT")

    def _read_views(self) -> tuple[Totals, dict[str, Queue], dict[str, ReceiverState]]:
        checked, valid = self.db.execute("SELECT checked, valid FROM totals").fetchone()
        stages = dict(self.db.execute("SELECT state, nonces FROM stages").fetchall())
        stored = sum(stages.values())
        stages.pop("pending", None)
        queues: dict[str, dict[str, int]] = {}
        for receiver, state, batches, nonces in self.db.execute("SELECT receiver, state, batches, nonces FROM queues"):
            counts = {f"{state}_batches": batches, f"{state}_nonces": nonces}
            queues[receiver] = queues.get(receiver, {}) | counts
        states = self.db.execute("SELECT name, failures, next_at, error, parked_at, parked_url, url FROM receivers")
        return (
            Totals(checked, valid, stored, **stages),
            {receiver: Queue(**counts) for receiver, counts in queues.items()},
            {name: ReceiverState(*state) for name, *state in states},
        )

    # What outlives a restart

    def _read_meta(self, key: str) -> str | None:
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def _read_chain(self) -> KnownChain | None:
        chain_id, height = self._read_meta("chain_id"), self._read_meta("chain_height")
        return None if chain_id is None or height is None else KnownChain(chain_id, int(height))

    def set_control(self, control: str | None, work: Work | None, now: float) -> RoundProgress | None:
        """Store the admin API's decision on mining, and begin the round that follows from it.

        Returns:
            Earlier progress in that round; None where `work` is None.
        """
        with self.transaction():
            if control is None:
                self.db.execute("DELETE FROM meta WHERE key = 'control'")
            else:
                self.db.execute(_SET_META, ("control", control))
            progress = self._begin(work, now) if work else None
        self.control = control
        return progress

    def remember_head(self, chain_id: str, height: int) -> None:
        """Store the chain's id, and the greatest height seen on it; a lower one than before if that was a lie."""
        assert self.chain is None or chain_id == self.chain.chain_id
        with self.transaction():
            self.db.executemany(_SET_META, [("chain_id", chain_id), ("chain_height", str(height))])
        self.chain = KnownChain(chain_id, height)

    # Rounds

    def begin_round(self, work: Work, now: float) -> RoundProgress:
        """Register a round, or find it again, and return this node's progress in it.

        If the round's block was replaced and is on the chain again, its withdrawn batches are queued again.
        """
        with self.transaction():
            return self._begin(work, now)

    def _begin(self, work: Work, now: float) -> RoundProgress:
        round_, node = work.round, work.node
        self.db.execute(
            "INSERT OR IGNORE INTO rounds (id, round, seen_at, by_chain) VALUES (?, ?, ?, ?)",
            (round_.id, orjson.dumps(asdict(round_)).decode(), now, work.by_chain),
        )
        number = self.round_number(round_)
        if work.by_chain:
            self.db.execute("UPDATE rounds SET by_chain = 1 WHERE number = ?", (number,))
        else:
            self.db.execute("UPDATE rounds SET callback = ? WHERE number = ?", (work.callback, number))
            refuse_more_shares(self.db, number, node)
        if work.callback and work.callback_url:
            register_callback(self.db, work.callback, work.callback_url)
        self.db.execute("INSERT OR IGNORE INTO progress VALUES (?, ?, ?, 0, '[]', 0, 0)", (number, node.id, node.count))
        self.reinstate(number, now)
        return progress_in(self.db, number, node)

    def reinstate(self, number: int, now: float) -> None:
        """Undo that a round's block was replaced: what was withdrawn is queued again. Part of a transaction."""
        self.db.execute("UPDATE rounds SET replaced = NULL WHERE number = ? AND replaced IS NOT NULL", (number,))
        withdrawn = self.db.execute(
            "SELECT receiver, batch FROM deliveries WHERE state = 'withdrawn'"
            " AND batch IN (SELECT number FROM batches WHERE round = ?) ORDER BY receiver, sequence",
            (number,),
        ).fetchall()
        self.queue_again(withdrawn, now)

    def round_number(self, round_: Round) -> int:
        """Return the number in the store of a round that was begun."""
        (number,) = self.db.execute("SELECT number FROM rounds WHERE id = ?", (round_.id,)).fetchone()
        assert isinstance(number, int)
        return number

    # Queues

    def next_sequence(self, receiver: str) -> int:
        """Return the next sequence number of a receiver's queue. Part of a transaction."""
        (sequence,) = self.db.execute(
            "UPDATE receivers SET sequence = sequence + 1 WHERE name = ? RETURNING sequence", (receiver,)
        ).fetchone()
        assert isinstance(sequence, int)
        return sequence

    def queue_again(self, deliveries: Sequence[tuple[str, int]], now: float) -> None:
        """Put deliveries, as (receiver, batch), at the ends of their queues, as if new. Part of a transaction."""
        for receiver, batch in deliveries:
            self.db.execute(
                "UPDATE deliveries SET state = 'pending', sequence = ?, changed_at = ?, faults = 0"
                " WHERE receiver = ? AND batch = ?",
                (self.next_sequence(receiver), now, receiver, batch),
            )
