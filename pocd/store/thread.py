"""The thread that the outbox lives in, for callers in the event loop."""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from pocd.store.errors import StoreUnavailableError, failure_of
from pocd.store.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

P = ParamSpec("P")
T = TypeVar("T")

AGAIN_SECONDS = 1.0  # between two tries to write what has to be recorded


class OutboxThread:
    """The one thread that an `Outbox` lives in; callers await its methods from the event loop.

    A call that was started runs to its end even when its caller is cancelled: what is being
    written gets written.

    Attributes:
        view: The open outbox, for its public attributes, which may be read anywhere; its methods are for the thread.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outbox")
        try:
            self.view = self._executor.submit(Outbox.open, path).result()
        except BaseException:
            self._executor.shutdown()
            raise

    async def __call__(self, method: Callable[Concatenate[Outbox, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `method(outbox, *args, **kwargs)` in the thread and return its result.

        Raises:
            StoreUnavailableError: The disk is full or fails; nothing was changed, and it may go on later.
            StoreError: The file is damaged.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, lambda: method(self.view, *args, **kwargs))
        except sqlite3.Error as error:
            raise failure_of(self._path, error) from error

    async def persistently(
        self, method: Callable[Concatenate[Outbox, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `method`, and again every second while the store is unavailable: what has happened has to be recorded."""
        while True:
            try:
                return await self(method, *args, **kwargs)
            except StoreUnavailableError:
                await asyncio.sleep(AGAIN_SECONDS)

    def close(self) -> None:
        """Finish what was begun, then close the store."""
        self._executor.submit(self.view.close).result()
        self._executor.shutdown()
