"""What was checked of a round, by the shares in which it was mined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from pocd.protocol.nonces import Node, Progress, Span

if TYPE_CHECKING:
    import sqlite3


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


def progress_in(db: sqlite3.Connection, number: int, node: Node) -> RoundProgress:
    """Return the progress of a node, which has begun, in the round of that number."""
    done: dict[Node, Progress] = {}
    checked = valid = 0
    for node_id, node_count, cursor, islands, *counts in db.execute(
        "SELECT node_id, node_count, cursor, islands, checked, valid FROM progress WHERE round = ?", (number,)
    ):
        spans = tuple(Span(start, stop) for start, stop in orjson.loads(islands))
        done[Node(node_id, node_count)] = Progress(cursor, spans)
        checked, valid = checked + counts[0], valid + counts[1]
    own = done.pop(node)
    others = (node.positions(other.nonces(span)) for other, progress in done.items() for span in progress.spans)
    return RoundProgress(own, checked, valid, tuple(positions for positions in others if positions))
