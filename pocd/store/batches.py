"""Form batches of stored proofs, and queue batches for receivers.

Functions over the open `Outbox`, called in its thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import orjson

from pocd.protocol.proof import ProofBatch, Round
from pocd.store.bodies import pack_body
from pocd.store.deliveries import CHUNK
from pocd.store.proofs import take_oldest, waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.store.outbox import Outbox
    from pocd.store.proofs import Waiting

MOST_BATCHES = 64  # formed in one transaction, so that others get their turn
MOST_NONCES = 100_000  # in them


class Batch(Protocol):
    """What is stored and queued whole, and sent by its bytes."""

    @property
    def id(self) -> str:
        """Webhook-id of the batch."""

    @property
    def kind(self) -> str:
        """Last part of the path that it is posted to."""

    @property
    def size(self) -> int:
        """Number of nonces in it."""

    def to_json(self) -> bytes:
        """Return the exact bytes of every POST of it."""


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
    is_live: bool = False,
) -> Formed:
    """Put proofs into batches and queue these for `receivers` and their round's own, in one transaction.

    A batch is formed of `size` proofs of one round and one set of weights, or of fewer when the
    oldest is `age` seconds old or the round is not `current`. Without a receiver the proofs wait
    for one. One call forms a bounded number of batches; the rest is due at once. Proofs of a round
    whose block was replaced are withdrawn at once, if `withdraw` is true. With `is_live` bodies are the live network's.
    """
    most = max(1, min(MOST_BATCHES, MOST_NONCES // size, CHUNK // max(1, len(receivers))))
    planned: list[tuple[_Pool, int]] = []
    due: list[float] = []
    for pool in [pool for group in waiting(outbox) if (pool := _pool(outbox, group, receivers)).receivers]:
        left, found_at = pool.waiting.proofs, pool.waiting.found_at
        # A clock that was set back must not keep a proof for ever.
        ripe = pool.round != current or not 0 <= now - found_at < age
        count = min(most, -(-left // size) if ripe else left // size)
        planned += [(pool, count)] if count else []
        most, left = most - count, left - min(left, count * size)
        if left:
            due.append(now if ripe or left >= size else found_at + age)
    if not planned:  # most of the times, and then nothing is written
        return Formed((), min(due, default=None))
    with outbox.transaction():
        register_receivers(outbox, receivers)
        formed = [
            _form_batch(outbox, pool, size=size, now=now, withdraw=withdraw, is_live=is_live)
            for pool, count in planned
            for _ in range(count)
        ]
    return Formed(tuple(formed), min(due, default=None))


@dataclass(frozen=True, slots=True)
class _Pool:
    """Proofs that wait for a batch, their round, and the receivers of that batch.

    Attributes:
        replaced: Why the block of the round is no longer the chain's; None while it is.
    """

    waiting: Waiting
    round: Round
    replaced: str | None
    receivers: list[str]


def _pool(outbox: Outbox, waiting: Waiting, receivers: Sequence[str]) -> _Pool:
    encoded, replaced, callback = outbox.db.execute(
        "SELECT round, replaced, callback FROM rounds WHERE number = ?", (waiting.group.round,)
    ).fetchone()
    names = [*receivers, *({callback} - {None, *receivers})]
    return _Pool(waiting, Round(**orjson.loads(encoded)), replaced, names)


def _form_batch(outbox: Outbox, pool: _Pool, *, size: int, now: float, withdraw: bool, is_live: bool) -> ProofBatch:
    """Move the oldest proofs of a pool into a batch, and queue it. Part of a transaction."""
    group = pool.waiting.group
    proofs = take_oldest(outbox, group, size)
    batch = ProofBatch(pool.round, group.node_id, group.fingerprint, group.dtype, proofs, is_live)
    withdrawn = pool.replaced if withdraw else None
    queue_batch(outbox, batch, pool.receivers, round_number=group.round, now=now, withdrawn=withdrawn)
    return batch


def queue_batch(
    outbox: Outbox,
    batch: Batch,
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
        (batch.id, batch.kind, round_number, batch.size, now, now, pack_body(batch.to_json())),
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
