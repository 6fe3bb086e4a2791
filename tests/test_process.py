"""How processes begin, and what decides the status they end with."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest

from pocd.process import EXIT_CONFIG, EXIT_SIGNALLED, EXIT_TEMPORARY, exit_status
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ENOSPC, "full"), EXIT_TEMPORARY),
        (OSError(errno.EMFILE, "no files"), EXIT_TEMPORARY),
        (OSError(errno.EIO, "a disk"), EXIT_TEMPORARY),
        (OSError(errno.ESTALE, "a mount"), EXIT_TEMPORARY),
        (OSError(errno.EADDRINUSE, "held, or waits for the end of its last connections"), EXIT_TEMPORARY),
        (OSError(errno.EADDRNOTAVAIL, "no such address here yet"), EXIT_TEMPORARY),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), EXIT_TEMPORARY),
        (TimeoutError(), EXIT_TEMPORARY),
        (caused(ValueError("names the file"), OSError(errno.EIO, "a disk")), EXIT_TEMPORARY),
        (caused(OSError("no connection"), OSError(errno.ECONNREFUSED, "refused")), EXIT_TEMPORARY),
        (FileNotFoundError(errno.ENOENT, "missing"), EXIT_CONFIG),
        (PermissionError(errno.EACCES, "not allowed"), EXIT_CONFIG),
        (NotADirectoryError(errno.ENOTDIR, "no folder"), EXIT_CONFIG),
        (OSError(errno.EAFNOSUPPORT, "no IPv6"), EXIT_CONFIG),
        (ValueError("wrong"), EXIT_CONFIG),
    ],
)
def test_what_may_pass_is_75_and_what_a_person_must_change_78(error: Exception, status: int) -> None:
    assert exit_status(error) == status


def test_a_store_that_is_held_may_pass_and_a_file_that_is_none_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as holder, closing(sqlite3.connect(path)) as other:
        holder.execute("BEGIN EXCLUSIVE")
        other.execute("PRAGMA busy_timeout = 0")
        with pytest.raises(sqlite3.OperationalError) as held:
            other.execute("CREATE TABLE t (a)")
    assert exit_status(held.value) == EXIT_TEMPORARY
    path.write_bytes(b"no database" * 100)
    with closing(sqlite3.connect(path)) as db, pytest.raises(sqlite3.DatabaseError) as wrong:
        db.execute("CREATE TABLE t (a)")
    assert exit_status(wrong.value) == EXIT_CONFIG


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


# A signal that comes in the middle of the imports of the command line.
INTERRUPTED = """
import os, signal, sys
import pocd.__main__ as entry

class Signals:
    def find_spec(self, name, *_):
        if name == "pocd.cli.main":
            os.kill(os.getpid(), signal.Signals[number])

number = sys.argv.pop(1)
# What ran the tests may have it ignored, as nohup does.
signal.signal(signal.Signals[number], signal.default_int_handler if number == "SIGINT" else signal.SIG_DFL)
sys.meta_path.insert(0, Signals())
entry.main()
"""


@pytest.mark.parametrize(
    ("number", "arguments", "status"),
    [
        ("SIGTERM", ["--version"], -signal.SIGTERM),
        ("SIGINT", ["--version"], EXIT_SIGNALLED + signal.SIGINT),
        ("SIGHUP", ["--version"], -signal.SIGHUP),
        ("SIGTERM", ["run"], -signal.SIGTERM),
        ("SIGINT", ["run"], EXIT_SIGNALLED + signal.SIGINT),
        ("SIGHUP", ["run", "--config", "/nowhere/pocd.toml"], EXIT_CONFIG),  # which is what ends it
    ],
)
def test_a_signal_during_the_imports_is_heeded_after_them(number: str, arguments: list[str], status: int) -> None:
    ended = run(INTERRUPTED, number, *arguments)
    assert ended.returncode == status
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


# A process that gets the orphans of its descendants, as process 1 does.
INIT = """
import ctypes, os, signal, sys, time
from pocd.process import stand_by

PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
stand_by()
reading, writing = os.pipe()
middle = os.fork()
if middle == 0:
    orphan = os.fork()
    if orphan:
        os.write(writing, str(orphan).encode())
    os._exit(0)
orphan = int(os.read(reading, 100))
os.waitpid(middle, 0)
end = time.monotonic() + float(sys.argv[1])
while os.path.exists(f"/proc/{orphan}") and time.monotonic() < end:
    time.sleep(0.01)
print("left" if os.path.exists(f"/proc/{orphan}") else "reaped")
sys.stdout.flush()
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
os.kill(os.getppid(), signal.SIGTERM)  # as a container's runtime does
signal.pause()
"""


def test_process_1_reaps_orphans_and_passes_signals_and_the_status_on() -> None:
    ended = run(INIT, str(PATIENCE / 2))
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "reaped\n", "")


def test_process_1_ends_as_a_child_that_a_signal_killed() -> None:
    ended = run("import os; from pocd.process import stand_by; stand_by(); os.kill(os.getpid(), 9)")
    assert ended.returncode == EXIT_SIGNALLED + signal.SIGKILL


def test_a_reader_of_errors_that_stalled_keeps_no_command_from_its_end() -> None:
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 65536)
        os.set_blocking(writing, True)
        command = [sys.executable, "-m", "pocd", "config", "check", "--config", "/nowhere/pocd.toml"]
        ended = subprocess.run(command, stderr=writing, timeout=PATIENCE, check=False)
    finally:
        os.close(reading)
        os.close(writing)
    assert ended.returncode == EXIT_CONFIG


def test_what_was_imported_is_never_looked_through_for_garbage() -> None:
    program = (
        "import gc\nfrom pocd.process import importing\n"
        "with importing():\n    assert not gc.isenabled()\n    import http.server\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 10_000\n"
        "assert not any(each is vars(http.server) for each in gc.get_objects())\n"
        "frozen, new = gc.get_freeze_count(), [[]]\n"
        "with importing():\n    import http.server\n"
        "assert any(each is new for each in gc.get_objects())"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
