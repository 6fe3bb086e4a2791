"""Tasks that run beside one another: each has a name, by which its failure is logged with the traceback."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

from pocd.process import EXIT_CRASH, EndedError, ForeseenError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine, Iterator
    from typing import Any

    from structlog.typing import FilteringBoundLogger


def start(
    group: asyncio.TaskGroup,
    name: str,
    work: Coroutine[Any, Any, object],
    log: FilteringBoundLogger,
    *,
    foreseen: tuple[type[Exception], ...] = (),
) -> asyncio.Task[None]:
    """Start `work` as the task `name` of `group`; its failure is logged, see `crash_logged`.

    Args:
        group: Owner of the task.
        name: What the log calls the task.
        work: Runs until it is cancelled: a return is a failure too.
        log: Receives the traceback.
        foreseen: Errors that are no crash, beside `ForeseenError`.
    """

    async def run() -> None:
        with crash_logged(name, log, foreseen=foreseen):
            await work
            raise RuntimeError("it returned, and should run until it is cancelled")

    task = group.create_task(run(), name=name)
    task.add_done_callback(lambda _: work.close())  # which is not begun where the task was cancelled before it began
    return task


@contextlib.contextmanager
def crash_logged(name: str, log: FilteringBoundLogger, *, foreseen: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Log an unforeseen failure inside the context, with the traceback and the `name` of the part that failed.

    Raises:
        EndedError: An unforeseen failure, in one line; contexts around this one do not log it again.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (ForeseenError, *foreseen)):
            raise
        log.exception("a part of the daemon failed", action="crash", part=name)
        text = f"{name} failed: {type(error).__name__}: {error}; the log says where"
        if isinstance(error, sqlite3.Error):
            text = f"the store failed: {error}; nothing stored is lost, check the disk and start again"
        raise EndedError(EXIT_CRASH, text) from error
