"""The outbox: proofs, batches and what became of them, in one SQLite file that survives anything but its disk.

Everything here is synchronous and runs in one thread, see `OutboxThread`. Each public method that
writes is one transaction, fsynced before it returns (WAL, synchronous FULL).
"""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self, TypeVar

import orjson

from pocd.delivery.store import open_store, unusable
from pocd.nonces import Node, Progress, Span
from pocd.proof import Proof, ProofBatch, Round

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

P = ParamSpec("P")
T = TypeVar("T")

MOST_BATCHES = 64  # formed in one transaction, so that others get their turn
MOST_NONCES = 100_000  # likewise


@dataclass(frozen=True, slots=True)
class Totals:
    """The funnel since the store was made, in nonces: each number is on disk."""

    checked: int
    valid: int
    stored: int
    delivered: int


@dataclass(frozen=True, slots=True)
class RoundProgress:
    """What one node has done of one round."""

    progress: Progress
    checked: int
    valid: int


@dataclass(frozen=True, slots=True)
class PendingDelivery:
    """A batch that a receiver has not accepted yet. Times in seconds since the epoch."""

    batch: int
    id: str
    kind: str
    body: bytes
    attempts: int
    next_at: float


@dataclass(frozen=True, slots=True)
class Queue:
    """How one receiver's queue stands."""

    pending_batches: int = 0
    pending_nonces: int = 0
    delivered_batches: int = 0
    delivered_nonces: int = 0


class Outbox:
    """The open store. Call it from the thread that opened it only; its public attributes may be read anywhere.

    Attributes:
        totals: The funnel.
        queues: How each receiver's queue stands, by name; also of receivers that are no longer configured.
        paused: Whether mining was stopped by hand and not resumed.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self.totals = self._read_totals()
        self.queues = self._read_queues()
        self.paused = self._read_paused()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the store at `path`, making it where it is missing.

        Raises:
            StoreError: It cannot be used, see `open_store`.
        """
        connection = open_store(path)
        try:
            return cls(connection)
        except sqlite3.Error as error:
            connection.close()
            raise unusable(path, error) from error

    def close(self) -> None:
        """Close the file; its lock goes with it."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk or an I/O error has rolled back already
                self._db.execute("ROLLBACK")
            raise
        # Plain attributes, replaced whole: other threads may read them at any time.
        self.totals = self._read_totals()

    def _read_totals(self) -> Totals:
        return Totals(*self._db.execute("SELECT checked, valid, stored, delivered FROM totals").fetchone())

    def _read_queues(self) -> dict[str, Queue]:
        rows = self._db.execute(
            "SELECT receiver, sum(delivered_at IS NULL), sum(nonces * (delivered_at IS NULL)),"
            " sum(delivered_at IS NOT NULL), sum(nonces * (delivered_at IS NOT NULL))"
            " FROM deliveries JOIN batches ON number = batch GROUP BY receiver"
        )
        return {receiver: Queue(*counts) for receiver, *counts in rows}

    # Stopped by hand

    def _read_paused(self) -> bool:
        return self._db.execute("SELECT 1 FROM meta WHERE key = 'paused'").fetchone() is not None

    def set_paused(self, paused: bool) -> None:  # noqa: FBT001 - it sets that very flag
        """Remember whether mining is stopped, also across restarts."""
        with self._transaction():
            if paused:
                self._db.execute("INSERT OR IGNORE INTO meta VALUES ('paused', '')")
            else:
                self._db.execute("DELETE FROM meta WHERE key = 'paused'")
        self.paused = paused

    # Checking nonces

    def begin_round(self, round_: Round, node: Node, now: float) -> RoundProgress:
        """Register a round, or find it again, and return what this node has done of it."""
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO rounds (id, round, seen_at) VALUES (?, ?, ?)",
                (round_.id, orjson.dumps(asdict(round_)).decode(), now),
            )
            number = self._round_number(round_)
            self._db.execute(
                "INSERT OR IGNORE INTO progress VALUES (?, ?, ?, 0, '[]', 0, 0)", (number, node.id, node.count)
            )
        return self._round_progress(number, node)

    def _round_number(self, round_: Round) -> int:
        (number,) = self._db.execute("SELECT number FROM rounds WHERE id = ?", (round_.id,)).fetchone()
        assert isinstance(number, int)
        return number

    def _round_progress(self, number: int, node: Node) -> RoundProgress:
        cursor, islands, checked, valid = self._db.execute(
            "SELECT cursor, islands, checked, valid FROM progress WHERE (round, node_id, node_count) = (?, ?, ?)",
            (number, node.id, node.count),
        ).fetchone()
        spans = tuple(Span(start, stop) for start, stop in orjson.loads(islands))
        return RoundProgress(Progress(cursor, spans), checked, valid)

    def commit_span(
        self, round_: Round, node: Node, span: Span, proofs: Sequence[Proof], fingerprint: str, now: float
    ) -> None:
        """Store that `span` was checked and what was found in it, in one transaction.

        `fingerprint` names the weights that it was checked with.
        """
        with self._transaction():
            number = self._round_number(round_)
            progress = self._round_progress(number, node).progress.add(span)
            self._db.execute(
                "UPDATE progress SET cursor = ?, islands = ?, checked = checked + ?, valid = valid + ?"
                " WHERE (round, node_id, node_count) = (?, ?, ?)",
                (
                    progress.cursor,
                    orjson.dumps([(island.start, island.stop) for island in progress.islands]).decode(),
                    len(span),
                    len(proofs),
                    number,
                    node.id,
                    node.count,
                ),
            )
            self._db.executemany(
                "INSERT INTO proofs (round, node_id, nonce, distance, found_at, fingerprint) VALUES (?, ?, ?, ?, ?, ?)",
                [(number, node.id, proof.nonce, proof.distance, now, fingerprint) for proof in proofs],
            )
            self._db.execute("UPDATE totals SET checked = checked + ?, valid = valid + ?", (len(span), len(proofs)))

    # Forming batches

    def form_batches(
        self, receivers: Sequence[str], *, size: int, age: float, now: float, current: Round | None
    ) -> float | None:
        """Put proofs into batches and queue these for `receivers`, in one transaction.

        A batch is formed of `size` proofs of one round and one set of weights, or of fewer when the
        oldest is `age` seconds old or the round is not `current`. Without receivers the proofs wait
        for one. One call forms a bounded number of batches; the rest is due at once.

        Returns:
            When to call again, in seconds since the epoch; None with no proof left.
        """
        if not receivers:
            return None
        formed: list[int] = []  # the nonces in each
        due: list[float] = []
        most = max(1, min(MOST_BATCHES, MOST_NONCES // size))
        with self._transaction():
            groups = self._db.execute(
                "SELECT round, node_id, fingerprint, count(*), min(found_at) FROM proofs"
                " GROUP BY round, node_id, fingerprint ORDER BY min(number)"
            ).fetchall()
            for number, node_id, fingerprint, left, oldest in groups:
                (encoded,) = self._db.execute("SELECT round FROM rounds WHERE number = ?", (number,)).fetchone()
                round_ = Round(**orjson.loads(encoded))
                # A clock that was set back must not keep a proof for ever.
                ripe = round_ != current or not 0 <= now - oldest < age
                while len(formed) < most and (left >= size or (ripe and left > 0)):
                    group = ProofBatch(round_, node_id, fingerprint, ())
                    formed.append(self._form_batch(number, group, receivers, size=size, now=now))
                    left -= formed[-1]  # noqa: PLW2901 - what is left of the group
                if left:
                    due.append(now if ripe or left >= size else oldest + age)
        for nonces in formed:
            for name in receivers:
                self._change_queue(name, pending=1, delivered=0, nonces=nonces)
        return min(due, default=None)

    def _form_batch(self, number: int, empty: ProofBatch, receivers: Sequence[str], *, size: int, now: float) -> int:
        """Move the oldest proofs that belong into `empty` there; returns how many. Part of a transaction."""
        rows = self._db.execute(
            "SELECT number, nonce, distance FROM proofs WHERE round = ? AND node_id = ? AND fingerprint IS ?"
            " ORDER BY number LIMIT ?",
            (number, empty.node_id, empty.model_fingerprint, size),
        ).fetchall()
        batch = replace(empty, proofs=tuple(Proof(nonce, distance) for _, nonce, distance in rows))
        row = self._db.execute(
            "INSERT INTO batches (id, kind, nonces, body, created_at) VALUES (?, 'generated', ?, ?, ?)",
            (batch.id, len(rows), batch.to_json(), now),
        ).lastrowid
        self._db.executemany(
            "INSERT INTO deliveries VALUES (?, ?, 0, ?, NULL, NULL)", [(row, name, now) for name in receivers]
        )
        self._db.executemany("DELETE FROM proofs WHERE number = ?", [(proof,) for proof, _, _ in rows])
        self._db.execute("UPDATE totals SET stored = stored + ?", (len(rows),))
        return len(rows)

    def _change_queue(self, receiver: str, *, pending: int, delivered: int, nonces: int) -> None:
        """Count batches of `nonces` each that came to a receiver's queue or left it."""
        old = self.queues.get(receiver, Queue())
        self.queues = self.queues | {
            receiver: Queue(
                old.pending_batches + pending,
                old.pending_nonces + pending * nonces,
                old.delivered_batches + delivered,
                old.delivered_nonces + delivered * nonces,
            )
        }

    # Delivering

    def head(self, receiver: str) -> PendingDelivery | None:
        """Return the oldest batch that `receiver` has not accepted."""
        row = self._db.execute(
            "SELECT number, id, kind, body, attempts, next_at FROM deliveries JOIN batches ON number = batch"
            " WHERE receiver = ? AND delivered_at IS NULL ORDER BY batch LIMIT 1",
            (receiver,),
        ).fetchone()
        return PendingDelivery(*row) if row else None

    def record_delivered(self, receiver: str, batch: int, now: float) -> None:
        """Mark a batch as accepted by `receiver`; count it as delivered when no receiver waits for it."""
        with self._transaction():
            self._db.execute(
                "UPDATE deliveries SET delivered_at = ?, attempts = attempts + 1, last_error = NULL"
                " WHERE receiver = ? AND batch = ? AND delivered_at IS NULL",
                (now, receiver, batch),
            )
            (nonces,) = self._db.execute("SELECT nonces FROM batches WHERE number = ?", (batch,)).fetchone()
            (waiting,) = self._db.execute(
                "SELECT count(*) FROM deliveries WHERE batch = ? AND delivered_at IS NULL", (batch,)
            ).fetchone()
            if not waiting:
                self._db.execute("UPDATE totals SET delivered = delivered + ?", (nonces,))
        self._change_queue(receiver, pending=-1, delivered=1, nonces=nonces)

    def record_failed(self, receiver: str, batch: int, error: str, next_at: float) -> None:
        """Remember a failed attempt and when to make the next one."""
        with self._transaction():
            self._db.execute(
                "UPDATE deliveries SET attempts = attempts + 1, last_error = ?, next_at = ?"
                " WHERE receiver = ? AND batch = ?",
                (error, next_at, receiver, batch),
            )


class OutboxThread:
    """The one thread that an `Outbox` lives in; callers await its methods from the event loop.

    A call that was started runs to its end even when its caller is cancelled: what is being
    written gets written.
    """

    def __init__(self, path: Path) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outbox")
        try:
            self.outbox = self._executor.submit(Outbox.open, path).result()
        except BaseException:
            self._executor.shutdown()
            raise

    async def __call__(self, method: Callable[Concatenate[Outbox, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `method(outbox, *args, **kwargs)` in the thread and return its result."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: method(self.outbox, *args, **kwargs))

    def close(self) -> None:
        """Finish what was begun, then close the store."""
        self._executor.submit(self.outbox.close).result()
        self._executor.shutdown()
