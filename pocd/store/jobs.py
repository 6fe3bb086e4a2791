"""Jobs of orchestrators: nonces to be computed or judged, on disk from their acceptance until some time after.

Functions over the open `Outbox`, called in its thread; each that writes is one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pocd.store.batches import queue_batch, register_receivers
from pocd.store.requested import register_callback

if TYPE_CHECKING:
    from pocd.protocol.live_jobs import JudgedArtifacts
    from pocd.store.outbox import Outbox

JobState = Literal["queued", "completed", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Job:
    """A job and its state.

    Attributes:
        answer: JSON of the result, or of the reason of a failure; None before there is one, and where it was cancelled.
    """

    id: str
    state: JobState
    answer: bytes | None


def ask(
    outbox: Outbox, name: str, request: bytes, *, nonces: int, callback: tuple[str, str | None], most: int, now: float
) -> bool:
    """Queue a job.

    Args:
        outbox: The open store.
        name: Id of the job.
        request: The job, as `oldest` returns it.
        nonces: Number of its nonces.
        callback: Name of the verdict's receiver, "" for none, and its URL where it came with a callback URL.
        most: How many nonces may wait, with these.
        now: Seconds since the epoch.

    Returns:
        Whether the job was queued; not where too many nonces wait.
    """
    if waiting(outbox) + nonces > most:
        return False
    receiver, url = callback
    with outbox.transaction():
        outbox.db.execute(
            "INSERT INTO jobs (id, state, changed_at, nonces, callback, request) VALUES (?, 'queued', ?, ?, ?, ?)",
            (name, now, nonces, receiver or None, request),
        )
        if receiver and url:
            register_callback(outbox.db, receiver, url)
    return True


def waiting(outbox: Outbox) -> int:
    """Return the number of nonces of queued jobs."""
    (nonces,) = outbox.db.execute("SELECT coalesce(sum(nonces), 0) FROM jobs WHERE state = 'queued'").fetchone()
    assert isinstance(nonces, int)
    return nonces


def oldest(outbox: Outbox) -> tuple[str, bytes] | None:
    """Return the id and the request of the oldest queued job; None where there is none."""
    row: tuple[str, bytes] | None = outbox.db.execute(
        "SELECT id, request FROM jobs WHERE state = 'queued' ORDER BY number LIMIT 1"
    ).fetchone()
    return row


def find(outbox: Outbox, name: str) -> Job | None:
    """Return a job by its id; None where it is unknown or was pruned."""
    row = outbox.db.execute("SELECT id, state, answer FROM jobs WHERE id = ?", (name,)).fetchone()
    return Job(*row) if row else None


def finish(
    outbox: Outbox,
    name: str,
    state: JobState,
    answer: bytes,
    *,
    verdict: JudgedArtifacts | None,
    receiver: str | None,
    now: float,
) -> None:
    """Store the answer of a queued job, and queue its verdict for `receiver`; nothing where it was cancelled."""
    with outbox.transaction():
        done = outbox.db.execute(
            "UPDATE jobs SET state = ?, changed_at = ?, answer = ? WHERE id = ? AND state = 'queued'",
            (state, now, answer, name),
        )
        if done.rowcount and verdict is not None and receiver is not None:
            register_receivers(outbox, [receiver])
            queue_batch(outbox, verdict, [receiver], round_number=None, now=now)


def cancel(outbox: Outbox, now: float) -> None:
    """Cancel all queued jobs."""
    with outbox.transaction():
        outbox.db.execute("UPDATE jobs SET state = 'cancelled', changed_at = ? WHERE state = 'queued'", (now,))


def prune(outbox: Outbox, before: float) -> None:
    """Delete jobs that ended before a time."""
    old = outbox.db.execute("SELECT number FROM jobs WHERE state != 'queued' AND changed_at < ?", (before,)).fetchall()
    if old:
        with outbox.transaction():
            outbox.db.executemany("DELETE FROM jobs WHERE number = ?", old)
