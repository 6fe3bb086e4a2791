"""The script for the first contact with a GPU, rehearsed without one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from scripts.trials.steps import Steps
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable

    from scripts.trials.steps import Facts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # from Python 3.12 on
def test_a_step_that_fails_dies_hangs_or_has_no_time_left_stops_no_other(tmp_path: Path) -> None:
    clock = iter([0.0, 0, 1, 1, 2, 2, 3, 3, 4, 8, 9.5])
    steps = Steps(tmp_path, 10, clock=clock.__next__)

    def fails() -> Facts:
        sys.stdout.write("what it says\n")
        raise ValueError("so it is")

    def hangs() -> Facts:
        signal.pause()
        return {}

    steps.run("fails", fails, least=5)
    steps.run("dies", lambda: os._exit(3), least=5)
    steps.run("spoils", lambda: {"found": os.getpid()}, least=5)
    steps.run("too long", lambda: pytest.fail("there is no time"), least=8)
    steps.run("hangs", hangs, least=1)
    facts = orjson.loads((tmp_path / "facts.json").read_bytes())
    assert facts.pop("spoils")["found"] != os.getpid()
    assert facts == {
        "fails": {"error": "ValueError: so it is", "seconds": 1},
        "dies": {"error": "its process ended with status 3", "seconds": 1},
        "too long": {"skipped": "7 s were left, and it takes 8", "seconds": 1},
        "hangs": {"error": "it was not done after 2 s", "seconds": 1.5},
    }
    assert (tmp_path / "fails.txt").read_text().startswith("what it says\nTraceback")


ORPHANING = """
import subprocess, sys, time
from pathlib import Path
from scripts.trials.steps import Steps

def long():
    own = subprocess.Popen(["sleep", "1000"])
    Path(sys.argv[1], "pid").write_text(f"{own.pid} .")
    own.wait()

Steps(Path(sys.argv[1]), 1000).run("long", long, least=0)
"""


def test_what_a_step_has_started_ends_with_a_script_that_is_killed(tmp_path: Path) -> None:
    script = subprocess.Popen([sys.executable, "-c", ORPHANING, tmp_path], cwd=ROOT)
    told = tmp_path / "pid"
    try:
        wait_for(lambda: told.is_file() and told.read_text().endswith("."))
    finally:
        script.kill()
        script.wait()
    wait_for(lambda: not is_alive(int(told.read_text().split()[0])))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_steps_run_to_their_end(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--dtype", "float32", "--model", "bundled:tiny-llama", "--rows", "2"]
    options += ["--steps", "machine", "products", "attention", "generator", "agreement in float32", "poc3", "profile"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.trials.first_contact", *options, "--seconds", "900", "--out", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = orjson.loads((tmp_path / "facts.json").read_bytes())
    assert not [name for name, found in facts.items() if found.keys() & {"error", "skipped"}], done.stdout
    assert facts["generator"]["hash exact"] is True
    assert facts["poc3"]["fast"]["path"] == "eager"
    assert len(facts) == 7
