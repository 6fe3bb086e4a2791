"""Work done in a fork of the test's process: a process of its own, without the seconds of imports."""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING

from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def forked(work: Callable[[], object], errors: Path) -> int:
    """Let a fork do `work`, its standard error written to a file, and return the fork's process id."""
    child = os.fork()
    if child == 0:
        os._exit(_done(work, errors))
    return child


async def in_a_fork(work: Callable[[], object], errors: Path) -> int:
    """Do `work` in a fork, whose standard error is written to a file; returns the fork's exit status."""
    child = forked(work, errors)
    try:
        _, status = await asyncio.wait_for(asyncio.to_thread(os.waitpid, child, 0), PATIENCE)
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        raise
    return os.waitstatus_to_exitcode(status)


def _done(work: Callable[[], object], errors: Path) -> int:
    """Do the work and end as the interpreter does, but for what the tests have registered for their own end.

    Returns the exit status.
    """
    atexit._clear()
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 - to the end
    status = 0
    try:
        work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - what the interpreter does at last
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    return status
