"""The script that measures the admin API runs whole and prints numbers; how fast things are is no test's matter."""

from __future__ import annotations

import re
import sys

import pytest

from scripts.bench import api

LATENCIES = r"(\d+) answers, p50 ([\d.]+) ms, p99 ([\d.]+) ms, max ([\d.]+) ms; "
ERRORS = r"errors: (?:0|\{'(?:TimeoutError|not sent)'.*\})"  # of the load alone, where the machine is that busy
OPTIONS = "both --seconds 0.5 --warm-up 0.1 --rounds 1 --seq-len 8 --rate 100 --connections 300"


def latencies(text: str, what: str) -> list[float]:
    found = re.search(f"^{what}: {LATENCIES}{ERRORS}$", text, re.MULTILINE)
    assert found, text
    return [float(number) for number in found.groups()]


def test_both_measurements_run_on_one_daemon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["api", *OPTIONS.split()])
    api.main()
    text = capsys.readouterr().out
    # What a load of the status costs mining.
    assert re.search(r"^ *none +[\d.]+ ", text, re.MULTILINE)
    assert re.search(r"^ *status +[\d.]+ +[\d.]+–[\d.]+ +[\d.]+ +[\d.]+–[\d.]+ +[\d.]+% +[\d.]+%", text, re.MULTILINE)
    answers, p50, p99, longest = latencies(text, "status while mining")
    assert answers > 0
    assert 0 < p50 <= p99 <= longest
    # Silent connections beside none.
    assert latencies(text, "nobody else")[0] > 0
    assert latencies(text, "beside 300 silent connections")[0] > 0
    still_open = re.search(r"^silent connections still open: (\d+) of 300$", text, re.MULTILINE)
    assert still_open
    assert int(still_open[1]) < 300  # of those that were let in, none where the time for their heads is over


@pytest.mark.parametrize("command", ["status", "silent"])
def test_each_measurement_can_be_had_alone(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["api", command])
    assert [each.__name__ for each in api.PARTS[api.parse().command]] == [command]
