"""The demo, as a person runs it: a real terminal, real processes, Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import signal
import sys
from pathlib import Path

from tests.support.command_line import pocd_here
from tests.support.waiting import PATIENCE


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "pocd", "demo", "--folder", str(folder), "--block-seconds", "1", *options]


def processes_of(folder: Path) -> list[str]:
    """Command lines of running processes that work in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            found.append(entry.read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if str(folder) in line]


def test_a_few_blocks_end_well_and_leave_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    ended = pocd_here(*command(folder, "--blocks", "2")[3:])
    assert ended.returncode == 0, ended.stdout
    assert "all is well" in ended.stdout
    assert "checked" in ended.stdout
    assert "\x1b" not in ended.stdout, "no terminal, no escapes"
    assert processes_of(folder) == []


async def test_ctrl_c_on_a_terminal_ends_everything_cleanly(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(*command(folder), stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    screen = bytearray()
    mining = asyncio.Event()

    def read() -> None:
        try:
            screen.extend(os.read(ours, 65536))
        except OSError:  # EIO: the other side of the terminal is closed
            asyncio.get_running_loop().remove_reader(ours)
        if b"GENERATING" in screen:
            mining.set()

    asyncio.get_running_loop().add_reader(ours, read)
    async with asyncio.timeout(PATIENCE):
        await mining.wait()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0, screen.decode()
    os.close(ours)
    assert b"Traceback" not in screen
    assert b"funnel" in screen
    assert processes_of(folder) == []


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    ended = pocd_here(*command(tmp_path)[3:])
    assert (ended.returncode, "choose another --folder" in ended.stderr) == (78, True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_daemon_that_cannot_start_is_told_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    ended = pocd_here(*command(folder, "--model", "bundled:nosuch")[3:])
    assert ended.returncode == 1
    assert "bundled:tiny-qwen3" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert processes_of(folder) == []
