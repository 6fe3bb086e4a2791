"""Programs of pocd run as child processes: started, waited for until they listen, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from pocd.config.errors import ENV_PREFIX
from pocd.process import EXIT_CRASH, EndedError
from pocd.tasks import within

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
        """Stop the process as a service manager does, and insist on a clean exit."""
        if not await _stop(self.process):
            raise EndedError(EXIT_CRASH, f"a process did not stop within {STOP_SECONDS:.0f} s; see {self.log}")
        if self.process.returncode:
            raise EndedError(EXIT_CRASH, f"a process ended with status {self.process.returncode}; see {self.log}")


@contextlib.asynccontextmanager
async def started(folder: Path, command: str, *options: str, log: Path | None = None) -> AsyncIterator[Running]:
    """Run `pocd COMMAND` until the context ends, in a session of its own, so that Ctrl-C reaches only us.

    The process's output goes to `log`, by default COMMAND.log in `folder`.

    Raises:
        EndedError: The process does not listen in time; the message names its log.
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
    """Start Python with `arguments`; the process's output goes to `log`."""
    with log.open("wb") as sink:
        return await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=sink, stderr=sink, env=environment, start_new_session=own_session
        )


async def announced_url(process: Process, log: Path, limit: float) -> str:
    """Wait until a process's log has the URL that it listens on, and return it.

    Raises:
        EndedError: The process ends before that, or takes more than `limit` seconds.
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
    """Return the entries of a log in JSON; other lines, such as a traceback's, are skipped."""
    lines = log.read_bytes().splitlines()
    return [orjson.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]


async def _stop(process: Process) -> bool:
    """Ask a process to end, and kill it if it does not; returns whether it ended by itself."""
    if process.returncode is None:
        process.terminate()
    try:
        await within(STOP_SECONDS, process.wait())
    except TimeoutError:
        process.kill()
        await process.wait()
        return False
    return True
