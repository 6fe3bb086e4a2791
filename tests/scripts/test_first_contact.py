"""The script for the first contact with a GPU, rehearsed without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from scripts.trials.first_contact import Steps

if TYPE_CHECKING:
    from scripts.trials.first_contact import Facts

ROOT = Path(__file__).resolve().parents[2]


def test_a_step_that_fails_or_has_no_time_left_stops_no_other(tmp_path: Path) -> None:
    now = [0.0]
    steps = Steps(tmp_path, 10, clock=lambda: now[0])

    def fails() -> Facts:
        now[0] += 8
        raise ValueError("so it is")

    steps.run("fails", fails, least=5)
    steps.run("too long", lambda: pytest.fail("there is no time"), least=5)
    steps.run("short", lambda: {"found": 1}, least=2)
    assert orjson.loads((tmp_path / "facts.json").read_bytes()) == {
        "fails": {"error": "ValueError: so it is", "seconds": 8},
        "too long": {"skipped": "2 s were left, and it takes 5", "seconds": 0},
        "short": {"found": 1, "seconds": 0},
    }


def test_all_steps_run_to_their_end(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--dtype", "float32", "--model", "bundled:tiny-llama", "--rows", "2"]
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
    assert facts["bundled:tiny-llama, poc3"]["fast"]["path"] == "eager"
