"""Workers of tests are forked, and are to their parents what a process of their own would be: support/forking.py."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest

from pocd.worker import frames
from tests.support.at_start.sitecustomize import FOLDER, belonging
from tests.support.forking import Start, at_work
from tests.support.waiting import PATIENCE
from tests.worker.test_worker import LOAD

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_forking = pytest.mark.skipif(not os.environ.get(FOLDER), reason="each worker is to import for itself")


@contextlib.contextmanager
def loading_worker() -> Iterator[tuple[subprocess.Popen[bytes], socket.socket, BinaryIO]]:
    """A worker that has said its first word, its parent's end of the socket, and a stream of what it says."""
    ours, theirs = socket.socketpair()
    with theirs:
        program = [sys.executable, "-m", "pocd.worker", str(theirs.fileno())]
        worker = subprocess.Popen(program, pass_fds=[theirs.fileno()])
    with worker, ours, ours.makefile("rb") as stream:
        try:
            ours.settimeout(PATIENCE)
            ours.sendall(frames.encode(LOAD))
            assert frames.read(stream)
            yield worker, ours, stream
        finally:
            worker.kill()


@needs_forking
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, -signal.SIGTERM)])
def test_what_ends_the_stand_in_ends_its_double(number: int, code: int) -> None:
    with loading_worker() as (worker, _, stream):
        double = at_work(worker.pid)
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (worker.pid, double)]
        assert ["libtorch" in each for each in maps] == [False, True]
        worker.send_signal(number)
        while frames.read(stream):
            pass
        assert worker.wait(PATIENCE) == code


@needs_forking
def test_a_stand_in_ends_as_its_double_does() -> None:
    with loading_worker() as (worker, ours, stream):
        stream.close()
        ours.close()
        assert worker.wait(PATIENCE) == 0
    ended = subprocess.run([sys.executable, "-m", "pocd.worker", "none"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "invalid literal for int" in ended.stderr


def given(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - any value of JSON
    environment = {**os.environ, **changes.pop("environment", {})}
    return {"environment": environment, "belonging": {**json.loads(json.dumps(belonging())), **changes}}


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, ""),
        ({"environment": {"TMPDIR": "/other", "POCD_LOG__LEVEL": "debug", "PYTEST_CURRENT_TEST": "other"}}, ""),
        ({"environment": {"OMP_NUM_THREADS": "77", "HF_HOME": "/other"}}, "HF_HOME, OMP_NUM_THREADS"),
        ({"cgroup": "another"}, "cgroup"),
        ({"user": [1000] * 6}, "user"),
    ],
)
def test_what_cannot_be_taken_over_is_seen(changes: dict[str, Any], differs: str) -> None:
    assert Start(given(**changes), []).differs() == differs


TAKING_OVER = """
import json, os, resource, signal, sys, tempfile
from tests.support.at_start.sitecustomize import NAMESPACES
from tests.support.forking import Start
at = lambda kind: os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
tempfile.gettempdir()  # which it remembers
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background
Start(json.loads(sys.argv[1]), [0, 1, int(sys.argv[2]), *map(at, NAMESPACES)]).take_over()
print(json.dumps([
    os.getcwd(), os.umask(0), resource.getrlimit(resource.RLIMIT_NOFILE)[0], tempfile.gettempdir(),
    os.environ.get("HOME"), signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, os.read(50, 5).decode(),
    sorted(map(int, os.listdir("/proc/self/fd"))), signal.getsignal(signal.SIGINT) is signal.default_int_handler,
]))
"""


def test_files_limits_signals_and_folders_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "told").write_text("hello")
    start = {
        "environment": {"TMPDIR": str(tmp_path)},
        "files": [0, 1, 50],
        "folder": str(tmp_path),
        "umask": 0o27,
        "limits": {resource.RLIMIT_NOFILE: [200, 300]},
        "processors": sorted(os.sched_getaffinity(0)),
        "niceness": os.nice(0),
        "blocked": [],
        "ignored": [signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ],
    }
    with (tmp_path / "told").open() as file:
        program = [sys.executable, "-c", TAKING_OVER, json.dumps(start), str(file.fileno())]
        taken = json.loads(subprocess.run(program, pass_fds=[file.fileno()], stdout=subprocess.PIPE, check=True).stdout)
    # The fourth file is the listing's own.
    assert taken == [str(tmp_path), 0o27, 200, str(tmp_path), None, True, "hello", [0, 1, 2, 50], True]
