"""What a worker's process writes to its standard streams: logged by line, and the last line is kept."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pocd.tasks import cancel

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

LONGEST_LINE = 4096  # bytes; of a longer one each piece is a line
DRAIN_SECONDS = 1.0  # for the last lines of a process that ended; one that it started may hold the stream open


class Output:
    """Reads what a process writes, so that the process never waits for whoever reads the daemon's own streams.

    Attributes:
        last: The last line with anything on it; of a Python process that failed, the error.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: FilteringBoundLogger,
        name: str = "worker",
    ) -> None:
        self.last = ""
        self._reader = reader
        self._writer = writer
        self._log = log
        self._name = name
        self._task = asyncio.create_task(self._read(), name=f"{name}'s output")

    async def close(self) -> None:
        """Take what the process, which has ended, wrote last."""
        await asyncio.wait([self._task], timeout=DRAIN_SECONDS)
        await cancel([self._task])
        self._writer.close()

    async def _read(self) -> None:
        rest = b""
        while chunk := await self._reader.read(LONGEST_LINE):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._take(line)
        self._take(rest)

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self.last = text.strip()
            self._log.warning(f"{self._name} says: {text}", action="worker_output")
