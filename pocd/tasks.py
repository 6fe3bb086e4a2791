"""Tasks that run beside one another for as long as their owner does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping


class LoopEndedError(Exception):
    """A loop that never ends returned, or was cancelled by nobody who may."""


async def run_forever(loops: Mapping[str, Coroutine[Any, Any, object]]) -> NoReturn:
    """Run loops that never end until one of them fails; then cancel the others, and wait until they have ended.

    Not an `asyncio.TaskGroup`: before Python 3.13 one that failed leaves a request for cancellation behind
    (`Task.cancelling`), by which Python 3.11.2 takes the next `asyncio.timeout` that expires in the same task for a
    cancellation. Besides, a TaskGroup goes on without a task that was cancelled by mistake.

    Args:
        loops: Each by the name of its task.

    Raises:
        LoopEndedError: A loop ended without an error.
        Exception: The error of the first loop that failed.
    """
    tasks = {name: asyncio.create_task(loop, name=name) for name, loop in loops.items()}
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


def _error(name: str, task: asyncio.Task[object]) -> BaseException:
    """Return why a loop ended that never should."""
    if task.cancelled():
        return LoopEndedError(f"the loop {name!r} was cancelled, and nobody asked for that")
    return task.exception() or LoopEndedError(f"the loop {name!r} returned, which it never should")
