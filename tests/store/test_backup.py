"""Copies of a store in use, put back; and a file put back beside the write-ahead log of another time."""

import resource
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from pocd.process import EXIT_CONFIG
from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs
from pocd.receiver.store import Arrival, Store
from pocd.store.backup import BackupError, back_up, back_up_closed, restore
from pocd.store.batches import form_batches
from pocd.store.deliveries import next_pending, record_delivered
from pocd.store.errors import StoreError
from pocd.store.opening import wal_of
from pocd.store.outbox import Outbox, Work
from pocd.store.proofs import Weights
from tests.support.clocks import NOW, ROUND
from tests.support.stored import commit_span
from tests.support.waiting import PATIENCE

NODE = Node(1, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    with closing(Outbox.open(path)) as outbox:
        outbox.begin_round(Work(ROUND, NODE), NOW)
        yield outbox


def commit(outbox: Outbox, start: int, stop: int) -> None:
    commit_span(outbox, ROUND, NODE, Span(start, stop), Proofs(), Weights("f00d", "float32"), NOW)


def checked(path: Path) -> int:
    with closing(Outbox.open(path)) as outbox:
        return outbox.totals.checked


def test_a_copy_is_made_while_the_store_is_written(outbox: Outbox, tmp_path: Path) -> None:
    copy, copying, went_on = tmp_path / "copy.db", threading.Event(), threading.Event()
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        copying.set()
        assert went_on.wait(PATIENCE)

    outbox.db.execute("INSERT INTO meta VALUES ('large', hex(zeroblob(4000000)))")
    commit(outbox, 0, 5)
    thread = threading.Thread(target=back_up, args=(outbox.db, copy, step))
    thread.start()
    assert copying.wait(PATIENCE)
    stop = 5
    while thread.is_alive():
        commit(outbox, stop, stop + 1)
        stop += 1
        went_on.set()
    thread.join()
    assert copy.stat().st_mode & 0o777 == 0o600
    assert steps > 2, "the store's own thread gets its turns"
    assert 5 <= checked(copy) <= stop
    assert outbox.totals.checked == stop > 5, "others went on"
    with closing(sqlite3.connect(copy)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_copy_replaces_nothing(outbox: Outbox, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    copy.write_bytes(b"kept")
    with pytest.raises(BackupError, match="there already"):
        back_up(outbox.db, copy)
    assert copy.read_bytes() == b"kept"


def test_of_a_copy_that_was_ended_nothing_is_left(outbox: Outbox, tmp_path: Path) -> None:
    def stop() -> None:
        raise BackupError("the daemon stops")

    with pytest.raises(BackupError, match="stops"):
        back_up(outbox.db, tmp_path / "copy.db", stop)
    assert not (tmp_path / "copy.db").exists()
    commit(outbox, 0, 1)


def test_a_copy_is_put_back_and_what_was_there_is_kept_whole(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    with closing(Outbox.open(path)) as outbox:
        outbox.begin_round(Work(ROUND, NODE), NOW)
        commit(outbox, 0, 5)
        back_up(outbox.db, copy)
        commit(outbox, 5, 9)
        crashed = tmp_path / "crashed"  # what a crash leaves: a file and its log
        crashed.mkdir()
        for file in (path, wal_of(path)):
            shutil.copy(file, crashed)
    at = crashed / path.name
    aside = restore(at, copy, "before")
    assert aside == crashed / "outbox.db.before"
    assert (checked(at), checked(aside), copy.exists()) == (5, 9, True)


def test_a_disk_that_is_full_keeps_no_half_of_a_restored_copy(path: Path, tmp_path: Path) -> None:
    Outbox.open(path).close()
    copy = tmp_path / "copy.db"
    back_up_closed(path, copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(BackupError, match=r"cannot be put at .*outbox\.db: File too large"):
            restore(path, copy, "before")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name for file in tmp_path.iterdir()} == {path.name, copy.name}
    assert path.read_bytes() == before


def test_a_closed_store_is_copied_as_well(path: Path, tmp_path: Path) -> None:
    with closing(Outbox.open(path)) as outbox:
        outbox.begin_round(Work(ROUND, NODE), NOW)
        commit(outbox, 0, 5)
    back_up_closed(path, tmp_path / "copy.db")
    assert checked(tmp_path / "copy.db") == 5


@pytest.mark.parametrize("content", [b"", b"no database at all", None])
def test_what_is_no_whole_store_is_not_put_back(path: Path, tmp_path: Path, content: bytes | None) -> None:
    copy = tmp_path / "copy.db"
    if content is not None:
        copy.write_bytes(content)
    Outbox.open(path).close()
    with pytest.raises(BackupError):
        restore(path, copy, "before")
    assert checked(path) == 0


@pytest.mark.parametrize("how", ["copied while stopped", "backed up while it ran"])
def test_a_file_put_back_beside_a_newer_log_is_refused_and_both_are_kept(path: Path, tmp_path: Path, how: str) -> None:
    copy, folder = tmp_path / "copy.db", tmp_path / "crashed"
    with closing(Outbox.open(path)) as outbox:
        outbox.begin_round(Work(ROUND, NODE), NOW)
        commit(outbox, 0, 5)
    if how == "copied while stopped":
        shutil.copy(path, copy)
    folder.mkdir()
    mixed = folder / path.name
    with closing(Outbox.open(path)) as outbox:
        if how != "copied while stopped":
            back_up(outbox.db, copy)
        commit(outbox, 5, 9)
        shutil.copy(wal_of(path), folder)
        shutil.copy(path, mixed)
        assert checked_apart(folder) == 9, "file and log of one time belong together"
    shutil.copy(copy, mixed)
    before = mixed.read_bytes(), wal_of(mixed).read_bytes()
    with pytest.raises(StoreError, match="log of another time") as caught:
        Outbox.open(mixed)
    assert caught.value.code == EXIT_CONFIG
    assert (mixed.read_bytes(), wal_of(mixed).read_bytes()) == before


def checked_apart(folder: Path) -> int:
    """Open a copy of a folder's store, so that the folder stays as it is."""
    apart = folder.with_name("apart")
    shutil.copytree(folder, apart)
    return checked(apart / "outbox.db")


async def test_a_receiver_knows_what_a_restored_store_sends_again_by_its_id_or_its_nonces(tmp_path: Path) -> None:
    path, copy = tmp_path / "outbox.db", tmp_path / "copy.db"
    receiver = await Store.open(tmp_path / "receiver.db")

    def mine(outbox: Outbox, start: int, stop: int) -> None:
        proofs = Proofs.of_distances((nonce, 1.0) for nonce in NODE.nonces(Span(start, stop)))
        commit_span(outbox, ROUND, NODE, Span(start, stop), proofs, Weights("f00d", "float32"), NOW)

    async def deliver(outbox: Outbox, size: int) -> list[str]:
        """Send all that was found, and return how it was taken."""
        taken = []
        form_batches(outbox, ["one"], size=size, age=0.0, now=NOW, current=None)
        while head := next_pending(outbox, "one"):
            nonces = tuple(orjson.loads(head.body)["nonces"])
            arrival = Arrival(head.id, "generated", "2023-11-14T22:13:20Z", head.body, "AB", 10, "miner", nonces)
            taken.append((await receiver.add(arrival)).value)
            record_delivered(outbox, "one", head.batch, NOW)
        return taken

    with closing(Outbox.open(path)) as outbox:
        outbox.begin_round(Work(ROUND, NODE), NOW)
        mine(outbox, 0, 6)
        form_batches(outbox, ["one"], size=3, age=0.0, now=NOW, current=None)
        mine(outbox, 6, 10)
        back_up(outbox.db, copy)  # two batches are pending in it, and four proofs wait for one
        assert await deliver(outbox, 4) == ["stored"] * 3
        mine(outbox, 10, 16)
        assert await deliver(outbox, 4) == ["stored"] * 2
    restore(path, copy, "before")
    with closing(Outbox.open(path)) as outbox:
        mine(outbox, outbox.begin_round(Work(ROUND, NODE), NOW).progress.cursor, 18)
        assert await deliver(outbox, 4) == ["duplicate"] * 4 + ["stored"]  # cut alike as far as it was sent
        totals, _ = await receiver.stats()
    assert (totals.conflicts, totals.duplicates, totals.distinct_nonces) == (0, 4, 18)
    await receiver.close()
