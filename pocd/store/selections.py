"""An operator's view of the outbox, delivery by delivery: list, show, send again, give up.

Functions over the open `Outbox`, called in its thread; each that writes is one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pocd.store.bodies import unpack_body
from pocd.store.deliveries import CHUNK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.store.outbox import Outbox

DeliveryState = Literal["pending", "delivered", "dead", "expired", "withdrawn"]
SetAsideState = Literal["dead", "expired", "withdrawn"]
PurgeableState = Literal["pending", "dead", "expired", "withdrawn"]


@dataclass(frozen=True, slots=True)
class Delivery:
    """Delivery of one batch to one receiver. Times in seconds since the epoch.

    Attributes:
        id: The batch's webhook-id.
        state: State of the delivery; a purged one is shown as long as another receiver is to have the batch.
        reason: Why the last attempt failed, or why the batch is no longer sent.
        created_at: When the batch was formed.
        changed_at: When the delivery entered its state; for a pending one, when it was queued.
    """

    receiver: str
    sequence: int
    id: str
    kind: str
    state: DeliveryState | Literal["purged"]
    nonces: int
    attempts: int
    reason: str | None
    created_at: float
    changed_at: float


@dataclass(frozen=True, slots=True)
class Selection:
    """Selection of deliveries: all that match every given field."""

    states: tuple[DeliveryState, ...]
    receiver: str | None = None
    ids: tuple[str, ...] | None = None

    def sql(self) -> tuple[str, list[str]]:
        """Return a condition over deliveries joined with batches, and its parameters."""
        condition = f"deliveries.state IN ({', '.join('?' * len(self.states))})"
        parameters: list[str] = list(self.states)
        if self.receiver is not None:
            condition += " AND receiver = ?"
            parameters.append(self.receiver)
        if self.ids is not None:
            condition += f" AND id IN ({', '.join('?' * len(self.ids))})"
            parameters += self.ids
        return condition, parameters


_DELIVERY = (
    "SELECT receiver, sequence, id, kind, deliveries.state, nonces, attempts, reason, created_at, deliveries.changed_at"
    " FROM deliveries JOIN batches ON number = batch"
)


def listed(outbox: Outbox, selection: Selection, *, after: tuple[str, int], limit: int) -> list[Delivery]:
    """Return up to `limit` deliveries in the order of (receiver, sequence), after the pair `after`."""
    condition, parameters = selection.sql()
    rows = outbox.db.execute(
        f"{_DELIVERY} WHERE {condition} AND (receiver, sequence) > (?, ?) ORDER BY receiver, sequence LIMIT ?",
        (*parameters, *after, limit),
    )
    return [Delivery(*row) for row in rows]


def shown(outbox: Outbox, batch_id: str) -> tuple[list[Delivery], bytes] | None:
    """Return a batch's deliveries, one for each receiver, and its bytes; None where there is no such batch."""
    row = outbox.db.execute("SELECT body FROM batches WHERE id = ?", (batch_id,)).fetchone()
    if row is None:
        return None
    return [
        Delivery(*row) for row in outbox.db.execute(f"{_DELIVERY} WHERE id = ? ORDER BY receiver", (batch_id,))
    ], unpack_body(row[0])


def send_again(outbox: Outbox, selection: Selection, now: float) -> list[tuple[str, int]]:
    """Put deliveries that are no longer sent back at the ends of their queues, oldest first.

    Returns:
        The deliveries queued again, as (receiver, batch), at most `CHUNK`; with that many, call again.
    """
    assert "pending" not in selection.states
    chosen = _chosen(outbox, selection)
    if chosen:
        with outbox.transaction():
            outbox.queue_again(chosen, now)
    return chosen


def purge(outbox: Outbox, selection: Selection, now: float) -> list[tuple[str, int]]:
    """Give deliveries up for good; a batch that no receiver will get any more is deleted.

    Returns:
        The deliveries given up, as (receiver, batch), at most `CHUNK`; with that many, call again.
    """
    assert "delivered" not in selection.states
    chosen = _chosen(outbox, selection)
    if chosen:
        with outbox.transaction():
            outbox.db.executemany(
                "UPDATE deliveries SET state = 'purged', changed_at = ? WHERE receiver = ? AND batch = ?",
                [(now, *delivery) for delivery in chosen],
            )
            outbox.db.executemany(
                "DELETE FROM batches WHERE number = ? AND state = 'purged'", [(batch,) for _, batch in chosen]
            )
    return chosen


def _chosen(outbox: Outbox, selection: Selection) -> list[tuple[str, int]]:
    condition, parameters = selection.sql()
    rows: Sequence[tuple[str, int]] = outbox.db.execute(
        f"SELECT receiver, batch FROM deliveries JOIN batches ON number = batch WHERE {condition}"  # noqa: S608 - made of placeholders
        " ORDER BY receiver, sequence LIMIT ?",
        (*parameters, CHUNK),
    ).fetchall()
    return list(rows)
