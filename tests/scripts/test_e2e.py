"""The report's tests from end to end: one run whole, others cut short, and the verdict on planted differences."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from rich.console import Console

from pocd.protocol.theory import expected_valid_rate
from scripts.trials import e2e
from scripts.trials.e2e import R_TARGET, r_target_of
from scripts.trials.e2e_verdict import Line, Said, StoredProgress, TrialRound, complaints, spread_table
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
FIELDS = [
    *("test", "model", "block_hash", "public_key", "r_target", "total_checked", "total_valid", "valid_rate"),
    *("callback_batches", "callback_nonces", "rate_per_second", "error"),
]


def command(logs: Path, *options: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "scripts.trials.e2e", "--logs", str(logs), "--seq-len", "8", *options]


def environment(folder: Path) -> dict[str, str]:
    """The script's, by which all that it starts is known; its stores lie there too."""
    folder.mkdir(exist_ok=True)
    return os.environ | {"TMPDIR": str(folder)}


def processes_of(folder: Path) -> list[str]:
    """Those that run with the environment above."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended since, or is another user's
            if f"TMPDIR={folder}\0".encode() in entry.read_bytes():
                found.append(entry.parent.name)
    return found


def test_one_of_the_tests_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, folder = tmp_path / "logs", tmp_path / "stores"
    options = ("--models", "llama", "--blocks", "block_beta", "--keys", "node_C", "--duration", "1.5")
    logs.mkdir()
    (logs / "e2e_results.jsonl").write_text("the run before\n")
    monkeypatch.setattr(sys, "argv", command(logs, *options)[4:])
    monkeypatch.setenv("TMPDIR", environment(folder)["TMPDIR"])
    monkeypatch.setattr(tempfile, "tempdir", None)  # as it is before anybody has asked for one
    status, output = e2e.main(), capsys.readouterr().out
    assert status == 0, output
    assert {path.name for path in logs.iterdir()} == {
        *("e2e_results.jsonl", "e2e_results.jsonl.1", "full_e2e_test_run.log", "devchain.log"),
        *("test_01_llama_block_beta_node_C_server.log", "test_01_llama_block_beta_node_C_callback.log"),
    }
    assert (logs / "e2e_results.jsonl.1").read_text() == "the run before\n"
    assert (logs / "full_e2e_test_run.log").read_text() == output
    assert "all 1 tests are consistent" in output
    (line,) = map(orjson.loads, (logs / "e2e_results.jsonl").read_bytes().splitlines())
    assert list(line) == FIELDS
    assert [line[name] for name in FIELDS[:5]] == [1, "llama", "block_beta", "node_C", 1.4042]
    assert line["error"] is None
    assert 0 < line["total_valid"] < line["total_checked"]
    assert line["valid_rate"] == pytest.approx(100 * line["total_valid"] / line["total_checked"])
    assert line["callback_nonces"] == line["total_valid"]
    assert line["callback_batches"] > 0
    assert line["rate_per_second"] > 0
    assert list(folder.glob("pocd-e2e-*")) == []
    assert processes_of(folder) == []


async def until_started(server: Path) -> int:
    """Wait until a test's daemon starts its worker; returns the daemon's process id."""
    while not server.exists() or b"worker_start" not in server.read_bytes():  # noqa: ASYNC110 - another process's file
        await asyncio.sleep(0.05)
    entries = map(orjson.loads, server.read_bytes().splitlines())
    return next(int(entry["pid"]) for entry in entries if entry["action"] == "start")


async def test_a_daemon_that_dies_is_told_and_an_interrupted_run_leaves_no_process(tmp_path: Path) -> None:
    logs, folder = tmp_path / "logs", tmp_path / "stores"
    process = await asyncio.create_subprocess_exec(
        *command(logs, "--duration", "600", "--blocks", "b/1"),
        env=environment(folder),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE):
        os.kill(await until_started(logs / "test_01_qwen_b-1_node_A_server.log"), signal.SIGKILL)
        await until_started(logs / "test_02_qwen_b-1_node_B_server.log")
        assert len(processes_of(folder)) >= 4  # the script, chain, receiver, daemon
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
        while processes_of(folder):  # noqa: ASYNC110 - the worker of the dead daemon ends by itself, once it has started
            await asyncio.sleep(0.05)
    assert process.returncode == 130, out
    assert b"interrupted" in out
    assert list(folder.glob("pocd-e2e-*")) == []
    (line,) = map(orjson.loads, (logs / "e2e_results.jsonl").read_bytes().splitlines())
    assert list(line) == FIELDS
    assert [line[name] for name in FIELDS[5:-1]] == [0] * 6
    # As the script finds it: it may still have been waiting for the daemon's address.
    assert "nothing listens" in line["error"] or "did not start" in line["error"]
    assert "_server.log ends with: {" in line["error"]
    assert [path.name for path in logs.glob("*_stores")] == ["test_01_qwen_b-1_node_A_stores"]
    assert (logs / "test_01_qwen_b-1_node_A_stores" / "outbox.db").exists()


def test_r_target_is_the_reports_or_by_theory_for_the_hidden_size() -> None:
    assert r_target_of("bundled:tiny-llama", "poc2") == R_TARGET
    assert expected_valid_rate(r_target_of("bundled:tiny-llama", "poc3"), 128) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--models", "bundled:nosuch"), "bundled:tiny-llama"),
        (("--models", "./nosuch"), "config.json"),
        (("--models", "qwen", "some/qwen"), "qwen is there more than once"),
        (("--keys", "a", "b", "a"), "a is there more than once"),
        (("--blocks", ""), "must not be empty"),
        (("--duration", "0"), "--duration"),
        (("--duration", "nan"), "--duration"),
        (("--r-target", "2.1"), "--r-target"),
        (("--seq-len", "0"), "--seq-len"),
        (("--dtype", "float8"), "float32"),
        (("--device", "tpu"), "cuda:N"),
        (("--scheme", "poc1"), "poc2"),
        (("--scheme", "poc3", "--seq-len", "5"), "at least 6"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    options: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs = tmp_path / "logs"
    monkeypatch.setattr(sys, "argv", command(logs, *options)[4:])
    with pytest.raises(SystemExit) as ended:
        e2e.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not logs.exists()


# The verdict

ASKED = TrialRound("block", "key", 1.41, 16, "poc2", node_id=1, node_count=3)
TERMS = {"block_hash": "block", "public_key": "key", "r_target": 1.41, "seq_len": 16, "scheme": "poc2", "node_id": 1}
HELD: list[dict[str, Any]] = [
    TERMS | {"nonces": [1, 7], "dist": [1.40, 1.39]},
    TERMS | {"nonces": [28], "dist": [1.38]},
]
PROGRESS = StoredProgress(1, 3, cursor=10, islands="[]", checked=10, valid=3)
STATUS = {"total_checked": 8, "total_valid": 3}
SAID = Said(STATUS, [PROGRESS], [(True, body) for body in HELD], waiting=0)
STATS = {"batches": 2, "nonces": 3, "conflicts": 0, "rejected": 0, "validated_batches": 0}


def test_two_sides_that_agree() -> None:
    assert complaints(ASKED, SAID, HELD, STATS) == []


def progress(**changes: int | str) -> Said:
    return replace(SAID, progress=[StoredProgress(**asdict(PROGRESS) | changes)])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (replace(SAID, progress=[]), "mined 0 rounds"),
        (replace(SAID, progress=[PROGRESS, PROGRESS]), "mined 2 rounds"),
        (progress(valid=4), "holds 3 nonces, -1 against the daemon's 4"),
        (progress(cursor=9, islands="[[12, 13]]"), "not dense"),
        (progress(cursor=9), "not dense"),
        (progress(checked=0, cursor=0), "no nonce was checked"),
        (progress(checked=9, cursor=9), "1 nonces are not of what node 1 checked: 28"),
        (progress(node_id=2), "mined as node 2 of 3"),
        (replace(SAID, status=STATUS | {"total_checked": 11}), "said total_checked 11, and its store holds 10"),
        (replace(SAID, status=STATUS | {"total_valid": 4}), "said total_valid 4"),
        (replace(SAID, waiting=2), "2 nonces are in no batch"),
        (replace(SAID, batches=[(False, HELD[0]), (True, HELD[1])]), "1 batches were not delivered"),
        (replace(SAID, batches=[(True, HELD[0])]), "1 nonces are not the daemon's"),
    ],
)
def test_what_the_daemon_says_is_held_against_the_rest(said: Said, words: str) -> None:
    assert words in "; ".join(complaints(ASKED, said, HELD, STATS))


def forge(position: int, **changes: object) -> Callable[[], list[dict[str, Any]]]:
    def forged() -> list[dict[str, Any]]:
        held = deepcopy(HELD)
        held[position] |= changes
        return held

    return forged


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (lambda: HELD[:1], "1 nonces are missing at the receiver, or with another distance: (28, 1.38)"),
        (lambda: [*HELD, HELD[1]], "1 nonces were delivered more than once: 28"),
        (forge(0, nonces=[1, 4]), "1 nonces are not the daemon's, or with another distance: (4, 1.39)"),
        (forge(0, dist=[1.40, 1.3901]), "with another distance: (7, 1.3901)"),
        (forge(0, nonces=[1, 6]), "1 nonces are not of what node 1 checked: 6"),
        (forge(1, nonces=[31]), "1 nonces are not of what node 1 checked: 31"),
        (forge(1, dist=[1.41]), "1 nonces have a distance that is not below r_target: 28"),
        (forge(1, dist=[-0.1]), "1 nonces have a distance that is not below r_target: 28"),
        *((forge(1, **{name: "other"}), f"{name} should be") for name in TERMS),
    ],
)
def test_what_the_receiver_holds_is_held_against_the_rest(held: Callable[[], list[dict[str, Any]]], words: str) -> None:
    assert words in "; ".join(complaints(ASKED, SAID, held(), STATS))


@pytest.mark.parametrize("name", STATS)
def test_what_the_receiver_counts_is_held_against_the_rest(name: str) -> None:
    count = STATS[name] + 1
    assert complaints(ASKED, SAID, HELD, STATS | {name: count}) == [
        f"the receiver counts {count} {name}, and it should be {STATS[name]}"
    ]


def shown(*lines: Line) -> list[list[str]]:
    """The rows of the spread's table."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(spread_table(list(lines)))
    return [row.split() for row in capture.get().splitlines()[4:] if row.strip()]


def line(test: int, block: str, key: str, valid: int) -> Line:
    return Line(test, "m", block, key, 1.4, total_checked=1000, total_valid=valid)


def test_the_spread_is_between_blocks_and_between_the_keys_of_each() -> None:
    rows = shown(line(1, "a", "A", 100), line(2, "a", "B", 120), line(3, "b", "A", 200), line(4, "b", "B", 180))
    assert [row[:-2] for row in rows] == [
        ["m", "blocks", "11.00", "19.00", "8.00"],
        ["m", "keys", "of", "a", "10.00", "12.00", "2.00"],
        ["m", "keys", "of", "b", "20.00", "18.00", "2.00"],
    ]
    # Twice 80 away from 300 of 2000, with variance 2000 · 0.15 · 0.85: chi-square 50.2, one degree of freedom.
    assert float(rows[0][-1]) == pytest.approx(1.4e-12, rel=0.02)
    # Likewise 10 from 110 of 1000, variance 97.9: 2.04; and 10 from 190, variance 153.9: 1.30.
    assert [row[-1] for row in rows[1:]] == ["0.15", "0.25"]
    low, high = map(float, rows[0][-2].split("–"))
    # Each rate within 2.24 of its standard errors (0.70 and 0.88), the quantile for two at once; exact ones are wider.
    assert low == pytest.approx(8 - 2.24 * 1.58, abs=0.1)
    assert high == pytest.approx(8 + 2.24 * 1.58, abs=0.1)


def test_keys_that_checked_more_of_one_block_do_not_differ_for_that() -> None:
    many = replace(line(4, "b", "B", 2000), total_checked=10_000)
    rows = shown(line(1, "a", "A", 100), line(2, "a", "B", 100), line(3, "b", "A", 200), many)
    assert [row[-1] for row in rows[1:]] == ["1", "1"]


def test_the_spread_of_tests_that_found_nothing_or_did_not_run() -> None:
    assert shown(line(1, "a", "A", 0), line(2, "b", "A", 0))[0][-3:] == ["0.00", "0.00–0.44", "1"]
    failed = Line(2, "m", "b", "A", 1.4, error="no model")
    assert all("too few to compare" in " ".join(row) for row in shown(line(1, "a", "A", 100), failed))
    assert "too few to compare" in " ".join(shown(failed)[0])
