"""A store whose file is taken away while it is open, and a folder that every user may write."""

import os
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs
from pocd.store.backup import restore
from pocd.store.errors import StoreUnavailableError
from pocd.store.opening import wal_of
from pocd.store.outbox import Outbox, Work
from pocd.store.place import copies, exposure
from pocd.store.proofs import Weights
from pocd.store.thread import OutboxThread
from tests.support.clocks import NOW, ROUND
from tests.support.stored import commit_span

NODE = Node(1, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


def commit(outbox: Outbox, start: int, stop: int) -> None:
    commit_span(outbox, ROUND, NODE, Span(start, stop), Proofs(), Weights("f00d", "float32"), NOW)


def begun(path: Path) -> Outbox:
    outbox = Outbox.open(path)
    outbox.begin_round(Work(ROUND, NODE), NOW)
    commit(outbox, 0, 5)
    return outbox


def checked(path: Path) -> int:
    with closing(Outbox.open(path)) as outbox:
        return outbox.totals.checked


@pytest.mark.parametrize("which", ["file", "log"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_nothing_is_written_into_a_file_that_is_no_longer_at_its_path(path: Path, which: str, how: str) -> None:
    with closing(OutboxThread(path)) as thread:
        await thread(Outbox.begin_round, Work(ROUND, NODE), NOW)
        file = path if which == "file" else wal_of(path)
        aside = path.with_name("aside")
        file.rename(aside)
        if how == "replaced":
            file.write_bytes(aside.read_bytes())
        with pytest.raises(StoreUnavailableError, match=f"{file} is") as caught:
            await thread(commit, 0, 5)
        assert "pocd outbox backup FILE" in str(caught.value)
        assert thread.view.totals.checked == 0, "nothing is counted that nobody would find"
        aside.rename(file)
        await thread(commit, 0, 5)  # it is where it was
    with closing(Outbox.open(path)) as outbox:
        assert outbox.totals.checked == 5


def test_what_was_in_a_removed_file_is_at_its_path_after_a_stop(path: Path) -> None:
    with closing(begun(path)):
        path.unlink()
    assert checked(path) == 5
    assert copies(path) == []


def test_what_was_in_a_removed_file_outlives_a_kill(path: Path) -> None:
    with closing(begun(path)) as outbox:
        path.unlink()
        with pytest.raises(StoreUnavailableError, match="is gone"):
            outbox.keep_place()
        (copy,) = copies(path)
        killed = path.with_name("killed.db")
        shutil.copy(copy, killed)
    assert checked(killed) == 5


@pytest.mark.parametrize("looks", [0, 1, 2])
def test_what_was_in_a_replaced_file_is_saved_beside_it_and_can_be_taken_up(path: Path, looks: int) -> None:
    backup = path.with_name("backup.db")
    Outbox.open(path).close()
    shutil.copy(path, backup)
    with closing(begun(path)) as outbox:
        backup.rename(path)
        for _ in range(looks):
            with pytest.raises(StoreUnavailableError, match=r"pocd outbox restore .*outbox\.db\.saved-1`"):
                outbox.keep_place()
    assert checked(path) == 0, "a start takes what is at the path"
    (copy,) = copies(path)
    assert copy == outbox.place.saved
    aside = restore(path, copy, "before")
    assert aside is not None
    assert (checked(path), checked(aside)) == (5, 0)


def test_a_copy_is_dropped_when_the_file_is_back_where_it_was(path: Path) -> None:
    with closing(begun(path)) as outbox:
        away = path.with_name("away.db")
        path.rename(away)
        with pytest.raises(StoreUnavailableError):
            outbox.keep_place()
        assert len(copies(path)) == 1
        away.rename(path)
        outbox.keep_place()
        assert copies(path) == []
        commit(outbox, 5, 9)
    assert checked(path) == 9


def test_the_files_of_a_folder_that_was_renamed_are_whole_in_it(tmp_path: Path) -> None:
    path, renamed = tmp_path / "store" / "outbox.db", tmp_path / "renamed"
    with closing(begun(path)) as outbox:
        path.parent.rename(renamed)
        with pytest.raises(StoreUnavailableError, match="pocd outbox backup FILE"):
            outbox.keep_place()
    assert not path.parent.exists()
    assert checked(renamed / path.name) == 5


def test_a_log_that_was_removed_is_no_loss(path: Path) -> None:
    with closing(begun(path)) as outbox:
        wal_of(path).unlink()
        with pytest.raises(StoreUnavailableError, match=r"outbox\.db-wal is gone"):
            outbox.keep_place()
    assert checked(path) == 5


# Who else may write there


def test_a_folder_is_made_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "above" / "folder" / "outbox.db"
    before = os.umask(0)
    try:
        Outbox.open(path).close()
    finally:
        os.umask(before)
    assert [each.stat().st_mode & 0o777 for each in (path.parent.parent, path.parent)] == [0o700, 0o700]
    assert exposure(path) is None


@pytest.mark.parametrize(
    ("folder", "file", "told"),
    [
        (0o777, 0o600, "chmod o-w .*folder"),
        (0o1777, 0o600, None),  # as /tmp is: what is there is its owner's
        (0o755, 0o644, None),
        (0o770, 0o660, None),
        (0o755, 0o666, "chmod o-w .*outbox.db"),
    ],
)
def test_a_store_that_every_user_may_take_away_is_told(
    tmp_path: Path, folder: int, file: int, told: str | None
) -> None:
    path = tmp_path / "folder" / "outbox.db"
    Outbox.open(path).close()
    path.chmod(file)
    path.parent.chmod(folder)
    found = exposure(path)
    assert found is None if told is None else re.search(told, found or "")
