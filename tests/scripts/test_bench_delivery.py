"""The script that measures delivery runs whole and prints numbers; how fast things are is no test's matter."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def table(*options: str) -> dict[str, list[float]]:
    """Run the script; returns the numbers of each row by the words before them."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "scripts.bench.delivery", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _head, rows = re.split(r"─\s*\n", done.stdout)
    found = {}
    for line in rows.splitlines():
        name, *cells = re.split(r"\s{2,}", line.strip())
        found[name] = [float(number.replace(",", "")) for number in re.findall(r"[\d.,]+", " ".join(cells))]
    found.pop("", None)
    return found


def test_throughput_is_measured_alone_and_beside_dead_receivers() -> None:
    rows = table("throughput", "--batches", "50", "--nonces", "3", "--rounds", "1")
    assert list(rows) == ["alone", "queue only", "refuses", "stalls"]
    for _nonces, batches, nonces, *_ratios in rows.values():
        assert batches > 0
        assert nonces == pytest.approx(3 * batches, abs=3)
    assert rows["alone"][3:6] == [1, 1, 1]


def test_backlogs_of_each_size_are_opened_looked_at_and_delivered() -> None:
    rows = table("backlog", "--batches", "30", "60", "--nonces", "3", "--rounds", "1")
    assert len(rows) == 9
    assert all(len(numbers) == 2 and min(numbers) > 0 for numbers in rows.values())
    assert "Outbox.open" in rows


def test_mining_is_measured_with_and_without_a_receiver() -> None:
    rows = table("mining", "--seconds", "0.5", "--warm-up", "0.1", "--rounds", "1", "--seq-len", "8")
    assert list(rows) == ["none", "reference"]
    assert all(rate > 0 for rate, *_ in rows.values())
    assert len(rows["reference"]) == 8
