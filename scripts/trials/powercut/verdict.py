"""Verdict on what a power cut left of a store: what it must hold, and whether its counts are those of its rows."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from struct import unpack
from typing import TYPE_CHECKING, Self

import orjson

from pocd.protocol.proof import nonces_in
from pocd.store.bodies import unpack_body
from pocd.store.errors import StoreError
from pocd.store.outbox import Outbox

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator
    from pathlib import Path

    from scripts.trials.powercut.disk import Operation

STORE, MARKS = "folder/outbox.db", "marks"
WAITING = "('pending', 'dead', 'expired', 'withdrawn')"  # what is counted of rows; the others' rows are pruned

_QUEUES = f"""
SELECT receiver, deliveries.state, count(*), sum(nonces) FROM deliveries JOIN batches ON number = batch
  WHERE deliveries.state IN {WAITING} GROUP BY 1, 2 ORDER BY 1, 2"""  # noqa: S608 - made of constants
_STAGES = f"""
SELECT state, sum(nonces) FROM batches WHERE state IN {WAITING} AND kind = 'generated' GROUP BY 1 ORDER BY 1"""  # noqa: S608 - made of constants


@dataclass(slots=True)
class Promise:
    """What the store's callers rely on, at one moment of a recording.

    Attributes:
        acknowledged: Hash of what the store holds for certain, see `content`.
        intended: Hash of what the store holds if the commit under way succeeds; None where there is none.
        copy: Name of the latest finished copy, and a hash of what that holds; None before the first.
    """

    acknowledged: str
    intended: str | None = None
    copy: tuple[str, str] | None = None

    @classmethod
    def first(cls, operations: list[Operation]) -> Self:
        """Return the promise at the beginning of a recording: an opening makes, or finds, what its first mark says."""
        promise = cls("")
        promise.heed(next(each for each in operations if is_mark(each) and each.kind == "write"))
        return promise

    def heed(self, mark: Operation) -> None:
        """Take up a mark of the workload."""
        if mark.kind != "write":
            return
        said = orjson.loads(mark.data)
        match said["kind"]:
            case "intent":
                self.intended = said["content"]
            case "copy":
                self.copy = said["file"], said["content"]
            case _:
                self.acknowledged, self.intended = said["content"], None


def is_mark(operation: Operation) -> bool:
    """Tell whether an operation is a mark of the workload, and none of the store."""
    return operation.name == MARKS


def is_commit(operation: Operation) -> bool:
    """Tell whether an operation is the mark of a commit that has succeeded."""
    return is_mark(operation) and operation.kind == "write" and orjson.loads(operation.data)["kind"] == "done"


def content(db: sqlite3.Connection) -> str:
    """Return a hash of all rows, but for what an opening changes."""
    digest = hashlib.sha256()
    tables = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").fetchall()
    for (table,) in tables:
        where = "WHERE key NOT IN ('epoch', 'renewing')" if table == "meta" else ""
        for row in db.execute(f"SELECT * FROM {table} {where} ORDER BY 1, 2"):  # noqa: S608 - names of our tables
            digest.update(repr((table, row)).encode())
    return digest.hexdigest()


def judge(root: Path, promise: Promise) -> list[str]:
    """Open the store that was left below `root` as a start does, and return what is wrong with it."""
    complaints = _judge_one(root / STORE, {promise.acknowledged, promise.intended})
    if promise.copy is not None:
        name, held = promise.copy
        copy = (root / STORE).with_name(name)
        found = _judge_one(copy, {held}) if copy.exists() else ["it is gone"]
        complaints += [f"{name}: {complaint}" for complaint in found]
    return complaints


def _judge_one(path: Path, allowed: set[str | None]) -> list[str]:
    try:
        outbox = Outbox.open(path)
    except StoreError as error:
        return [f"it does not open: {error}"]
    with closing(outbox):
        (finding,) = outbox.db.execute("PRAGMA integrity_check(1)").fetchone()
        if finding != "ok":
            return [f"it is damaged: {finding}"]
        complaints = list(recount(outbox.db))
        if content(outbox.db) not in allowed:
            complaints.append("it holds neither what was acknowledged nor what was being committed")
        return complaints


def recount(db: sqlite3.Connection) -> Iterator[str]:
    """Count the rows, and give each count of the store that is another, and each nonce that is there twice."""
    counted = db.execute(
        f"SELECT * FROM queues WHERE state IN {WAITING} AND batches ORDER BY receiver, state"  # noqa: S608 - made of constants
    ).fetchall()
    if counted != db.execute(_QUEUES).fetchall():
        yield "queues are counted wrongly"
    stages = dict(db.execute("SELECT state, nonces FROM stages").fetchall())
    if {state: nonces for state, nonces in stages.items() if nonces} | dict(db.execute(_STAGES)) != {
        state: nonces for state, nonces in stages.items() if nonces
    }:
        yield "stages are counted wrongly"
    (valid,) = db.execute("SELECT valid FROM totals").fetchone()
    (waiting,) = db.execute("SELECT coalesce(sum(size), 0) FROM proofs").fetchone()
    if valid != waiting + sum(stages.values()):
        yield f"{valid} nonces were valid, {waiting} wait for a batch, and batches have {sum(stages.values())}"
    for cursor, islands, checked in db.execute("SELECT cursor, islands, checked FROM progress"):
        done = cursor + sum(stop - start for start, stop in orjson.loads(islands))
        if done != checked:
            yield f"{checked} nonces of a round were checked, and {done} are done"
    seen: set[tuple[int, int]] = set()
    nonces = [
        (number, nonce)
        for number, size, packed in db.execute("SELECT round, size, nonces FROM proofs")
        for nonce in unpack(f"<{size}q", packed)
    ]
    for number, body in db.execute("SELECT round, body FROM batches WHERE kind = 'generated'"):
        nonces += [(number, nonce) for nonce in nonces_in(orjson.loads(unpack_body(body)))]
    for nonce in nonces:
        if nonce in seen:
            yield f"nonce {nonce[1]} is there twice"
        seen.add(nonce)
