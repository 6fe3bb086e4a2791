"""The script that measures delivery runs whole and prints numbers; how fast things are is no test's matter."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from scripts.bench import delivery

if TYPE_CHECKING:
    from collections.abc import Callable

    Table = Callable[[str], dict[str, list[float]]]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Table:
    """Runs the script with options; returns the numbers of each row by the words before them."""

    def run(options: str) -> dict[str, list[float]]:
        monkeypatch.setattr(sys, "argv", ["delivery", *options.split()])
        delivery.main()
        return numbers_of(capsys.readouterr().out)

    return run


def numbers_of(text: str) -> dict[str, list[float]]:
    _head, rows = re.split(r"─\s*\n", text)
    found = {}
    for line in rows.splitlines():
        name, *cells = re.split(r"\s{2,}", line.strip())
        found[name] = [float(number.replace(",", "")) for number in re.findall(r"[\d.,]+", " ".join(cells))]
    found.pop("", None)
    return found


def test_throughput_is_measured_alone_and_beside_dead_receivers(table: Table) -> None:
    rows = table("throughput --batches 50 --nonces 3 --rounds 1")
    assert list(rows) == ["alone", "queue only", "refuses", "stalls"]
    for _nonces, batches, nonces, *_ratios in rows.values():
        assert batches > 0
        assert nonces == pytest.approx(3 * batches, abs=3)
    assert rows["alone"][3:6] == [1, 1, 1]


def test_backlogs_of_each_size_are_opened_looked_at_and_delivered(table: Table) -> None:
    rows = table("backlog --batches 30 60 --nonces 3 --rounds 1")
    assert len(rows) == 9
    assert all(len(numbers) == 2 and min(numbers) > 0 for numbers in rows.values())
    assert "Outbox.open" in rows


def test_mining_is_measured_with_and_without_a_receiver(table: Table) -> None:
    rows = table("mining --seconds 0.3 --warm-up 0.1 --rounds 1 --seq-len 8")
    assert list(rows) == ["none", "reference"]
    assert all(rate > 0 for rate, *_ in rows.values())
    assert len(rows["reference"]) == 8
