"""Power cuts at many moments of a store's life, the disk that forgets, and the judge who looks at what is left."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

from pocd.store.backup import back_up
from pocd.store.outbox import Outbox
from scripts.trials.powercut.__main__ import cut, live, moments
from scripts.trials.powercut.disk import SECTOR, Disk, Left, Operation
from scripts.trials.powercut.recording import compiler, scratch
from scripts.trials.powercut.verdict import STORE, Promise, content, judge

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C compiler, cc or gcc")

SEED, STEPS, CUTS = 1, 40, 250
DATA = Path(__file__).parent.parent / "data"

Life = tuple[dict[str, bytes], list[Operation]]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with scratch() as one:
        yield one


@pytest.fixture(scope="module")
def life(folder: Path) -> Life:
    return live(folder, SEED, STEPS)


def drawn(operations: list[Operation], cuts: int = CUTS) -> Counter[int]:
    return moments(operations, cuts, random.Random(SEED))


def test_nothing_that_was_acknowledged_is_lost_by_a_power_cut(folder: Path, life: Life) -> None:
    files, operations = life
    kinds = Counter((each.kind, each.name) for each in operations)
    assert kinds["truncate", f"{STORE}-wal"], "the log was brought into the file, and cut"
    assert kinds["create", f"{STORE}-wal"] > 1, "the store was closed and opened"
    assert kinds["create", STORE.replace("outbox", "copy-1")] == 1
    tally, complaints = cut(files, operations, drawn(operations), folder, SEED)
    assert complaints == []
    assert set(tally) == set(get_args(Left))
    assert tally.total() == CUTS


@pytest.mark.parametrize("unsynced", [f"{STORE}-wal", STORE, STORE.replace("outbox", "copy-1"), "folder", ""])
def test_without_any_one_of_its_syncs_something_is_lost(folder: Path, life: Life, unsynced: str) -> None:
    files, operations = life
    careless = [each for each in operations if (each.kind, each.name) != ("sync", unsynced)]
    assert len(careless) < len(operations)
    _, complaints = cut(files, careless, drawn(careless, 60), folder, SEED)
    assert complaints


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_store_of_an_earlier_version_is_brought_up_to_date_through_power_cuts(version: int) -> None:
    with scratch() as folder:
        files, operations = live(folder, SEED, 1, (DATA / f"store_v{version}.sql").read_text())
        _, complaints = cut(files, operations, drawn(operations, 60), folder, SEED)
    assert complaints == []


# The disk


def left(disk: Disk, how: Left, seed: int = 0) -> dict[str, bytes]:
    return disk.left(how, random.Random(seed))


def done(*operations: Operation, files: dict[str, bytes] | None = None) -> Disk:
    disk = Disk(files or {})
    for operation in operations:
        disk.do(operation)
    return disk


def test_what_was_synced_is_left() -> None:
    written = Operation("create", "a"), Operation("write", "a", 2, b"xyz"), Operation("truncate", "a", 4)
    disk = done(*written, Operation("sync", "a"), Operation("sync", ""), Operation("write", "a", 0, b"new"))
    assert left(disk, "nothing") == {"a": b"\0\0xy"}
    assert left(disk, "all") == {"a": b"newy"}


def test_a_file_whose_name_was_not_synced_is_gone() -> None:
    disk = done(Operation("create", "a"), Operation("write", "a", 0, b"x"), Operation("sync", "a"))
    assert left(disk, "nothing") == {}
    assert left(disk, "all") == {"a": b"x"}
    inner = done(Operation("folder", "f"), Operation("create", "f/a"), Operation("sync", "f"))
    assert left(inner, "nothing") == {}
    inner.do(Operation("sync", ""))
    assert left(inner, "nothing") == {"f/a": b""}


def test_a_name_that_was_removed_or_changed_comes_back_until_its_folder_is_synced() -> None:
    for operation, after in ((Operation("unlink", "a"), {}), (Operation("rename", "a", data=b"b"), {"b": b"x"})):
        disk = done(operation, files={"a": b"x"})
        assert left(disk, "nothing") == {"a": b"x"}
        assert left(disk, "all") == after
        disk.do(Operation("sync", ""))
        assert left(disk, "nothing") == after


def test_a_torn_write_is_there_up_to_some_byte() -> None:
    disk = done(Operation("write", "a", 0, b"new"), files={"a": b"old"})
    found = {left(disk, "torn", seed)["a"] for seed in range(100)}
    assert found == {b"old", b"nld", b"ned", b"new"}


def test_any_sectors_of_a_write_are_there_and_no_byte_beside_them_is_harmed() -> None:
    before, start = bytes(4 * SECTOR), 100
    disk = done(Operation("write", "a", start, b"x" * (2 * SECTOR)), files={"a": before})
    edges = (start, SECTOR, 2 * SECTOR, start + 2 * SECTOR)
    found = set()
    for seed in range(200):
        content = left(disk, "any", seed)["a"]
        assert content[:start] == before[:start]
        assert content[edges[-1] :] == before[edges[-1] :]
        pieces = [set(content[first:last]) for first, last in itertools.pairwise(edges)]
        found.add(tuple("new" if each == {120} else "old" if each == {0} else "noise" for each in pieces))
    assert {("new", "old", "new"), ("old", "new", "old"), ("new",) * 3, ("old",) * 3} <= found
    assert any("noise" in each for each in found)


# The judge


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("UPDATE queues SET batches = batches + 1 WHERE state = 'pending'", "queues are counted wrongly"),
        ("UPDATE stages SET nonces = nonces + 1 WHERE state = 'pending'", "stages are counted wrongly"),
        ("UPDATE totals SET valid = valid + 1", "nonces were valid"),
        ("UPDATE progress SET cursor = cursor + 1", "nonces of a round were checked"),
        (
            (
                "INSERT INTO proofs SELECT 999, round, 1, NULL, NULL, 0, 1,"
                " CAST(char(json_extract(body, '$.nonces[0]'), 0, 0, 0, 0, 0, 0, 0) AS BLOB), x''"
                " FROM batches WHERE kind = 'generated' AND json_extract(body, '$.nonces[0]') < 128 LIMIT 1"
            ),
            "is there twice",
        ),
        ("UPDATE meta SET value = value + 1 WHERE key = 'commits'", "neither what was acknowledged"),
    ],
)
def test_the_judge_names_what_is_wrong(folder: Path, life: Life, tmp_path: Path, damage: str, complaint: str) -> None:
    del life  # whose store, as it is at the end, is judged
    path = tmp_path / STORE
    path.parent.mkdir()
    with closing(Outbox.open(folder / "root" / STORE)) as outbox:
        back_up(outbox.db, path)
    with closing(Outbox.open(path)) as outbox:
        promise = Promise(content(outbox.db))
        assert outbox.db.execute("SELECT count(*) FROM deliveries WHERE state = 'pending'").fetchone() != (0,)
    assert judge(tmp_path, promise) == []
    with closing(Outbox.open(path)) as outbox:
        outbox.db.execute(damage)
    assert any(complaint in each for each in judge(tmp_path, promise))
