"""Upkeep of the store: pruning, and correcting times after the clock was set.

Functions over the open `Outbox`, called in its thread; each that writes is one transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocd.store.deliveries import CHUNK

if TYPE_CHECKING:
    from pocd.store.outbox import Outbox

KEPT_ROUNDS = 1000
"""Rounds whose progress is kept though nothing found in them is in the store any more."""

PRUNED_BATCHES = 100  # in one transaction: each may hold megabytes
PROBE_BYTES = 2**20


def prune_delivered(outbox: Outbox, before: float) -> int:
    """Delete batches that no receiver waits for (accepted or purged) and that last changed before a time, oldest first.

    Returns:
        Number of batches deleted, at most `PRUNED_BATCHES`; call again until there is none.
    """
    old = outbox.db.execute(
        "SELECT number FROM batches WHERE state IN ('delivered', 'purged') AND changed_at < ?"
        " ORDER BY changed_at LIMIT ?",
        (before, PRUNED_BATCHES),
    ).fetchall()
    if old:
        with outbox.transaction():
            outbox.db.executemany("DELETE FROM batches WHERE number = ?", old)
    return len(old)


def prune_rounds(outbox: Outbox) -> int:
    """Delete the progress of rounds long past, of which the store holds neither proofs nor batches.

    Returns:
        Number of rounds deleted, at most `CHUNK`; call again until there is none.
    """
    old = outbox.db.execute(
        "SELECT number FROM rounds WHERE number <= (SELECT max(number) FROM rounds) - ?"
        " AND NOT EXISTS (SELECT 1 FROM proofs WHERE round = rounds.number)"
        " AND NOT EXISTS (SELECT 1 FROM batches WHERE round = rounds.number) ORDER BY number LIMIT ?",
        (KEPT_ROUNDS, CHUNK),
    ).fetchall()
    if old:
        with outbox.transaction():
            outbox.db.executemany("DELETE FROM progress WHERE round = ?", old)
            outbox.db.executemany("DELETE FROM rounds WHERE number = ?", old)
    return len(old)


def shift_times(outbox: Outbox, seconds: float) -> None:
    """Move the times of what waits by as much as the wall clock was set: it is not older or younger for that."""
    with outbox.transaction():
        for statement in (
            # By their index, and without the batches: to change one is to write its body again.
            """
UPDATE deliveries SET changed_at = changed_at + ?
  WHERE receiver IN (SELECT name FROM receivers) AND state = 'pending'""",
            "UPDATE proofs SET found_at = found_at + ?",
            "UPDATE receivers SET next_at = next_at + ? WHERE next_at > 0",
            "UPDATE receivers SET parked_at = parked_at + ?",
        ):
            outbox.db.execute(statement, (seconds,))


def clamp_times(outbox: Outbox, now: float) -> None:
    """Bring times that lie ahead of `now` back to it: they were written before the clock was set back.

    Else what they belong to would neither expire nor be pruned until the clock has caught up.
    """
    with outbox.transaction():
        for statement in (
            # By their index: to look at every batch is to read a page of each, which at a start takes long.
            """
UPDATE batches SET changed_at = ?1, created_at = min(created_at, ?1)
  WHERE state IN (SELECT state FROM stages) AND changed_at > ?1""",
            "UPDATE deliveries SET changed_at = ?1 WHERE changed_at > ?1",
            "UPDATE proofs SET found_at = ?1 WHERE found_at > ?1",
            "UPDATE rounds SET seen_at = ?1 WHERE seen_at > ?1",
            "UPDATE receivers SET parked_at = ?1 WHERE parked_at > ?1",
            "UPDATE validations SET changed_at = ?1 WHERE changed_at > ?1",
        ):
            outbox.db.execute(statement, (now,))


def used_bytes(outbox: Outbox) -> int:
    """Return the bytes of the store's file that are in use: space that was freed is used again first."""

    def pragma(name: str) -> int:
        (value,) = outbox.db.execute(f"PRAGMA {name}").fetchone()
        assert isinstance(value, int)
        return value

    return (pragma("page_count") - pragma("freelist_count")) * pragma("page_size")


def probe(outbox: Outbox) -> None:
    """Write and delete a mebibyte, which shows that the disk takes what a batch may need."""
    with outbox.transaction():
        outbox.db.execute("INSERT OR REPLACE INTO meta VALUES ('probe', hex(zeroblob(?)))", (PROBE_BYTES // 2,))
    with outbox.transaction():
        outbox.db.execute("DELETE FROM meta WHERE key = 'probe'")
