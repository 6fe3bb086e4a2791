"""Receivers that came with a callback URL: they end when nothing will be sent to them any more.

Functions over the open `Outbox`, called in its thread; each that writes is one transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from pocd.store.deliveries import CHUNK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.store.outbox import Outbox

ENDED = "(ended)"
"""Name under which is counted what ended receivers got; no receiver can have it."""

# What was purged counts while its batch is there: the batch's state follows from it. A validation's request begins
# with its callback, as its JSON has sorted keys; what follows may be megabytes.
_IDLE = """
SELECT name FROM receivers WHERE url IS NOT NULL
  AND NOT EXISTS (SELECT 1 FROM deliveries WHERE receiver = name
    AND state IN ('pending', 'dead', 'expired', 'withdrawn', 'purged'))
  AND NOT EXISTS (SELECT 1 FROM rounds WHERE callback = name
    AND (id IN (SELECT value FROM json_each(?)) OR EXISTS (SELECT 1 FROM proofs WHERE round = rounds.number)))
  AND NOT EXISTS (SELECT 1 FROM meta WHERE key = 'control' AND json_extract(value, '$.asked.callback') = name)
  AND NOT EXISTS (SELECT 1 FROM jobs WHERE state = 'queued' AND callback = name)
  AND NOT EXISTS (SELECT 1 FROM validations WHERE state = 'pending' AND instr(substr(request, 1, 64), name))"""


def idle(outbox: Outbox, at_work: Sequence[str]) -> list[str]:
    """Return the names of callback receivers that wait for nothing, and that nothing names which may still send.

    Those are: the round that was asked for last, rounds with proofs in no batch yet, pending validations and jobs, and
    the rounds with the ids `at_work`, in which nonces are being checked.
    """
    return [name for (name,) in outbox.db.execute(_IDLE, (_json(at_work),))]


def forget_delivered(outbox: Outbox, name: str) -> int:
    """Delete the record of what `name` accepted.

    Returns:
        Number of deliveries deleted, at most `CHUNK`; call again until there is none.
    """
    with outbox.transaction():
        return outbox.db.execute(
            "DELETE FROM deliveries WHERE receiver = ?1 AND batch IN"
            " (SELECT batch FROM deliveries WHERE receiver = ?1 AND state = 'delivered' LIMIT ?2)",
            (name, CHUNK),
        ).rowcount


def end(outbox: Outbox, name: str, at_work: Sequence[str]) -> bool:
    """Forget `name` if it is `idle`, and count what it got under `ENDED`; returns whether it has ended."""
    with outbox.transaction():
        left = outbox.db.execute("SELECT 1 FROM deliveries WHERE receiver = ? LIMIT 1", (name,)).fetchone()
        if left or not outbox.db.execute(f"{_IDLE} AND name = ?", (_json(at_work), name)).fetchone():
            return False
        outbox.db.execute("UPDATE rounds SET callback = NULL WHERE callback = ?", (name,))
        outbox.db.execute(
            "INSERT INTO queues SELECT ?, state, batches, nonces FROM queues WHERE receiver = ?"
            " ON CONFLICT DO UPDATE SET batches = batches + excluded.batches, nonces = nonces + excluded.nonces",
            (ENDED, name),
        )
        outbox.db.execute("DELETE FROM queues WHERE receiver = ?", (name,))
        outbox.db.execute("DELETE FROM receivers WHERE name = ?", (name,))
    return True


def _json(ids: Sequence[str]) -> str:
    return orjson.dumps(list(ids)).decode()
