"""The script that measures the admin API runs whole and prints numbers; how fast things are is no test's matter."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LATENCIES = r"(\d+) answers, p50 ([\d.]+) ms, p99 ([\d.]+) ms, max ([\d.]+) ms; "
ERRORS = r"errors: (?:0|\{'(?:TimeoutError|not sent)'.*\})"  # of the load alone, where the machine is that busy


def printed(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "scripts.bench.api", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def latencies(text: str, what: str) -> list[float]:
    found = re.search(f"^{what}: {LATENCIES}{ERRORS}$", text, re.MULTILINE)
    assert found, text
    return [float(number) for number in found.groups()]


def test_a_load_of_status_is_measured_and_what_it_costs_mining() -> None:
    text = printed("status", "--seconds", "0.5", "--warm-up", "0.1", "--rounds", "1", "--seq-len", "8", "--rate", "100")
    assert re.search(r"^ *none +[\d.]+ ", text, re.MULTILINE)
    assert re.search(r"^ *status +[\d.]+ +[\d.]+–[\d.]+ +[\d.]+ +[\d.]+–[\d.]+ +[\d.]+% +[\d.]+%", text, re.MULTILINE)
    answers, p50, p99, longest = latencies(text, "status while mining")
    assert answers > 0
    assert 0 < p50 <= p99 <= longest


def test_silent_connections_are_measured_beside_none() -> None:
    text = printed("silent", "--seconds", "0.5", "--seq-len", "8", "--rate", "100", "--connections", "300")
    assert latencies(text, "nobody else")[0] > 0
    assert latencies(text, "beside 300 silent connections")[0] > 0
    still_open = re.search(r"^silent connections still open: (\d+) of 300$", text, re.MULTILINE)
    assert still_open
    assert int(still_open[1]) < 300  # of those that were let in, none where the time for their heads is over
