"""What others wrote never reaches a terminal as something that it obeys, whatever command shows it."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pocd.admin.client import ServerEvent
from pocd.admin.text import local_time
from pocd.check import report as findings
from pocd.check.finding import red
from pocd.cli import api, report
from pocd.cli.live import draw
from pocd.observe import logs
from pocd.observe.mask import clean, escape_json
from tests.cli.test_watch import drawn, seen
from tests.support.waiting import soon
from tests.support.watched import sample, troubled

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import ConsoleOptions, RenderResult

# A title, a cleared screen, colours by one byte, text from right to left, and a line like one of ours.
EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u2066\u2028\nalarm      all is well\x00\x7f"


def spoiled(value: Any) -> Any:  # noqa: ANN401 - whatever JSON has
    """An answer of the API in which every text that can be others' holds what a terminal obeys."""
    if isinstance(value, dict):
        return {key: each if key == "block_time" else spoiled(each) for key, each in value.items()}
    if isinstance(value, list):
        return [spoiled(each) for each in value]
    return f"{EVIL}{value}" if isinstance(value, str) else value


def obeyed(text: str) -> set[str]:
    return {character for character in text if not character.isprintable() and character != "\n"}


def letters() -> dict[str, Any]:
    letter: dict[str, Any] = {"receiver": "a", "sequence": 1, "id": "b", "state": "dead", "nonces": 3, "attempts": 1}
    return letter | {"age_seconds": 1.0, "reason": "HTTP 422"}


@pytest.mark.parametrize(
    "shown",
    [
        lambda: report.as_text(spoiled(sample())),
        lambda: report.as_text(spoiled(troubled())),
        lambda: "\n".join(drawn(seen(spoiled(troubled()), events=[ServerEvent("a", "chain", {"problem": EVIL})]))),
        lambda: report.as_json(spoiled(sample())),
        lambda: report.outbox_as_text({"receivers": spoiled(sample()["receivers"]), "batches": [], "next": None}),
        lambda: report.batch_as_text({"deliveries": [spoiled(letters())], "batch": {"block_hash": EVIL}}),
        lambda: findings.as_text([red("chain", EVIL, EVIL)], width=80, colour=False),
        lambda: findings.as_json([red("chain", EVIL, EVIL)]),
    ],
)
def test_every_view_is_clean_and_has_no_line_of_others(shown: Callable[[], str]) -> None:
    text = shown()
    assert "title" in text
    assert obeyed(text) == set()
    assert not any(line.startswith("alarm      all is well") for line in text.splitlines())


async def test_a_picture_that_is_drawn_is_told_the_terminals_size() -> None:
    class Picture:
        def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
            sizes.append((options.max_width, options.height))
            os.kill(os.getpid(), signal.SIGTERM)
            yield "a picture"

    sizes: list[tuple[int, int | None]] = []
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    await soon(draw(Picture, console, {}))
    assert set(sizes) == {(80, 24)}, "it fits itself into them, and says what does not fit"


def test_what_a_command_prints_is_clean_whatever_made_it(capsys: pytest.CaptureFixture[str]) -> None:
    api.echo(f"one\n{EVIL}")
    assert obeyed(capsys.readouterr().out) == set()


@pytest.mark.parametrize("style", ["console", "json"])
def test_the_log_is_clean(style: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401 - a style
    sink = io.StringIO()
    monkeypatch.setattr(sys, "stderr", sink)
    log = logs.configure("info", style)
    event = f"event {EVIL}"
    log.error(event, action="x", text=EVIL, many=[EVIL], exc_info=ValueError(EVIL))
    logs.flush(10.0)
    assert sink.getvalue().count("title") >= 4
    assert obeyed(sink.getvalue()) == set()


@given(st.text())
def test_json_means_the_same_and_is_clean(text: str) -> None:
    try:
        raw = orjson.dumps({text: [text]}, option=orjson.OPT_INDENT_2).decode()
    except orjson.JSONEncodeError:
        return  # half a surrogate pair, which is no text
    assert orjson.loads(escape_json(raw)) == {text: [text]}
    assert obeyed(escape_json(raw)) == set()


@given(st.text())
def test_cleaning_replaces_one_by_one(text: str) -> None:
    assert obeyed(clean(text)) == set()
    assert len(clean(text)) == len(text)


@pytest.mark.parametrize("seconds", [-62135596800.0, 253402300799.9, 1e18, -1e18])
@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_a_time_beyond_the_calendar_is_told_all_the_same(
    seconds: float, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    assert local_time(seconds, "%Y-%m-%d")
