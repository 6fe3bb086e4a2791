"""What callers of the API name, as far as the store keeps it: callback URLs, and shares of a round.

Parts of transactions over the open connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

    from pocd.protocol.nonces import Node

MOST_SHARES = 256


class TooManySharesError(Exception):
    """A round was asked for with too many different shares of its nonces."""


def register_callback(db: sqlite3.Connection, name: str, url: str) -> None:
    """Store a receiver that came with a callback URL."""
    db.execute(
        "INSERT INTO receivers (name, url) VALUES (?, ?) ON CONFLICT DO UPDATE SET url = excluded.url", (name, url)
    )


def refuse_more_shares(db: sqlite3.Connection, round_number: int, node: Node) -> None:
    """Bound the shares of a round whose progress is kept.

    Raises:
        TooManySharesError: `MOST_SHARES` others are known.
    """
    known = db.execute("SELECT node_id, node_count FROM progress WHERE round = ?", (round_number,)).fetchall()
    if len(known) >= MOST_SHARES and (node.id, node.count) not in known:
        raise TooManySharesError(
            f"this round was asked for with {MOST_SHARES} different pairs of node_id and node_count: use one of these"
        )
