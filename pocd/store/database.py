"""A thread for a SQLite database, whose calls wait for the disk while the event loop goes on."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Concatenate, Generic, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable


class _Closable(Protocol):
    def close(self) -> None: ...


D = TypeVar("D", bound=_Closable)
P = ParamSpec("P")
T = TypeVar("T")


class CallRefusedError(Exception):
    """A call is not run: too many already wait for the database's thread, or the database is closed."""


class DatabaseThread(Generic[D]):
    """The one thread that a database is opened, used and closed in; callers await its methods from the event loop.

    Calls run in the order asked. One that was started runs to its end even when its caller is cancelled: what is
    being written gets written.

    Attributes:
        view: The open database, for its public attributes, which may be read anywhere; its methods are for the thread.

    Args:
        opened: Function that opens the database; its errors are raised by the constructor.
        name: Name of the thread.
        most_waiting: Calls that may wait; one more is refused, so that a slow disk cannot fill the memory.
    """

    def __init__(self, opened: Callable[[], D], *, name: str, most_waiting: int) -> None:
        self._most_waiting = most_waiting
        self._waiting = 0
        self._closed = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        try:
            self.view = self._executor.submit(opened).result()
        except BaseException:
            self._executor.shutdown()
            raise

    async def __call__(self, method: Callable[Concatenate[D, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `method(database, *args, **kwargs)` in the thread and return its result.

        Raises:
            CallRefusedError: Too many calls wait, or the database is closed; the method is not run.
        """
        if self._closed:  # what outlives the parts that are stopped may still ask
            raise CallRefusedError("is closed")
        if self._waiting >= self._most_waiting:
            raise CallRefusedError(f"is too slow: {self._most_waiting} calls are waiting already")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._executor, lambda: method(self.view, *args, **kwargs))
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Finish what was asked, then close the database; what is asked later is refused."""
        self._closed = True
        try:
            self._executor.submit(self.view.close).result()
        finally:
            self._executor.shutdown()
