"""Programs of pocd as processes of their own: started, waited for until they listen, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from pocd.config.settings import ENV_PREFIX
from pocd.process import EXIT_CRASH, EndedError

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

START_SECONDS = 120.0  # for a process to listen
STOP_SECONDS = 120.0  # for a process to end


@dataclass(frozen=True, slots=True)
class Running:
    """A process that listens at `url` and writes its log to `log`."""

    process: Process
    url: str
    log: Path

    async def end(self) -> None:
        """Stop it as a service manager does, and insist on a clean exit."""
        if not await _stop(self.process):
            raise EndedError(EXIT_CRASH, f"a process did not stop within {STOP_SECONDS:.0f} s; see {self.log}")
        if self.process.returncode:
            raise EndedError(EXIT_CRASH, f"a process ended with status {self.process.returncode}; see {self.log}")


@contextlib.asynccontextmanager
async def started(folder: Path, command: str, *options: str, log: Path | None = None) -> AsyncIterator[Running]:
    """Run `pocd COMMAND` until the context ends. Its session is its own, so that Ctrl-C reaches only us.

    What it says goes to `log`, by default COMMAND.log in `folder`.

    Raises:
        EndedError: It does not listen in time; the message names its log.
    """
    log = log or folder / f"{command}.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    process = await launch(log, "-m", "pocd", command, *options, environment=environment)
    try:
        yield Running(process, await announced_url(process, log, START_SECONDS), log)
    finally:
        await _stop(process)


async def launch(
    log: Path, *arguments: str, environment: Mapping[str, str] | None = None, own_session: bool = True
) -> Process:
    """Start Python with `arguments`; what it says goes to `log`."""
    with log.open("wb") as sink:
        return await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=sink, stderr=sink, env=environment, start_new_session=own_session
        )


async def announced_url(process: Process, log: Path, limit: float) -> str:
    """Wait until a process says in its log where it listens.

    Raises:
        EndedError: It ends before that, or takes more than `limit` seconds.
    """
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and process.returncode is None:
        for entry in entries(log):
            if entry["action"] == "listening":
                return str(entry["url"])
        await asyncio.sleep(0.05)
    lines = log.read_text(errors="replace").splitlines()
    raise EndedError(EXIT_CRASH, f"{log.stem} did not start: {lines[-1] if lines else 'no word'}; see {log}")


def entries(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log in JSON that are whole; a crash may have written others."""
    lines = log.read_bytes().splitlines()
    return [orjson.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]


async def _stop(process: Process) -> bool:
    """Ask a process to end, and kill it if it does not; returns whether it ended by itself."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        return False
    return True
