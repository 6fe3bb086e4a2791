"""The daemon killed on one store again and again, and the judge who looks at what is left."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs, Round
from pocd.receiver.store import Arrival, Store
from pocd.store.batches import form_batches
from pocd.store.deliveries import next_pending, record_delivered
from pocd.store.outbox import Outbox, Work
from pocd.store.proofs import Weights
from scripts.trials import crash
from scripts.trials.crash_verdict import judge
from scripts.trials.failpoints import Point
from tests.support.clocks import NOW
from tests.support.stored import commit_span
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = Weights("f00d", "float32")
NODE = Node(1, 3)
ROUND = Round("AB", 10, "miner", 2.0, "poc2", "tiny", 16)
# In these five runs each kind of kill is once, two while mining, and the receiver is up, frozen and down.
RUNS, SEED = 5, 548


def test_no_proof_is_lost_or_doubled_by_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = crash.plan(RUNS, SEED)
    assert {run.point for run in planned} == {*Point, None}
    assert {run.service for run in planned} == {"up", "frozen", "down"}
    options = ("--runs", str(RUNS), "--seed", str(SEED), "--folder", str(tmp_path / "crash"))
    monkeypatch.setattr(sys, "argv", ["crash", *options])
    status, output = crash.main(), capsys.readouterr().out
    assert status == 0, output
    counts = {cells[0]: cells[1] for line in output.splitlines() if (cells := _cells(line))}
    assert counts["verdict"] == "all is well"
    assert int(counts["proofs at the receiver"]) > 0
    for point in Point:
        assert int(counts[f"killed {point.value}"]) == 1, output
    # What was accepted but not marked came again, and was recognised.
    assert int(counts["batches that came to the receiver again"]) >= 1


async def test_what_was_done_until_a_stop_is_judged(tmp_path: Path) -> None:
    folder = tmp_path / "crash"
    options = ("-m", crash.__name__, "--seed", "194", "--folder", str(folder))  # whose first run ends at once
    trial = await asyncio.create_subprocess_exec(sys.executable, *options, stdout=asyncio.subprocess.PIPE)
    await until((folder / "run-2.log").exists)
    trial.terminate()
    output = (await trial.communicate())[0].decode()
    counts = {cells[0]: cells[1] for line in output.splitlines() if (cells := _cells(line))}
    done, _, planned = counts["runs"].partition(" of ")
    assert int(done) < int(planned) == 300, output
    assert counts["verdict"] == "all is well", output
    assert trial.returncode == 1


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")] if line.startswith("│") else []


def test_a_plan_follows_from_its_seed_and_kills_in_every_way() -> None:
    assert crash.plan(60, 5) == crash.plan(60, 5) != crash.plan(60, 6)
    planned = crash.plan(300, 1)
    assert len(planned) == 300
    for point in (*Point, None):
        assert sum(run.point is point for run in planned) == 60
        assert any(run.mining for run in planned if run.point is point)
    assert all(run.service == "up" for run in planned if run.point is Point.AFTER_POST)


# The judge


async def stores(folder: Path) -> tuple[Path, Path]:
    """Make a daemon's store of three batches that were all delivered, and a receiver's that holds them."""
    ours, theirs = folder / "outbox.db", folder / "receiver.db"
    receiver = await Store.open(theirs)
    with closing(Outbox.open(ours)) as outbox:
        outbox.begin_round(Work(ROUND, NODE), NOW)
        proofs = Proofs.of_distances((nonce, 1.0) for nonce in NODE.nonces(Span(0, 6)))
        commit_span(outbox, ROUND, NODE, Span(0, 6), proofs, WEIGHTS, NOW)
        form_batches(outbox, ["witness"], size=2, age=1, now=NOW, current=None)
        while head := next_pending(outbox, "witness"):
            nonces = proofs.nonces[2 * head.batch - 2 : 2 * head.batch]
            await receiver.add(
                Arrival(head.id, "generated", "2023-11-14T22:13:20Z", head.body, "AB", 10, "miner", nonces)
            )
            record_delivered(outbox, "witness", head.batch, NOW)
    await receiver.close()
    return ours, theirs


async def test_the_judge_finds_nothing_where_all_is_well(tmp_path: Path) -> None:
    verdict = judge(*await stores(tmp_path))
    assert verdict.complaints == []
    assert (verdict.rounds, verdict.batches, verdict.proofs, verdict.lost, verdict.doubled) == (1, 3, 6, 0, 0)


SECOND = "(SELECT id FROM batches ORDER BY seq LIMIT 1 OFFSET 1)"


@pytest.mark.parametrize(
    ("store", "damage", "complaints"),
    [
        ("receiver", f"DELETE FROM batches WHERE id = {SECOND}", ["did not arrive", "order", "2 nonces were checked"]),
        ("receiver", f"UPDATE batches SET body = json_set(body, '$.node_id', 2) WHERE id = {SECOND}", ["another body"]),
        (
            "receiver",
            "INSERT INTO batches (id, kind, received_at, body) SELECT 'x', kind, '', body FROM batches LIMIT 1",
            ["in no store", "order", "2 nonces arrived in two batches"],
        ),
        ("receiver", "UPDATE batches SET seq = 9 WHERE seq = 1", ["order"]),
        ("receiver", "UPDATE totals SET conflicts = 1", ["another body under a known id"]),
        ("outbox", "UPDATE progress SET checked = 7", ["up to position 6", "1 nonces were checked"]),
        ("outbox", "UPDATE progress SET cursor = 5, checked = 5", ["1 nonces arrived that were never checked"]),
        ("outbox", "UPDATE progress SET cursor = 4, islands = '[[4, 6]]'", ["has gaps", "up to position 4"]),
        ("outbox", "UPDATE batches SET state = 'pending' WHERE number = 3", ["1 batches are not delivered"]),
        ("outbox", "INSERT INTO proofs VALUES (99, 1, 1, NULL, NULL, 0, 1, x'', x'')", ["1 proofs are in no batch"]),
    ],
)
async def test_the_judge_names_what_is_wrong(tmp_path: Path, store: str, damage: str, complaints: list[str]) -> None:
    await stores(tmp_path)
    with closing(sqlite3.connect(tmp_path / f"{store}.db", isolation_level=None)) as db:
        db.execute(damage)
    found = judge(tmp_path / "outbox.db", tmp_path / "receiver.db").complaints
    assert len(found) == len(complaints), found
    for expected, complaint in zip(complaints, found, strict=True):
        assert expected in complaint
