"""One receiver's queue in the outbox: the next batch, and the outcome of an attempt to deliver it.

Functions over the open `Outbox`, called in its thread; each that writes is one transaction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pocd.store.bodies import unpack_body

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.store.outbox import Outbox

CHUNK = 1000  # rows changed in one transaction, so that others get their turn


@dataclass(frozen=True, slots=True)
class PendingDelivery:
    """A batch that a receiver has not accepted yet.

    Attributes:
        batch: Number of the batch in the store.
        sequence: Position of the batch in the receiver's queue.
        id: The batch's webhook-id, equal on every attempt, like `body`.
        kind: "generated" or "validated".
        body: Exact bytes of the batch.
        queued_at: Time when the batch was queued, in seconds since the epoch.
        attempts: Number of attempts to send the batch.
        faults: Failed attempts in a row for which the batch itself may be at fault.
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
    """Return the first pending batch of `receiver`'s queue after the sequence number `after`."""
    row = outbox.db.execute(
        "SELECT number, sequence, id, kind, body, deliveries.changed_at, attempts, faults"
        " FROM deliveries JOIN batches ON number = batch"
        " WHERE receiver = ? AND deliveries.state = 'pending' AND sequence > ? ORDER BY sequence LIMIT 1",
        (receiver, after),
    ).fetchone()
    if row is None:
        return None
    found = PendingDelivery(*row)
    return replace(found, body=unpack_body(found.body))


def is_overtaken(outbox: Outbox, receiver: str, sequence: int) -> bool:
    """Tell whether `receiver` has accepted a batch after `sequence` in its queue."""
    row = outbox.db.execute(
        "SELECT 1 FROM deliveries WHERE receiver = ? AND state = 'delivered' AND sequence > ? LIMIT 1",
        (receiver, sequence),
    ).fetchone()
    return row is not None


def record_delivered(outbox: Outbox, receiver: str, batch: int, now: float) -> None:
    """Mark a batch as accepted by `receiver`, whatever its state has become meanwhile."""
    with outbox.transaction():
        outbox.db.execute(
            "UPDATE deliveries SET state = 'delivered', changed_at = ?, attempts = attempts + 1, reason = NULL"
            " WHERE receiver = ? AND batch = ?",
            (now, receiver, batch),
        )
        _answers_again(outbox, receiver)


def record_failed(outbox: Outbox, receiver: str, batch: int, reason: str, *, fault: bool, next_at: float) -> None:
    """Record a failed attempt, and when to try `receiver` again; `fault`: the batch itself may be at fault."""
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
    """Make a batch a dead letter of `receiver`, and count the receiver as well again."""
    with outbox.transaction():
        outbox.db.execute(
            "UPDATE deliveries SET state = 'dead', changed_at = ?, attempts = attempts + 1, reason = ?"
            " WHERE receiver = ? AND batch = ? AND state = 'pending'",
            (now, reason, receiver, batch),
        )
        _answers_again(outbox, receiver)


def record_parked(outbox: Outbox, receiver: str, batch: int, reason: str, url: str, now: float) -> None:
    """Record that `receiver`, at the masked `url`, asked for no more batches. Its queue is kept."""
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
    """Forget that `receiver` is parked or has failed, so that it is tried at once."""
    with outbox.transaction():
        _answers_again(outbox, receiver)


def forget_faults(outbox: Outbox, receiver: str, batches: Sequence[int]) -> None:
    """Reset the faults of batches: `receiver` fails at several, so none of them is the cause."""
    with outbox.transaction():
        outbox.db.executemany(
            "UPDATE deliveries SET faults = 0 WHERE receiver = ? AND batch = ?",
            [(receiver, batch) for batch in batches],
        )


def expire(outbox: Outbox, receiver: str, *, queued_before: float, now: float) -> int:
    """Mark batches as expired that `receiver` has not accepted and that were queued before a time, oldest first.

    Returns:
        Number of batches that expired, at most `CHUNK`; call again until there is none.
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


def set_late_aside(outbox: Outbox, open_round: str | None, now: float) -> tuple[int, int]:
    """Mark as expired what callback URLs of rounds have not accepted, unless it is of the round that is open.

    A verdict is late once a round has begun after it.

    Args:
        outbox: The open store.
        open_round: Id of the round whose batches are still worth something; None for none.
        now: Seconds since the epoch.

    Returns:
        Number of batches and of their nonces, at most `CHUNK` batches; call again until there is none.
    """
    return _set_aside(
        outbox,
        "SELECT receiver, batch, nonces FROM deliveries JOIN batches ON batches.number = batch"
        " WHERE receiver IN (SELECT callback FROM rounds) AND deliveries.state = 'pending'"
        " AND CASE kind WHEN 'generated' THEN"
        "   round IN (SELECT number FROM rounds WHERE callback = receiver AND id IS NOT ?1)"
        " ELSE deliveries.changed_at < (SELECT seen_at FROM rounds WHERE id = ?1) END LIMIT ?2",
        (open_round, CHUNK),
        now,
    )


def set_closed_aside(outbox: Outbox, accepted: Sequence[int], now: float) -> tuple[int, int]:
    """Mark as expired what receivers have not accepted of the chain's rounds, but for those that are still accepted.

    Args:
        outbox: The open store.
        accepted: Heights by which the rounds are called whose artifacts are still worth something.
        now: Seconds since the epoch.

    Returns:
        Number of batches and of their nonces, at most `CHUNK` batches; call again until there is none.
    """
    return _set_aside(
        outbox,
        "SELECT receiver, batch, nonces FROM deliveries JOIN batches ON batches.number = batch"
        " JOIN rounds ON rounds.number = batches.round"
        " WHERE deliveries.state = 'pending' AND kind = 'generated' AND by_chain"
        " AND json_extract(rounds.round, '$.block_height') NOT IN (SELECT value FROM json_each(?1)) LIMIT ?2",
        (json.dumps(accepted), CHUNK),
        now,
    )


def _set_aside(outbox: Outbox, which: str, arguments: tuple[str | int | None, ...], now: float) -> tuple[int, int]:
    late = outbox.db.execute(which, arguments).fetchall()
    if late:
        with outbox.transaction():
            outbox.db.executemany(
                "UPDATE deliveries SET state = 'expired', changed_at = ?, reason = 'late: its round is over'"
                " WHERE receiver = ? AND batch = ?",
                [(now, receiver, batch) for receiver, batch, _ in late],
            )
    return len(late), sum(nonces for *_, nonces in late)


def _answers_again(outbox: Outbox, receiver: str) -> None:
    outbox.db.execute(
        "UPDATE receivers SET failures = 0, next_at = 0, error = NULL, parked_at = NULL, parked_url = NULL"
        " WHERE name = ?",
        (receiver,),
    )
