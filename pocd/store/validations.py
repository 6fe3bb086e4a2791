"""Validations of other miners' batches: on disk from their acceptance until some time after the verdict.

Functions over the open `Outbox`, called in its thread; each that writes is one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pocd.store.batches import queue_batch, queue_for, register_receivers
from pocd.store.requested import register_callback

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.protocol.proof import ValidatedBatch
    from pocd.store.outbox import Outbox

KEPT = 100
"""Finished validations that are kept; each may hold megabytes."""

ValidationState = Literal["pending", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Validation:
    """A validation and its state.

    Attributes:
        id: Hash of the request: an equal request has the same id and the same answer.
        reason: Why a failed validation has no answer; None in any other state.
        answer: Exact bytes of the ValidatedBatch, once the validation is done; None before.
    """

    id: str
    state: ValidationState
    reason: str | None
    answer: bytes | None


def ask(
    outbox: Outbox, name: str, request: bytes, *, callback: tuple[str, str] | None, most: int, now: float
) -> Validation | None:
    """Queue a validation, or find it again. One that has failed is tried once more.

    Args:
        outbox: The open store.
        name: Id of the validation.
        request: The request, as `request_of` returns it.
        callback: Name and URL of the verdict's receiver that came with a callback URL.
        most: How many may wait.
        now: Seconds since the epoch.

    Returns:
        The validation; None where `most` are waiting already, and nothing was done.
    """
    found = find(outbox, name)
    if found is not None and found.state != "failed":
        return found
    if len(pending(outbox)) >= most:
        return None
    with outbox.transaction():
        outbox.db.execute(
            "INSERT INTO validations (id, asked_at, state, changed_at, request) VALUES (?1, ?2, 'pending', ?2, ?3)"
            " ON CONFLICT DO UPDATE SET state = 'pending', changed_at = ?2, reason = NULL",
            (name, now, request),
        )
        if callback is not None:
            register_callback(outbox.db, *callback)
    return Validation(name, "pending", None, None)


def find(outbox: Outbox, name: str) -> Validation | None:
    """Return a validation by its id; None where it is unknown or was pruned."""
    row = outbox.db.execute("SELECT id, state, reason, answer FROM validations WHERE id = ?", (name,)).fetchone()
    return Validation(*row) if row else None


def pending(outbox: Outbox) -> list[str]:
    """Return the ids of the pending validations, oldest first."""
    return [name for (name,) in outbox.db.execute("SELECT id FROM validations WHERE state = 'pending' ORDER BY number")]


def request_of(outbox: Outbox, name: str) -> bytes:
    """Return the request of a validation, in the bytes given to `ask`."""
    (request,) = outbox.db.execute("SELECT request FROM validations WHERE id = ?", (name,)).fetchone()
    assert isinstance(request, bytes)
    return request


def finish(outbox: Outbox, name: str, batch: ValidatedBatch, receivers: Sequence[str], now: float) -> None:
    """Store a verdict, and queue it for `receivers`, except those that an equal verdict was queued for before."""
    with outbox.transaction():
        outbox.db.execute(
            "UPDATE validations SET state = 'done', changed_at = ?, answer = ? WHERE id = ?",
            (now, batch.to_json(), name),
        )
        register_receivers(outbox, receivers)
        known = outbox.db.execute("SELECT number FROM batches WHERE id = ?", (batch.id,)).fetchone()
        if known:
            rows = outbox.db.execute("SELECT receiver FROM deliveries WHERE batch = ?", known).fetchall()
            queue_for(outbox, known[0], [name for name in receivers if (name,) not in rows], now=now)
        elif receivers:
            queue_batch(outbox, batch, receivers, round_number=None, now=now)


def fail(outbox: Outbox, name: str, reason: str, now: float) -> None:
    """Mark a validation as failed: its distances cannot be computed."""
    with outbox.transaction():
        outbox.db.execute(
            "UPDATE validations SET state = 'failed', changed_at = ?, reason = ? WHERE id = ?", (now, reason, name)
        )


def prune(outbox: Outbox, before: float) -> int:
    """Delete validations that were finished before a time, and all finished ones but the newest `KEPT`.

    Returns:
        Number of validations deleted.
    """
    old = outbox.db.execute(
        "SELECT number FROM validations WHERE state IN ('done', 'failed') AND (changed_at < ? OR number <="
        " (SELECT number FROM validations WHERE state IN ('done', 'failed') ORDER BY number DESC LIMIT 1 OFFSET ?))",
        (before, KEPT),
    ).fetchall()
    if old:
        with outbox.transaction():
            outbox.db.executemany("DELETE FROM validations WHERE number = ?", old)
    return len(old)
