"""Rounds in the store: how far they are, and what becomes of them where their blocks are replaced.

Functions over the open `Outbox`, called in its thread; each that writes is one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from pocd.protocol.nonces import Node, Progress, Span
from pocd.protocol.proof import Round

if TYPE_CHECKING:
    from pocd.store.outbox import Outbox


@dataclass(frozen=True, slots=True)
class RoundProgress:
    """Progress in one round.

    Attributes:
        progress: The positions done by this node.
        checked: Number of the round's nonces that were checked, by this node and by those that this store was before.
        valid: Number of valid ones among them.
        skipped: Positions of this node whose nonces were checked as another node's, in ranges.
    """

    progress: Progress
    checked: int
    valid: int
    skipped: tuple[range, ...] = ()


def progress_in(outbox: Outbox, number: int, node: Node) -> RoundProgress:
    """Return the progress of a node, which has begun, in the round of that number. Part of a transaction."""
    done: dict[Node, Progress] = {}
    checked = valid = 0
    for node_id, node_count, cursor, islands, *counts in outbox.db.execute(
        "SELECT node_id, node_count, cursor, islands, checked, valid FROM progress WHERE round = ?", (number,)
    ):
        spans = tuple(Span(start, stop) for start, stop in orjson.loads(islands))
        done[Node(node_id, node_count)] = Progress(cursor, spans)
        checked, valid = checked + counts[0], valid + counts[1]
    own = done.pop(node)
    others = (node.positions(other.nonces(span)) for other, progress in done.items() for span in progress.spans)
    return RoundProgress(own, checked, valid, tuple(positions for positions in others if positions))


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
        reinstate(outbox, outbox.round_number(round_), now)


def reinstate(outbox: Outbox, number: int, now: float) -> None:
    """Undo that a round's block was replaced: what was withdrawn is queued again. Part of a transaction."""
    outbox.db.execute("UPDATE rounds SET replaced = NULL WHERE number = ? AND replaced IS NOT NULL", (number,))
    withdrawn = outbox.db.execute(
        "SELECT receiver, batch FROM deliveries WHERE state = 'withdrawn'"
        " AND batch IN (SELECT number FROM batches WHERE round = ?) ORDER BY receiver, sequence",
        (number,),
    ).fetchall()
    outbox.queue_again(withdrawn, now)
