"""Tasks that run beside one another: each has a name, by which its failure is logged with the traceback."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pocd.process import EXIT_CRASH, EndedError, ForeseenError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping

    from structlog.typing import FilteringBoundLogger

T = TypeVar("T")


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
    task.add_done_callback(_closing(work))  # which is not begun where the task was cancelled before it began
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


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error by which a TaskGroup ended: its first one, on which the group cancelled its other tasks."""
    return group.exceptions[0]


class LoopEndedError(Exception):
    """A loop that never ends returned, or was cancelled by nobody who may."""


async def run_forever(
    loops: Mapping[str, Coroutine[Any, Any, object]],
    log: FilteringBoundLogger,
    *,
    foreseen: tuple[type[Exception], ...] = (),
) -> NoReturn:
    """Run loops that never end until one of them fails; then cancel the others, and wait until they have ended.

    Not an `asyncio.TaskGroup`: before Python 3.13 one that failed leaves a request for cancellation behind
    (`Task.cancelling`), by which Python 3.11.2 takes the next `asyncio.timeout` that expires in the same task for a
    cancellation. Besides, a TaskGroup goes on without a task that was cancelled by mistake.

    Args:
        loops: Each by the name of its task, by which its failure is logged, see `crash_logged`.
        log: Receives the traceback.
        foreseen: Errors that are no crash, beside `ForeseenError`.

    Raises:
        LoopEndedError: A loop was cancelled by mistake.
        Exception: The error of the first loop that failed; an unforeseen one as `EndedError`.
    """

    async def named(name: str, loop: Coroutine[Any, Any, object]) -> NoReturn:
        with crash_logged(name, log, foreseen=foreseen):
            await loop
            raise LoopEndedError(f"the loop {name!r} returned, which it never should")

    tasks = {name: asyncio.create_task(named(name, loop), name=name) for name, loop in loops.items()}
    for name, loop in loops.items():  # a loop that was cancelled before it began is closed, or Python complains
        tasks[name].add_done_callback(_closing(loop))
    try:
        ended, _ = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel(tasks.values())
    first, *others = [_error(name, task) for name, task in tasks.items() if task in ended]
    for other in others:
        first.add_note(f"at the same moment: {other!r}")
    raise first


async def cancel(tasks: Iterable[asyncio.Task[object]]) -> None:
    """Cancel tasks, and wait until they have ended, also where the caller is cancelled meanwhile."""
    left = set(tasks)
    for task in left:
        task.cancel()
    cancelled = False
    while left:
        try:
            _, left = await asyncio.wait(left)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


async def shielded(name: str, work: Coroutine[Any, Any, T] | asyncio.Task[T], log: FilteringBoundLogger) -> T:
    """Wait for `work`, which goes on by itself when the caller is cancelled; how it then fails is logged.

    `asyncio.shield` alone leaves a task behind of whose error Python complains when nobody is there to take it.

    Args:
        name: What the log calls the work.
        work: What has to be done to its end.
        log: Told of the work's failure, or its end by cancellation, that no caller waits for.
    """
    task = work if isinstance(work, asyncio.Task) else asyncio.create_task(work, name=name)

    def left_behind(_: object) -> None:
        if task.cancelled():
            log.warning("what was under way is given up", action="given_up", part=name)
        elif error := task.exception():
            log.warning("what nobody waits for any more failed", action="given_up", part=name, exc_info=error)

    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(left_behind)
        raise


LOOK_SECONDS = 0.5  # from look to look, of which a pause of the whole process takes one


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Wait for `work`, but only so many seconds in which this process ran.

    A process that was stopped, or whose machine was moved, finds that much time has passed, and what came meanwhile
    unread: that nothing was heard in that time is nobody's fault.

    Whoever cleans up, and so may have been cancelled, waits by this: of a task that was asked to end, Python 3.11.2
    takes an `asyncio.timeout` that expires for that very cancellation, and leaves out the rest of the cleaning.

    Raises:
        TimeoutError: The work took longer.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if seconds <= 0:
                raise TimeoutError
            await asyncio.wait([task], timeout=min(LOOK_SECONDS, seconds))
            seconds -= LOOK_SECONDS
        return task.result()
    finally:
        if not task.done():
            await cancel([task])


def _error(name: str, task: asyncio.Task[object]) -> BaseException:
    """Return why a loop ended that never should."""
    if task.cancelled():
        return LoopEndedError(f"the loop {name!r} was cancelled, and nobody asked for that")
    error = task.exception()
    assert error is not None, "a named loop ends with an error only"
    return error


def _closing(work: Coroutine[Any, Any, object]) -> Callable[[object], None]:
    """Return a callback that closes `work`."""
    return lambda _: work.close()
