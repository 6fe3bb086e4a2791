"""What is cleaned up in a task that was cancelled, and takes too long, is cleaned up all the same: run as a program.

In Python 3.11.2, Debian 12's own, `asyncio.timeout` fails in such a task; so this runs on that interpreter too.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import structlog

from pocd.check import probe
from pocd.dev import processes as started
from pocd.pool.output import Output
from pocd.pool.processes import Processes, RankLink, _Rank, connected
from pocd.tasks import within

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def cancelled(cleaning: Coroutine[Any, Any, object]) -> None:
    """Clean up in a task that is cancelled, which has to be all that ends it."""

    async def owner() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await cleaning

    task = asyncio.create_task(owner())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled(), task


class Stuck:
    """A process that ends when it is killed, or not even then."""

    def __init__(self, *, for_good: bool) -> None:
        self.returncode: int | None = None
        self._for_good = for_good
        self._killed = asyncio.Event()

    def terminate(self) -> None:
        """Leave it to `kill`."""

    def kill(self) -> None:
        if not self._for_good:
            self._killed.set()

    async def wait(self) -> int:
        await self._killed.wait()
        self.returncode = -signal.SIGKILL
        return self.returncode


async def end_a_worker() -> None:
    process = await asyncio.create_subprocess_exec("sleep", "1000")
    with ExitStack() as theirs:
        reader, writer, _ = await connected(theirs)
        lines, unused, _ = await connected(theirs)
        rank = _Rank(process, RankLink(reader, writer), Output(lines, unused, structlog.get_logger()))
        await cancelled(Processes([rank], None).end(0.01))
    assert process.returncode == -signal.SIGKILL
    assert writer.is_closing()
    assert unused.is_closing(), "what it wrote last is taken, and the socket closed"


async def main() -> None:
    await end_a_worker()
    probe.GRACE = started.STOP_SECONDS = 0.01
    hangs = cast("asyncio.subprocess.Process", Stuck(for_good=True))
    await cancelled(probe._end(hangs))
    insists = Stuck(for_good=False)
    await cancelled(started._stop(cast("asyncio.subprocess.Process", insists)))
    assert insists.returncode is not None

    async def late() -> None:
        try:
            await within(0.01, asyncio.Event().wait())
        except TimeoutError:
            return

    await cancelled(late())


if __name__ == "__main__":
    asyncio.run(main())
