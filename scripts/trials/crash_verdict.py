"""Verdict on the crash runs: the receiver must hold what the daemon's store says, nonce by nonce."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import orjson

from pocd.protocol.proof import nonces_in
from pocd.store.bodies import unpack_body

if TYPE_CHECKING:
    from pathlib import Path

Nonce = tuple[str, int]
"""A block hash and a nonce."""


@dataclass(slots=True)
class CrashVerdict:
    """Result of comparing the daemon's store with the receiver's.

    Attributes:
        batches: Number of batches in the daemon's store.
        proofs: Number of nonces that the receiver holds.
        rounds: Number of rounds that were mined.
        lost: Nonces that were checked, and all are valid, but the receiver does not hold.
        doubled: Arrivals of a nonce in a second batch.
        duplicates: Batches that the receiver got once more, and recognised.
        complaints: Each thing that is not as it must be, in one line.
    """

    batches: int = 0
    proofs: int = 0
    rounds: int = 0
    lost: int = 0
    doubled: int = 0
    duplicates: int = 0
    complaints: list[str] = field(default_factory=list)

    def demand(self, holds: bool, complaint: str) -> None:  # noqa: FBT001 - a condition, as in assert
        """Record a complaint unless a condition holds."""
        if not holds:
            self.complaints.append(complaint)


def judge(store: Path, receiver: Path) -> CrashVerdict:
    """Compare the daemon's store with the receiver's, both at rest, where every checked nonce was valid."""
    verdict = CrashVerdict()
    with closing(sqlite3.connect(store)) as ours, closing(sqlite3.connect(receiver)) as theirs:
        sent = _compare_batches(verdict, ours, theirs)
        _compare_nonces(verdict, ours, sent)
        (verdict.duplicates, conflicts) = theirs.execute("SELECT duplicates, conflicts FROM totals").fetchone()
        verdict.demand(conflicts == 0, f"{conflicts} batches came with another body under a known id")
        for name, db in (("store", ours), ("receiver's store", theirs)):
            (state,) = db.execute("PRAGMA integrity_check(1)").fetchone()
            verdict.demand(state == "ok", f"the {name} is damaged: {state}")
    return verdict


def _compare_batches(verdict: CrashVerdict, ours: sqlite3.Connection, theirs: sqlite3.Connection) -> Counter[Nonce]:
    """Compare the batches of both stores; returns how often the receiver holds each nonce."""
    rows = ours.execute("SELECT id, body FROM batches JOIN deliveries ON batch = number ORDER BY sequence")
    formed: list[tuple[str, bytes]] = [(name, unpack_body(body)) for name, body in rows]
    arrived: list[tuple[str, bytes]] = theirs.execute("SELECT id, body FROM batches ORDER BY seq").fetchall()
    verdict.batches = len(formed)
    (waiting,) = ours.execute("SELECT coalesce(sum(size), 0) FROM proofs").fetchone()
    verdict.demand(waiting == 0, f"{waiting} proofs are in no batch")
    (left,) = ours.execute("SELECT count(*) FROM batches WHERE state <> 'delivered'").fetchone()
    verdict.demand(left == 0, f"{left} batches are not delivered")

    known, came = dict(formed), dict(arrived)
    verdict.demand(len(known) == len(formed), "two batches have one id")
    missing, unknown = known.keys() - came.keys(), came.keys() - known.keys()
    verdict.demand(not missing, f"{len(missing)} batches did not arrive, such as {min(missing, default='')}")
    verdict.demand(
        not unknown, f"{len(unknown)} batches arrived that are in no store, such as {min(unknown, default='')}"
    )
    changed = [name for name in known.keys() & came.keys() if known[name] != came[name]]
    verdict.demand(not changed, f"{len(changed)} batches arrived with another body")
    verdict.demand(
        [name for name, _ in arrived] == [name for name, _ in formed], "first arrivals are not in the queue's order"
    )
    bodies = [orjson.loads(body) for _, body in arrived]
    held = Counter((body["block_hash"], nonce) for body in bodies for nonce in nonces_in(body))
    verdict.proofs = held.total()
    return held


def _compare_nonces(verdict: CrashVerdict, ours: sqlite3.Connection, held: Counter[Nonce]) -> None:
    """Compare the nonces with what was checked: the first ones of this node's share of each round, each once."""
    expected: defaultdict[str, set[int]] = defaultdict(set)
    rows = ours.execute(
        "SELECT json_extract(rounds.round, '$.block_hash'), node_id, node_count, cursor, islands, checked"
        " FROM progress JOIN rounds ON number = progress.round"
    )
    for block_hash, node_id, node_count, cursor, islands, checked in rows:
        expected[block_hash].update(range(node_id, node_id + node_count * checked, node_count))
        verdict.rounds += checked > 0
        verdict.demand(islands == "[]", f"round {block_hash[:8]} has gaps: {islands}")
        verdict.demand(cursor == checked, f"round {block_hash[:8]} checked {checked} nonces up to position {cursor}")
    wanted = {(block_hash, nonce) for block_hash, nonces in expected.items() for nonce in nonces}
    verdict.lost = len(wanted - held.keys())
    verdict.doubled = held.total() - len(held)
    surplus = len(held.keys() - wanted)
    verdict.demand(verdict.lost == 0, f"{verdict.lost} nonces were checked and did not arrive")
    verdict.demand(verdict.doubled == 0, f"{verdict.doubled} nonces arrived in two batches")
    verdict.demand(surplus == 0, f"{surplus} nonces arrived that were never checked")
