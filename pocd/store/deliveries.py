"""One receiver's queue in the outbox: which batch is next, and what came of an attempt to deliver it.

Functions over the open `Outbox`, called in its thread; each that writes is one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.store.outbox import Outbox

CHUNK = 1000  # rows changed in one transaction, so that others get their turn


@dataclass(frozen=True, slots=True)
class PendingDelivery:
    """A batch that a receiver has not accepted yet.

    Attributes:
        batch: Its number in the store.
        sequence: Its place in this receiver's queue.
        id: Its webhook-id, the same on every attempt, like `body`.
        kind: "generated" or "validated".
        body: The exact bytes.
        queued_at: Seconds since the epoch.
        attempts: How often it was sent.
        faults: How many of these it may have been at fault for itself, in a row.
    """

    batch: int
    sequence: int
    id: str
    kind: str
    body: bytes
    queued_at: float
    attempts: int
    faults: int


def next_pending(outbox: Outbox, receiver: str, after: int = 0) -> PendingDelivery | None:
    """Return the first batch of `receiver`'s queue, or the first one behind the sequence number `after`."""
    row = outbox.db.execute(
        "SELECT number, sequence, id, kind, body, deliveries.changed_at, attempts, faults"
        " FROM deliveries JOIN batches ON number = batch"
        " WHERE receiver = ? AND deliveries.state = 'pending' AND sequence > ? ORDER BY sequence LIMIT 1",
        (receiver, after),
    ).fetchone()
    return PendingDelivery(*row) if row else None


def is_overtaken(outbox: Outbox, receiver: str, sequence: int) -> bool:
    """Tell whether `receiver` has accepted a batch that stands behind `sequence` in its queue."""
    row = outbox.db.execute(
        "SELECT 1 FROM deliveries WHERE receiver = ? AND state = 'delivered' AND sequence > ? LIMIT 1",
        (receiver, sequence),
    ).fetchone()
    return row is not None


def record_delivered(outbox: Outbox, receiver: str, batch: int, now: float) -> None:
    """Mark a batch as accepted by `receiver`, whatever was done with it meanwhile."""
    with outbox.transaction():
        outbox.db.execute(
            "UPDATE deliveries SET state = 'delivered', changed_at = ?, attempts = attempts + 1, reason = NULL"
            " WHERE receiver = ? AND batch = ?",
            (now, receiver, batch),
        )
        _answers_again(outbox, receiver)


def record_failed(outbox: Outbox, receiver: str, batch: int, reason: str, *, fault: bool, next_at: float) -> None:
    """Remember a failed attempt, and when to ask `receiver` again; `fault`: the batch may be what it failed at."""
    with outbox.transaction():
        outbox.db.execute(
            # What was set aside meanwhile keeps the reason for that.
            "UPDATE deliveries SET attempts = attempts + 1, faults = faults + ?,"
            " reason = iif(state = 'pending', ?, reason) WHERE receiver = ? AND batch = ?",
            (fault, reason, receiver, batch),
        )
        outbox.db.execute(
            "UPDATE receivers SET failures = failures + 1, next_at = ?, error = ? WHERE name = ?",
            (next_at, reason, receiver),
        )


def record_set_aside(outbox: Outbox, receiver: str, batch: int, reason: str, now: float) -> None:
    """Make a batch a dead letter of `receiver`, which itself is well."""
    with outbox.transaction():
        outbox.db.execute(
            "UPDATE deliveries SET state = 'dead', changed_at = ?, attempts = attempts + 1, reason = ?"
            " WHERE receiver = ? AND batch = ? AND state = 'pending'",
            (now, reason, receiver, batch),
        )
        _answers_again(outbox, receiver)


def record_parked(outbox: Outbox, receiver: str, batch: int, reason: str, url: str, now: float) -> None:
    """Remember that `receiver`, at the masked `url`, wants nothing any more. Its queue is kept."""
    with outbox.transaction():
        outbox.db.execute(
            "UPDATE deliveries SET attempts = attempts + 1, reason = iif(state = 'pending', ?, reason)"
            " WHERE receiver = ? AND batch = ?",
            (reason, receiver, batch),
        )
        outbox.db.execute(
            "UPDATE receivers SET failures = failures + 1, error = ?, parked_at = ?, parked_url = ? WHERE name = ?",
            (reason, now, url, receiver),
        )


def ask_again(outbox: Outbox, receiver: str) -> None:
    """Forget that `receiver` is parked or has failed: it is asked at once."""
    with outbox.transaction():
        _answers_again(outbox, receiver)


def forget_faults(outbox: Outbox, receiver: str, batches: Sequence[int]) -> None:
    """Forget the faults of batches: `receiver` fails at more than one, so it is not they."""
    with outbox.transaction():
        outbox.db.executemany(
            "UPDATE deliveries SET faults = 0 WHERE receiver = ? AND batch = ?",
            [(receiver, batch) for batch in batches],
        )


def expire(outbox: Outbox, receiver: str, *, queued_before: float, now: float) -> int:
    """Mark what `receiver` has not accepted and was queued before a time as expired, oldest first.

    Returns:
        How many batches, at most `CHUNK`; call again until there is none.
    """
    oldest = outbox.db.execute(
        "SELECT batch, changed_at FROM deliveries WHERE receiver = ? AND state = 'pending' ORDER BY sequence LIMIT ?",
        (receiver, CHUNK),
    ).fetchall()
    overdue = [batch for batch, queued_at in oldest if queued_at <= queued_before]
    if overdue:
        with outbox.transaction():
            outbox.db.executemany(
                "UPDATE deliveries SET state = 'expired', changed_at = ?, reason = coalesce(reason, 'never sent')"
                " WHERE receiver = ? AND batch = ?",
                [(now, receiver, batch) for batch in overdue],
            )
    return len(overdue)


def _answers_again(outbox: Outbox, receiver: str) -> None:
    outbox.db.execute(
        "UPDATE receivers SET failures = 0, next_at = 0, error = NULL, parked_at = NULL, parked_url = NULL"
        " WHERE name = ?",
        (receiver,),
    )
