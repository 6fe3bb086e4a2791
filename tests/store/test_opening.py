"""Whether and how a store is opened, and when a look at its file says that it cannot be used."""

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import pytest

from pocd.process import EXIT_CONFIG, EXIT_TEMPORARY
from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs
from pocd.store import opening
from pocd.store.errors import StoreError, StoreHeldError, StoreUnavailableError, unopened, unusable
from pocd.store.opening import open_store
from pocd.store.outbox import Outbox, Work
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


@contextmanager
def reader(path: Path) -> Iterator[IO[bytes]]:
    """Hold the store in another process, as a shell or a backup does, until its standard input gets a line."""
    code = (
        "import sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('BEGIN'); db.execute('SELECT * FROM totals').fetchone()\n"
        "print('holds', flush=True); sys.stdin.readline(); db.execute('COMMIT'); db.close()\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        yield process.stdin
        process.stdin.close()


# Held by another


def test_a_start_waits_for_whoever_reads_the_store_for_a_moment(path: Path) -> None:
    with closing(Outbox.open(path)) as outbox:
        outbox.begin_round(Work(ROUND, NODE), NOW)
    told: list[str] = []
    with reader(path) as end:

        def waiting(why: str) -> None:
            told.append(why)
            end.write(b"\n")
            end.flush()

        with closing(Outbox.open(path, waiting)) as outbox:
            commit(outbox, 0, 1)
    assert len(told) == 1
    assert "another process holds it" in told[0]


def test_a_store_that_stays_held_may_be_free_at_the_next_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "HELD_SECONDS", 0.0)
    Outbox.open(path).close()
    with reader(path), pytest.raises(StoreHeldError) as caught:
        Outbox.open(path)
    assert caught.value.code == EXIT_TEMPORARY


# How an error ends


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SQLITE_BUSY", EXIT_TEMPORARY),
        ("SQLITE_BUSY_RECOVERY", EXIT_TEMPORARY),
        ("SQLITE_FULL", EXIT_TEMPORARY),
        ("SQLITE_IOERR_READ", EXIT_TEMPORARY),
        ("SQLITE_NOTADB", EXIT_CONFIG),
        ("SQLITE_CORRUPT", EXIT_CONFIG),
        ("SQLITE_CANTOPEN", EXIT_CONFIG),
        ("SQLITE_READONLY", EXIT_CONFIG),
    ],
)
def test_only_what_a_person_must_change_keeps_the_daemon_from_being_started_again(
    path: Path, name: str, code: int
) -> None:
    error = sqlite3.OperationalError("as SQLite says")
    error.sqlite_errorname = name
    found = unusable(path, error)
    assert found.code == code
    assert str(path) in str(found)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, EXIT_TEMPORARY),
        (errno.EIO, EXIT_TEMPORARY),
        (errno.EMFILE, EXIT_TEMPORARY),
        (errno.EACCES, EXIT_CONFIG),
        (errno.ENOTDIR, EXIT_CONFIG),
        (errno.EROFS, EXIT_CONFIG),
    ],
)
def test_the_systems_errors_end_by_the_same_rule(path: Path, number: int, code: int) -> None:
    error = unopened(path, OSError(number, os.strerror(number)))
    assert error.code == code
    assert ("ReadWritePaths=" in str(error)) == (number in {errno.EACCES, errno.EROFS})


# Damage, and what looks like it


class Misread:
    """Reads damage, as often as the test says: what SQLite makes of a disk that gives EIO."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self, outbox: Outbox) -> int:
        if self.left:
            self.left -= 1
            error = sqlite3.DatabaseError("database disk image is malformed")
            error.sqlite_errorname = "SQLITE_CORRUPT"
            raise error
        return outbox.totals.checked


def held(path: Path) -> bool:
    """Ask as another process would: this one must not close the file, or its locks are gone."""
    code = "import sys, pathlib; from pocd.check.store import holder; print(holder(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == str(os.getpid())


async def test_a_read_error_is_no_damage_when_a_second_look_finds_none(path: Path) -> None:
    with closing(OutboxThread(path)) as thread:
        await thread(Outbox.begin_round, Work(ROUND, NODE), NOW)
        await thread(commit, 0, 3)
        misread = Misread(1)
        with pytest.raises(StoreUnavailableError, match="it is looked at again"):
            await thread(misread)
        assert await thread(misread) == 3
        await thread(commit, 3, 4)
        assert held(path), "the lock was taken again"


async def test_damage_that_a_second_look_finds_as_well_is_said(path: Path) -> None:
    with closing(OutboxThread(path)) as thread:
        await thread(Outbox.begin_round, Work(ROUND, NODE), NOW)
    harm_an_index(path)
    with closing(OutboxThread(path)) as thread:  # which the quick look at a start does not see
        with pytest.raises(StoreUnavailableError):
            await thread(Misread(1))
        with pytest.raises(StoreError, match="is damaged") as caught:
            await thread(Misread(0))
        assert caught.value.code == EXIT_CONFIG


def harm_an_index(path: Path) -> None:
    """Store a row that an index does not know."""
    partial = "UPDATE sqlite_schema SET sql = sql || ' WHERE 0' WHERE name = 'batches_by_id'"
    whole = "UPDATE sqlite_schema SET sql = replace(sql, ' WHERE 0', '') WHERE name = 'batches_by_id'"
    insert = "INSERT INTO batches VALUES (1, 'b', 'generated', NULL, 1, 1.0, 'pending', 1.0, x'00')"
    for statement in (partial, insert, whole):  # each by a connection that reads the schema anew
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA writable_schema = ON")
            db.execute(statement)


def test_a_file_that_cannot_be_read_is_not_called_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Outbox.open(path).close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(4 * 4096))

    def unreadable(file: Path) -> None:
        raise unopened(file, OSError(errno.EIO, "Input/output error"))

    monkeypatch.setattr(opening, "_read_through", unreadable)
    with pytest.raises(StoreError, match="cannot be opened now: Input/output error") as caught:
        open_store(path)
    assert caught.value.code == EXIT_TEMPORARY


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_plain_file_is_refused_for_good(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(StoreError, match="it is no plain file; choose another store") as refused:
        open_store(path)
    assert refused.value.code == EXIT_CONFIG
