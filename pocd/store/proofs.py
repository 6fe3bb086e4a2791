"""Proofs on their way from the miner to a batch: the proofs of a span are one row, and spans are committed in groups.

Functions over the open `Outbox`, called in its thread. Where thousands of nonces count each second, a row and a
transaction for each would be most of what the daemon does.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from struct import pack, unpack
from typing import TYPE_CHECKING

import orjson

from pocd.protocol.nonces import unskipped
from pocd.protocol.proof import Proofs
from pocd.store.progress import progress_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.protocol.nonces import Node, Span
    from pocd.protocol.proof import Round
    from pocd.store.outbox import Outbox


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that nonces were checked with: the fingerprint of the model, and the precision."""

    fingerprint: str
    dtype: str


@dataclass(frozen=True, slots=True)
class CheckedSpan:
    """A span of nonces that was checked, and the proofs found in it."""

    round: Round
    node: Node
    span: Span
    proofs: Proofs
    weights: Weights


@dataclass(frozen=True, slots=True)
class Counted:
    """Result of committing a span: the number of nonces counted, and the proofs stored."""

    checked: int
    proofs: Proofs


@dataclass(frozen=True, slots=True)
class Group:
    """Proofs that may go into one batch, by the columns that they share."""

    round: int
    node_id: int
    fingerprint: str | None
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Number of proofs of a group that are in no batch, and when the oldest was found, in seconds since the epoch."""

    group: Group
    proofs: int
    found_at: float


def commit_spans(outbox: Outbox, spans: Sequence[CheckedSpan], now: float) -> list[Counted]:
    """Store that spans were checked, and the proofs found in them, in one transaction.

    What was committed as another node's before is not counted and not stored again.
    """
    with outbox.transaction():
        return [
            counted
            for (round_, node), share in groupby(spans, key=attrgetter("round", "node"))
            for counted in _commit(outbox, outbox.round_number(round_), node, list(share), now)
        ]


def _commit(outbox: Outbox, number: int, node: Node, spans: Sequence[CheckedSpan], now: float) -> list[Counted]:
    """Store spans of one node's share of a round. Part of a transaction."""
    before = progress_in(outbox.db, number, node)
    progress = before.progress
    for done in spans:
        progress = progress.add(done.span)
    found = [
        Counted(len(unskipped(done.span, before.skipped)), _unskipped(done.proofs, node, before.skipped))
        for done in spans
    ]
    counts = sum(each.checked for each in found), sum(len(each.proofs) for each in found)
    islands = orjson.dumps([(island.start, island.stop) for island in progress.islands]).decode()
    outbox.db.execute(
        "UPDATE progress SET cursor = ?, islands = ?, checked = checked + ?, valid = valid + ?"
        " WHERE (round, node_id, node_count) = (?, ?, ?)",
        (progress.cursor, islands, *counts, number, node.id, node.count),
    )
    outbox.db.executemany(
        "INSERT INTO proofs (round, node_id, fingerprint, dtype, found_at, size, nonces, results)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (number, node.id, done.weights.fingerprint, done.weights.dtype, now, *_columns(each.proofs))
            for done, each in zip(spans, found, strict=True)
            if each.proofs
        ],
    )
    outbox.db.execute("UPDATE totals SET checked = checked + ?, valid = valid + ?", counts)
    return found


def _unskipped(proofs: Proofs, node: Node, skipped: Sequence[range]) -> Proofs:
    """Return the proofs of nonces that no other share has."""
    if not skipped:
        return proofs
    positions = [(nonce - node.id) // node.count for nonce in proofs.nonces]
    return proofs.only([not any(position in others for others in skipped) for position in positions])


def waiting(outbox: Outbox) -> list[Waiting]:
    """Return the groups of proofs that are in no batch, the one with the oldest proof first."""
    # They come from an index alone, as this is looked at whenever something was found.
    rows = outbox.db.execute(
        "SELECT waiting.round, waiting.node_id, waiting.fingerprint, waiting.dtype, waiting.size, found_at"
        " FROM proofs JOIN"
        " (SELECT round, node_id, fingerprint, dtype, sum(size) AS size, min(number) AS first FROM proofs"
        "  GROUP BY round, node_id, fingerprint, dtype) AS waiting ON number = first ORDER BY first"
    )
    return [Waiting(Group(*group), size, found_at) for *group, size, found_at in rows]


def take_oldest(outbox: Outbox, group: Group, size: int) -> Proofs:
    """Take the oldest proofs of a group out of the store, at most `size`. Part of a transaction."""
    of_group = (group.round, group.node_id, group.fingerprint, group.dtype)
    rows = outbox.db.execute(
        "SELECT number, nonces, results FROM proofs WHERE round = ? AND node_id = ? AND fingerprint IS ? AND dtype IS ?"
        " ORDER BY number",
        of_group,
    )
    taken: list[Proofs] = []
    left, last = size, 0
    for number, nonces, results in rows:
        found = Proofs(unpack(f"<{len(nonces) // 8}q", nonces), results)
        taken.append(found[:left])
        left, last, rest = left - len(taken[-1]), number, found[left:]
        if left == 0:
            break
    rows.close()
    outbox.db.execute(
        "DELETE FROM proofs WHERE round = ? AND node_id = ? AND fingerprint IS ? AND dtype IS ? AND number <= ?",
        (*of_group, last - 1 if rest else last),
    )
    if rest:
        columns = (*_columns(rest), last)
        outbox.db.execute("UPDATE proofs SET size = ?, nonces = ?, results = ? WHERE number = ?", columns)
    return Proofs.joined(taken)


def _columns(proofs: Proofs) -> tuple[int, bytes, bytes]:
    return len(proofs), pack(f"<{len(proofs)}q", *proofs.nonces), proofs.results
