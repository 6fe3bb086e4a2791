"""docs/api.md is true: its commands are run against a daemon, and what they print is held to what it says.

In an expected answer `…` stands for any text within a line, and a line that is only `…` for any lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tests.admin.test_outbox_api import Moody
from tests.support.processes import Chain, config, running
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.processes import Daemon

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "api.md"
URL = "http://127.0.0.1:8460"


def transcript(text: str) -> list[tuple[str, str]]:
    """Return the commands of all console blocks in order, each with what it is to print."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        first, *rest = re.split(r"^\$ ", block, flags=re.MULTILINE)
        assert not first, f"a block begins with a command: {first}"
        for part in rest:
            command = re.match(r"(.*\\\n)*.*", part)[0]  # type: ignore[index] # it always matches
            found.append((command, part.removeprefix(command + "\n")))
    return found


def pattern(expected: str) -> str:
    lines = [
        "(?:.*\n)*?.*" if line.strip() == "…" else re.escape(line).replace("…", ".*") for line in expected.split("\n")
    ]
    return "\n".join(lines)


def test_dots_stand_for_any_text_and_nothing_else_does() -> None:
    assert transcript("```console\n$ a \\\n  b\n$ c\n1\n2\n```\n") == [("a \\\n  b", ""), ("c", "1\n2\n")]
    assert re.fullmatch(pattern('{"a": 1…}\n…\nend'), '{"a": 123}\n1\n2\nend')
    assert re.fullmatch(pattern("a\n…"), "a\nb")
    assert not re.fullmatch(pattern("a…c"), "a\nc")
    assert not re.fullmatch(pattern("a.c"), "abc")


def untimed(command: str) -> str:
    """A command that listens for some seconds, made one that listens until a block and the next event have come."""
    heard = "sed -u '/^event: block$/{n;n;n;q}'"
    listens, times = re.subn(r"--max-time \d+", f"--max-time {PATIENCE:.0f}", command)
    return f"{listens} | {heard}" if times else command


async def replay(commands: list[str], url: str, folder: Path) -> list[str]:
    """Run the commands in one shell, as a reader would, and return what each prints."""
    script = "\n".join(f"{untimed(command)}\nprintf '\\0'" for command in commands).replace(URL, url)
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", script), cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    return out.decode().split("\0")[:-1]


@contextlib.asynccontextmanager
async def documented(folder: Path) -> AsyncIterator[Daemon]:
    """The daemon of the document: blocks come, one receiver takes everything, the other refuses every second batch."""

    async def blocks(chain: Chain) -> None:
        while True:
            await asyncio.sleep(0.5)
            chain.height += 1

    async with Chain().served() as chain, Moody().served() as main, Moody().served() as old:
        old.status, old.choosy = 422, True
        path = config(folder, chain.url, {"main": main.url, "old": old.url})
        async with running(path) as daemon:
            # One takes batches, and of the other there are more dead letters than a page of the document has.
            await daemon.until(lambda body: any(each["delivered_batches"] > 1 for each in body["receivers"]))
            await daemon.until(lambda body: any(each["dead_batches"] > 2 for each in body["receivers"]))
            ticking = asyncio.create_task(blocks(chain))
            yield daemon
            ticking.cancel()


async def test_the_transcripts_are_true(tmp_path: Path) -> None:
    told = transcript(DOCUMENT.read_text())
    assert len(told) > 15
    async with documented(tmp_path) as daemon:
        printed = await replay([command for command, _ in told], daemon.url, tmp_path)
        assert await asyncio.wait_for(daemon.process.wait(), PATIENCE) == 0, "the last command ends it"
    for (command, expected), got in zip(told, printed, strict=True):
        assert re.fullmatch(pattern(expected.rstrip("\n")), got.rstrip("\n")), (
            f"$ {command}\n{got}\ninstead of\n{expected}"
        )
