"""The chain's rounds in the store, and what becomes of them where their blocks are replaced.

Functions over the open `Outbox`, called in its thread; each that writes is one transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from pocd.protocol.proof import Round

if TYPE_CHECKING:
    from pocd.store.outbox import Outbox


def recent_rounds(outbox: Outbox, limit: int) -> dict[Round, bool]:
    """Return the chain's `limit` rounds with the greatest heights, highest first, and whether each was replaced."""
    rows = outbox.db.execute(
        "SELECT round, replaced IS NOT NULL FROM rounds WHERE by_chain"
        " ORDER BY json_extract(round, '$.block_height') DESC, number DESC LIMIT ?",
        (limit,),
    )
    return {Round(**orjson.loads(encoded)): bool(replaced) for encoded, replaced in rows}


def replace_round(outbox: Outbox, round_: Round, reason: str, *, withdraw: bool, now: float) -> None:
    """Mark a round whose block is no longer the chain's.

    Args:
        outbox: The open store.
        round_: A round that was begun.
        reason: Reason shown with the round's withdrawn batches.
        withdraw: Whether to withdraw the round's batches that are still pending.
        now: Seconds since the epoch.
    """
    with outbox.transaction():
        number = outbox.round_number(round_)
        outbox.db.execute("UPDATE rounds SET replaced = ? WHERE number = ?", (reason, number))
        if withdraw:
            outbox.db.execute(
                "UPDATE deliveries SET state = 'withdrawn', reason = ?, changed_at = ?"
                " WHERE state = 'pending' AND batch IN (SELECT number FROM batches WHERE round = ?)",
                (reason, now, number),
            )


def reinstate_round(outbox: Outbox, round_: Round, now: float) -> None:
    """Mark a round whose block is the chain's again; its withdrawn batches are queued again."""
    with outbox.transaction():
        outbox.reinstate(outbox.round_number(round_), now)
