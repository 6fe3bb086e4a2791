"""Form batches of stored proofs, and queue batches for receivers.

Functions over the open `Outbox`, called in its thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import orjson

from pocd.protocol.proof import Proof, ProofBatch, Round
from pocd.store.deliveries import CHUNK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.protocol.proof import ValidatedBatch
    from pocd.store.outbox import Outbox

MOST_BATCHES = 64  # formed in one transaction, so that others get their turn
MOST_NONCES = 100_000  # in them

_OF_GROUP = "WHERE round = ? AND node_id = ? AND fingerprint IS ? AND dtype IS ?"
_OLDEST = f"SELECT number, nonce, distance FROM proofs {_OF_GROUP} ORDER BY number LIMIT ?"  # noqa: S608 - made of constants
_DELETE = f"DELETE FROM proofs {_OF_GROUP} AND number <= ?"  # noqa: S608 - made of constants


@dataclass(frozen=True, slots=True)
class Formed:
    """Result of one call of `form_batches`.

    Attributes:
        batches: The batches that were formed.
        due: Time of the next call in seconds since the epoch; None when no proof is left that can go into a batch.
    """

    batches: tuple[ProofBatch, ...]
    due: float | None


def form_batches(
    outbox: Outbox,
    receivers: Sequence[str],
    *,
    size: int,
    age: float,
    now: float,
    current: Round | None,
    withdraw: bool = True,
) -> Formed:
    """Put proofs into batches and queue these for `receivers` and their round's own, in one transaction.

    A batch is formed of `size` proofs of one round and one set of weights, or of fewer when the
    oldest is `age` seconds old or the round is not `current`. Without a receiver the proofs wait
    for one. One call forms a bounded number of batches; the rest is due at once. Proofs of a round
    whose block was replaced are withdrawn at once, if `withdraw` is true.
    """
    most = max(1, min(MOST_BATCHES, MOST_NONCES // size, CHUNK // max(1, len(receivers))))
    formed: list[ProofBatch] = []
    due: list[float] = []
    with outbox.transaction():
        register_receivers(outbox, receivers)
        # The groups come from an index alone, as this is looked at whenever something was found.
        groups = outbox.db.execute(
            "SELECT waiting.round, waiting.node_id, waiting.fingerprint, waiting.dtype, count, found_at"
            " FROM proofs JOIN"
            " (SELECT round, node_id, fingerprint, dtype, count(*) AS count, min(number) AS first FROM proofs"
            "  GROUP BY round, node_id, fingerprint, dtype) AS waiting ON number = first ORDER BY first"
        ).fetchall()
        for number, node_id, fingerprint, dtype, left, oldest in groups:
            encoded, replaced, callback = outbox.db.execute(
                "SELECT round, replaced, callback FROM rounds WHERE number = ?", (number,)
            ).fetchone()
            names = [*receivers, *({callback} - {None, *receivers})]
            if not names:
                continue  # they wait for a receiver
            round_ = Round(**orjson.loads(encoded))
            # A clock that was set back must not keep a proof for ever.
            ripe = round_ != current or not 0 <= now - oldest < age
            while len(formed) < most and (left >= size or (ripe and left > 0)):
                empty = ProofBatch(round_, node_id, fingerprint, dtype, ())
                reason = replaced if withdraw else None
                formed.append(_form_batch(outbox, number, empty, names, size=size, now=now, withdrawn=reason))
                left -= formed[-1].size  # noqa: PLW2901 - what is left of the group
            if left:
                due.append(now if ripe or left >= size else oldest + age)
    return Formed(tuple(formed), min(due, default=None))


def _form_batch(
    outbox: Outbox,
    number: int,
    empty: ProofBatch,
    receivers: Sequence[str],
    *,
    size: int,
    now: float,
    withdrawn: str | None,
) -> ProofBatch:
    """Move the oldest proofs of the group of `empty` into a batch, and queue it. Part of a transaction."""
    group = (number, empty.node_id, empty.model_fingerprint, empty.dtype)
    rows = outbox.db.execute(_OLDEST, (*group, size)).fetchall()
    batch = replace(empty, proofs=tuple(Proof(nonce, distance) for _, nonce, distance in rows))
    queue_batch(outbox, batch, receivers, round_number=number, now=now, withdrawn=withdrawn)
    outbox.db.execute(_DELETE, (*group, rows[-1][0]))
    return batch


def queue_batch(
    outbox: Outbox,
    batch: ProofBatch | ValidatedBatch,
    receivers: Sequence[str],
    *,
    round_number: int | None,
    now: float,
    withdrawn: str | None = None,
) -> None:
    """Store a batch and queue it for `receivers`; withdrawn where a reason is given. Part of a transaction."""
    row = outbox.db.execute(
        "INSERT INTO batches (id, kind, round, nonces, created_at, state, changed_at, body)"
        " VALUES (?, ?, ?, ?, ?, 'pending', ?, ?)",
        (batch.id, batch.kind, round_number, batch.size, now, now, batch.to_json()),
    ).lastrowid
    assert row is not None
    queue_for(outbox, row, receivers, now=now, withdrawn=withdrawn)


def queue_for(
    outbox: Outbox, batch: int, receivers: Sequence[str], *, now: float, withdrawn: str | None = None
) -> None:
    """Queue a stored batch, by its number, for further receivers. Part of a transaction."""
    for name in receivers:
        outbox.db.execute(
            "INSERT INTO deliveries VALUES (?, ?, ?, ?, ?, 0, 0, ?)",
            (name, batch, outbox.next_sequence(name), "withdrawn" if withdrawn else "pending", now, withdrawn),
        )


def register_receivers(outbox: Outbox, names: Sequence[str]) -> None:
    """Add receivers to the store, unless they are known. Part of a transaction."""
    outbox.db.executemany("INSERT OR IGNORE INTO receivers (name) VALUES (?)", [(name,) for name in names])
