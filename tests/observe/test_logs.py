"""Logging, as a process of its own writes it to standard error."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.support.forking import Process
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2"
URL = f"http://user:{SECRET}@chain.example/rpc"


def logged(folder: Path, script: str, *, level: str = "info", style: str = "json", journal: str = "") -> list[str]:
    """The lines of a process that configures logging and runs `script`.

    `journal` is what JOURNAL_STREAM is: nothing, "own" for its standard error, or anything.
    """
    lines = ["import logging, sys", "from pocd.observe.logs import configure", f"log = configure({level!r}, {style!r})"]
    environment = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
    sink = folder / "stderr"
    with sink.open("wb") as stream:
        status = os.fstat(stream.fileno())
        if journal:
            environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}" if journal == "own" else journal
        program = "\n".join([*lines, script])
        process = Process("-c", program, out=stream.fileno(), err=stream.fileno(), environment=environment)
    asyncio.run(process.wait())
    return sink.read_text(encoding="utf-8").splitlines()


def entries(lines: list[str]) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in lines]


def test_each_line_is_json_with_the_journals_priority(tmp_path: Path) -> None:
    script = """
log.debug("a", action="x")
log.info("b", action="y", height=7, path=sys, text="line\\nbreak")
log.warning("c")
log.error("d")
log.critical("e")
"""
    found = entries(logged(tmp_path, script, level="debug"))
    assert [(entry["event"], entry["level"], entry["priority"]) for entry in found] == [
        ("a", "debug", 7),
        ("b", "info", 6),
        ("c", "warning", 4),
        ("d", "error", 3),
        ("e", "critical", 2),
    ]
    assert found[1].items() >= {"action": "y", "height": 7, "text": "line\nbreak"}.items()
    assert all(entry["timestamp"].endswith("Z") for entry in found)


@pytest.mark.parametrize(
    ("level", "events"),
    [("debug", "abcd"), ("info", "bcd"), ("warning", "cd"), ("error", "d")],
)
def test_what_matters_less_than_the_level_is_left_out(tmp_path: Path, level: str, events: str) -> None:
    script = 'log.debug("a"), log.info("b"), log.warning("c"), log.error("d")'
    assert "".join(entry["event"] for entry in entries(logged(tmp_path, script, level=level))) == events


def test_the_level_may_change_also_for_loggers_that_were_made_before(tmp_path: Path) -> None:
    script = """
from pocd.observe.logs import set_level
bound = log.bind(part="x")
bound.debug("a"), bound.info("b")
set_level("debug")
bound.debug("c"), log.debug("d")
set_level("error")
bound.warning("e"), log.error("f"), logging.getLogger("library").warning("g")
"""
    assert "".join(entry["event"] for entry in entries(logged(tmp_path, script))) == "bcdf"


def test_a_line_for_the_journal_begins_with_its_priority(tmp_path: Path) -> None:
    info, error = logged(tmp_path, 'log.info("a"), log.error("b")', journal="own")
    assert (info[:3], error[:3]) == ("<6>", "<3>")
    assert [entry["event"] for entry in entries([info[3:], error[3:]])] == ["a", "b"]


@pytest.mark.parametrize("journal", ["", "1:1", "nonsense"])
def test_a_line_for_anything_else_does_not(tmp_path: Path, journal: str) -> None:
    """A service's child inherits the variable also where its standard error is a file."""
    (line,) = logged(tmp_path, 'log.info("a")', journal=journal)
    assert line.startswith("{")


def test_what_is_no_terminal_gets_json_by_itself(tmp_path: Path) -> None:
    assert len(entries(logged(tmp_path, 'log.info("a")', style="auto"))) == 1


def test_a_line_for_people_on_demand(tmp_path: Path) -> None:
    (line,) = logged(tmp_path, 'log.info("round begins", height=7)', style="console", journal="own")
    assert "round begins" in line
    assert "height=7" in line
    assert not line.startswith(("{", "<"))
    assert "\x1b" not in line


def test_an_exception_is_part_of_its_one_line(tmp_path: Path) -> None:
    script = """
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed", action="x")
"""
    (entry,) = entries(logged(tmp_path, script))
    assert (entry["event"], entry["level"], entry["priority"]) == ("failed", "error", 3)
    assert (entry["exception"][0]["exc_type"], entry["exception"][0]["exc_value"]) == (
        "ZeroDivisionError",
        "division by zero",
    )


@pytest.mark.parametrize("style", ["json", "console"])
def test_no_secret_gets_out_by_an_exception(tmp_path: Path, style: str) -> None:
    script = f"""
def send(token, url):
    raise ValueError("cannot reach " + url)
secret, where = bytes.fromhex({SECRET.encode().hex()!r}).decode(), bytes.fromhex({URL.encode().hex()!r}).decode()
try:
    send(secret, where)
except ValueError as error:
    log.exception("failed", cause=str(error))
    logging.getLogger("aiohttp.server").exception("failed at %s", where)
"""
    text = "\n".join(logged(tmp_path, script, style=style))
    assert text.count("failed") == 2
    assert text.count("http://***@chain.example/rpc") == 4
    assert SECRET not in text


def test_libraries_speak_in_the_same_form(tmp_path: Path) -> None:
    script = """
library = logging.getLogger("aiohttp.server")
library.info("not interesting")
library.warning("%s requests", 3)
library.log(35, "a level between")
library.log(99, "a level above")
"""
    found = entries(logged(tmp_path, script))
    assert [(entry["logger"], entry["event"], entry["priority"]) for entry in found] == [
        ("aiohttp.server", "3 requests", 4),
        ("aiohttp.server", "a level between", 4),
        ("aiohttp.server", "a level above", 2),
    ]


def test_nothing_that_is_logged_can_break_the_logger(tmp_path: Path) -> None:
    script = r'log.info("a", text="\udcff", number=2**70, thing=object)'
    (entry,) = [json.loads(line) for line in logged(tmp_path, script)]
    assert (entry["text"], entry["number"], entry["thing"]) == ("\udcff", 2**70, "<class 'object'>")


def test_a_full_disk_costs_lines_and_says_how_many_but_ends_nobody(tmp_path: Path) -> None:
    script = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
from pocd.observe.logs import flush
log.info("before"), flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
log.info("lost")
log.info("lost"), flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
log.info("after")
"""
    lines = logged(tmp_path, script)
    assert "pocd: 2 log lines could not be written" in lines
    assert entries([lines[0], lines[-1]])[0]["event"] == "before"
    assert entries([lines[0], lines[-1]])[1]["event"] == "after"


def test_standard_error_may_be_full_for_ever() -> None:
    say = "configure('info', 'json').info('lost'); print('alive', flush=True)"
    script = f"from pocd.observe.logs import configure; {say}"
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        done = subprocess.run([sys.executable, "-c", script], stderr=full, stdout=subprocess.PIPE, check=False)
    assert done.stdout == b"alive\n"


def test_a_reader_that_stalls_holds_up_nobody_and_is_told_what_was_lost() -> None:
    script = """
import sys
from pocd.observe.logs import configure, flush
log = configure("info", "json")
for number in range(200):
    log.info("x" * 65536, number=number)
print("goes on", flush=True)
sys.stdin.read()
flush(60.0)
log.info("after")
flush(60.0)
"""
    program = (sys.executable, "-W", "error", "-c", script)
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018 - for mypy
        assert process.stdout.readline() == "goes on\n"  # while nobody reads standard error
        _, errors = process.communicate("")
    told = [line for line in errors.splitlines() if not line.startswith("{")]
    written = entries([line for line in errors.splitlines() if line.startswith("{")])
    lost = 201 - len(written)
    assert written[-1]["event"] == "after"
    assert sum(int(line.split()[1]) for line in told) == lost > 0
    assert [entry["number"] for entry in written[:-1]] == list(range(len(written) - 1))


def test_a_reader_that_never_comes_back_does_not_hold_the_end() -> None:
    script = """
from pocd.observe import logs
log = logs.configure("info", "json")
for number in range(200):
    log.info("x" * 65536, number=number)
"""
    with subprocess.Popen((sys.executable, "-c", script), stderr=subprocess.PIPE) as process:
        assert process.wait(PATIENCE) == 0
