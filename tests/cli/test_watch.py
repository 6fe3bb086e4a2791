"""`pocd watch`: what it shows for a terminal of any size, and how it lives on a real one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from fcntl import ioctl
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment
from scipy.stats import binomtest

from pocd.admin.client import AdminError, ServerEvent, events
from pocd.cli.report import as_text
from pocd.cli.viewer import Viewer
from pocd.cli.watch_view import Sample, Seen, View, seen_rates, sparkline, wilson_interval
from pocd.process import EXIT_CRASH, EXIT_OK
from tests.support.processes import free_port
from tests.support.waiting import PATIENCE, until
from tests.support.watched import Watched, on_machines, receiver, sample, troubled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

URL = "http://127.0.0.1:8460"
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9])")


def told() -> list[ServerEvent]:
    """An event of each kind, as a client gets them."""
    watched = Watched(sample())
    watched.happenings()
    return [
        ServerEvent(f"a-{event.id}", event.kind, {"time": event.time, **event.data}) for event in watched.events._ring
    ]


def seen(body: dict[str, Any], **known: Any) -> Seen:  # noqa: ANN401 - whatever a viewer knows
    samples = [Sample(float(second), 1000 * second) for second in range(61)]
    everything: dict[str, Any] = {"status": body, "events": told(), "samples": samples}
    return Seen(URL, time.time(), **everything | known)


def drawn(what: Seen, width: int = 80, height: int | None = None) -> list[str]:
    """The lines of a view."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    options = (
        console.options.update(width=width) if height is None else console.options.update_dimensions(width, height)
    )
    lines = Segment.split_lines(console.render(View(what), options))
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


# The view.


def test_a_healthy_daemon_at_a_glance() -> None:
    lines = drawn(seen(sample()), height=24)
    assert len(lines) == 24
    text = "\n".join(lines)
    for part in (
        "GENERATING  the chain decides, node 1 of 40",
        "checked 2,411,520 → valid 239,004 → stored 238,870 → delivered 238,111",
        "849.2/s in 1 min, 846.8/s in 15 min  ████████████ 60 s",
        "9.92% of 52,224 (99%: 9.59–10.27%), 10.03% expected",
        "block 4,100,040 9F2E5C7A1B3D…  poc2 on Qwen/Qwen3-0.6B",
        "gonka-mainnet, block 4,100,047 776655443322…, ",
        "0 cuda:0  captured  424.9/s  61 °C 403 W 31/80 GiB 99% H100 80GB HBM3",
        "1 cuda:1  captured  424.3/s  62 °C",
        "main  delivered 1,204, waiting 0  accepts",
        "block 4,100,047 000000000000…",
        "worker 1 restarting (crash: killed by SIGKILL)",
    ):
        assert part in text
    assert "ALARM" not in text


def test_the_machines_of_a_cluster_have_lines_of_their_own() -> None:
    body = on_machines(sample())
    text = "\n".join(drawn(seen(body)))
    assert "machines  three 10.0.0.3  0 of 1 workers  0.0/s" in text
    assert "two 10.0.0.2  1 of 1 workers  424.9/s" in text
    assert "0 cuda:0 on two  captured" in text
    told_ = as_text(body)
    assert "machine    two (10.0.0.2), 1 of 1 workers ready, 424.9 nonces/s" in told_
    assert "0: cuda:0 on two, captured" in told_


def test_what_is_wrong_comes_first() -> None:
    lines = drawn(seen(troubled(), away=f"nothing listens on {URL}", status_age=14.0))
    assert "as of 14 s ago" in lines[0]
    heads = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert heads[:5] == ["pocd", "away", "ALARM", "ALARM", "PROBLEM"]
    text = "\n".join(lines)
    assert "1 cuda:1  loading the model  3 restarts" in text
    assert "backup  delivered 1,204, waiting 17, dead 2  HTTP 503" in text
    assert "old  delivered 9, waiting 3  no longer configured" in text
    assert "dead 120, expired 40" in text


def test_nonces_without_a_result_are_told() -> None:
    body = sample()
    assert "NaN" not in "\n".join([*drawn(seen(body)), as_text(body)])
    body["worker"]["non_finite_nonces"] = 1234
    assert "1,234 nonces without a result: the model gave NaN or infinity" in "\n".join(drawn(seen(body)))
    assert "1,234 nonces without a result" in as_text(body)
    del body["worker"]["non_finite_nonces"]  # as an earlier release answers, which an upgrade has not ended yet
    assert "NaN" not in "\n".join([*drawn(seen(body)), as_text(body)])


@pytest.mark.parametrize("body", [sample(), troubled()])
@pytest.mark.parametrize("width", [20, 40, 55, 56, 80, 132])
@pytest.mark.parametrize("height", [3, 12, 24, 60, None])
def test_it_fits_what_it_is_given(body: dict[str, Any], width: int, height: int | None) -> None:
    lines = drawn(seen(body, deaf="there are 16 listeners already"), width, height)
    assert all(cell_len(line) <= width for line in lines)
    assert height is None or len(lines) <= height
    if height == 3:
        assert re.match(r"… \d+ more lines", lines[-1])


def test_before_the_first_answer() -> None:
    assert drawn(Seen(URL, 0.0))[1].split() == ["asking", "the", "daemon", "…"]
    assert "nothing listens there (trying again)" in drawn(Seen(URL, 0.0, away="nothing listens there"))[1]


def test_a_daemon_that_knows_little_yet() -> None:
    body = sample()
    body |= {"state": "LOADING", "round": None, "receivers": [receiver("main", delivered_batches=0)]}
    body["chain"] = dict.fromkeys(body["chain"]) | {"problem": "no answer yet"}
    text = "\n".join(drawn(seen(body, events=(), samples=())))
    assert "no block yet: no answer yet" in text
    assert "not asked yet" in text
    assert "none yet" in text


def test_strangers_do_not_drive_the_terminal() -> None:
    body = sample()
    body["receivers"] = [receiver("evil", last_error="\x1b[2J\x07gone", next_attempt_seconds=1.0)]
    body["chain"]["chain_id"] = "\x1b]0;owned\x07"
    hostile = [ServerEvent("a-1", "chain", {"time": 0.0, "problem": "\x1b[31mred"})]
    text = "\n".join(drawn(seen(body, events=hostile)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "�[2Jgone" in text


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_tokyo")
def test_people_read_their_own_time() -> None:
    body = sample()
    body["chain"]["block_time"] = "2026-11-27T02:00:00+00:00"
    happened = [ServerEvent("a-1", "state", {"time": 1_795_744_800.0, "state": "IDLE"})]  # 2026-11-27 02:00 UTC
    assert any("11:00:00  state IDLE" in line for line in drawn(seen(body, events=happened)))
    assert "its block of 2026-11-27 11:00:00 JST" in as_text(body)


# Its numbers.


@given(st.integers(1, 10**7), st.floats(0, 1))
def test_the_interval_is_wilsons(checked: int, share: float) -> None:
    valid = round(share * checked)
    expected = binomtest(valid, checked).proportion_ci(0.99, method="wilson")
    low, high = wilson_interval(valid, checked)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)


def test_rates_are_those_between_the_looks() -> None:
    looks = [Sample(100.0, 0), Sample(103.0, 30), Sample(110.0, 100), Sample(120.0, 100)]
    assert seen_rates(looks, 4) == pytest.approx([10.0, 10.0, 0.0, 0.0])
    assert seen_rates(looks, 2) == pytest.approx([10.0, 0.0])
    assert seen_rates(looks[:2], 4) == [], "less than a span says nothing"
    assert seen_rates([], 4) == []
    assert seen_rates([Sample(0.0, 500), Sample(10.0, 0)], 1) == [0.0], "another store"


def test_a_sparkline_begins_at_nothing() -> None:
    assert sparkline([0.0, 1.0, 0.5, 1.0]) == "▁█▅█"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([]) == ""


# The stream of events, from a place in the past.


async def first(count: int, url: str, **how: Any) -> list[ServerEvent]:  # noqa: ANN401 - of `events`
    got: list[ServerEvent] = []
    async with asyncio.timeout(PATIENCE), contextlib.aclosing(events(url, **how)) as stream:
        async for event in stream:
            got.append(event)
            if len(got) == count:
                break
    return got


async def test_a_stream_can_begin_with_what_has_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Watched(sample()).served(monkeypatch) as watched:
        for height in range(1, 1101):  # more than are kept
            watched.block(height)
        got = await first(3, watched.url, latest=3)
        assert [event.data["height"] for event in got] == [1098, 1099, 1100]
        assert (await first(1, watched.url, latest=1024))[0].data["height"] == 77, "the oldest that is kept"
        again = await first(2, watched.url, last_id=got[0].id, latest=3)
        assert [event.id for event in again] == [event.id for event in got[1:]]
        with pytest.raises(AdminError, match="latest"):
            await first(1, watched.url, latest=1025)


async def test_a_stream_without_its_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Watched(sample(), token="correct-horse").served(monkeypatch) as watched:
        watched.block(1)
        with pytest.raises(AdminError, match="Authorization"):
            await first(1, watched.url, latest=1)
        (event,) = await first(1, watched.url, latest=9, token="correct-horse")
        assert (event.kind, event.data["height"]) == ("block", 1)


async def test_a_viewer_that_listens_again_gets_what_it_missed_and_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def until_seen(count: int) -> None:
        listening = asyncio.create_task(viewer.listen())
        await until(lambda: len(viewer.events) >= count)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)

    async with Watched(sample()).served(monkeypatch) as watched:
        viewer = Viewer(watched.url, None)
        for height in (1, 2):
            watched.block(height)
        await until_seen(2)
        for height in (3, 4):
            watched.block(height)
        await until_seen(4)
        assert [event.data["height"] for event in viewer.events] == [1, 2, 3, 4]


# On a terminal.


class Terminal:
    """`pocd watch` on a terminal of its own, and all that it wrote there."""

    def __init__(self, process: asyncio.subprocess.Process, screen: int) -> None:
        self.process = process
        self.screen = screen
        self.text = ""
        os.set_blocking(screen, False)
        asyncio.get_running_loop().add_reader(screen, self._read)

    def _read(self) -> None:
        try:
            self.text += os.read(self.screen, 65536).decode(errors="replace")
        except OSError:  # EIO: the other end is closed
            asyncio.get_running_loop().remove_reader(self.screen)

    async def until(self, *parts: str) -> str:
        """Wait until each part has been shown since the last call, and return all that has been."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not all(part in ESCAPES.sub("", self.text) for part in parts):
                    assert self.process.returncode is None, self.text
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"never {parts} in {ESCAPES.sub('', self.text)[-4000:]}") from None
        shown, self.text = ESCAPES.sub("", self.text), ""
        return shown

    async def ends(self) -> int:
        """Wait for its end, and read what it wrote last; returns the exit status."""
        code = await asyncio.wait_for(self.process.wait(), PATIENCE)
        length = -1
        while length < len(self.text):
            length = len(self.text)
            self._read()
        return code


@contextlib.asynccontextmanager
async def watching(url: str, *program: str) -> AsyncIterator[Terminal]:
    screen, keyboard = pty.openpty()
    ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", *(program or ("-m", "pocd")), "watch", "--url", url, "--interval", "0.2"),
        stdin=keyboard,
        stdout=keyboard,
        stderr=keyboard,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    try:
        terminal = Terminal(process, screen)
        yield terminal
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(screen)
        os.close(screen)
        os.close(keyboard)


async def test_it_follows_a_daemon_through_its_end_and_return(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(sample())
    watched.happenings()
    async with contextlib.AsyncExitStack() as first_life:
        port = free_port()
        await first_life.enter_async_context(watched.served(monkeypatch, port))
        async with watching(watched.url) as terminal:
            before = termios.tcgetattr(terminal.screen)
            await terminal.until("GENERATING", "2,411,520", "worker 1 restarting")
            assert termios.tcgetattr(terminal.screen)[3] & termios.ECHO == 0
            watched.body["funnel"]["checked"] += 1
            await terminal.until("2,411,521")
            watched.events.publish("state", state="IDLE")
            await terminal.until("state IDLE")
            await first_life.aclose()
            await terminal.until("nothing listens on", "(trying again)")
            reborn = Watched(troubled())
            async with reborn.served(monkeypatch, port):
                await terminal.until("ALARM", "loading the model")
                reborn.block(77)
                await terminal.until("block 77 0000")
                assert "(trying again)" not in await terminal.until("GENERATING")
                os.write(terminal.screen, b"xq")
                assert await terminal.ends() == EXIT_OK
            assert termios.tcgetattr(terminal.screen)[3] == before[3] | termios.ECHO | termios.ICANON


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c_and_sigterm_are_good_ends(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    async with Watched(sample()).served(monkeypatch) as watched, watching(watched.url) as terminal:
        await terminal.until("GENERATING")
        terminal.process.send_signal(number)
        assert await terminal.ends() == EXIT_OK


# A look at the status fails in a way that nobody foresaw.
BROKEN = """
from pocd.cli.main import main
from pocd.cli.viewer import Viewer
async def broken(self):
    raise KeyError("what broke")
Viewer.ask = broken
main()
"""


async def test_what_nobody_foresaw_ends_it_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Watched(sample()).served(monkeypatch) as watched, watching(watched.url, "-c", BROKEN) as terminal:
        assert await terminal.ends() == EXIT_CRASH
        assert "pocd: KeyError: 'what broke' (pocd --debug … shows where)" in terminal.text


# Without one.


# As `pocd`, with more time for the events that have happened.
PATIENT = "from pocd.cli import main, viewer; viewer.BACKLOG_SECONDS = 10.0; main.main()"


async def piped(url: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", PATIENT, "watch", "--url", url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_without_a_terminal_it_prints_one_view(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Watched(sample()).served(monkeypatch) as watched:
        watched.happenings()
        code, out, err = await piped(watched.url)
    assert (code, err) == (EXIT_OK, "")
    assert "\x1b" not in out
    assert "checked 2,411,520" in out
    assert out.count("\nevents ") == 1
    assert "worker 0 ready" in out, "the oldest event is printed too"
    assert all(len(line) <= 80 for line in out.splitlines())
    assert await piped(watched.url) == (
        EXIT_CRASH,
        "",
        f"pocd: nothing listens on {watched.url}; is the daemon running (systemctl status pocd)?\n",
    )
