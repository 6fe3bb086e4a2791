"""The thread that the outbox lives in, for callers in the event loop."""

from __future__ import annotations

import asyncio
import sqlite3
from functools import partial
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from pocd.store.bodies import BodyError
from pocd.store.database import CallRefusedError, DatabaseThread
from pocd.store.errors import StoreDamagedError, StoreUnavailableError, damaged, failure_of, is_damage
from pocd.store.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

P = ParamSpec("P")
T = TypeVar("T")

MOST_WAITING = 1024  # above what all parts of the daemon and all clients of its API ask for at once
TRIES = 3  # to read a stored body: a disk may have read it wrongly
AGAIN_SECONDS = 1.0  # between two tries to write what has to be recorded


class OutboxThread(DatabaseThread[Outbox]):
    """The one thread that an `Outbox` lives in."""

    def __init__(self, path: Path, waiting: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(partial(Outbox.open, path, waiting), name="outbox", most_waiting=MOST_WAITING)
        self._path = path

    async def __call__(self, method: Callable[Concatenate[Outbox, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `method(outbox, *args, **kwargs)` in the thread and return its result.

        Raises:
            StoreUnavailableError: The disk is full, fails, or is too slow, or the store is closed; nothing was changed.
            StoreError: The file is damaged: a second look found it so as well.
        """
        try:
            return await super().__call__(_trusting, method, *args, **kwargs)
        except CallRefusedError as error:
            raise StoreUnavailableError(f"the store {self._path} {error}") from error
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


def _trusting(outbox: Outbox, method: Callable[Concatenate[Outbox, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `method`; where the store reads as damaged, it is looked at again before the next."""
    if outbox.suspect:
        outbox.look_again()
    try:
        return method(outbox, *args, **kwargs)
    except sqlite3.Error as error:
        outbox.suspect = is_damage(error)
        outbox.unread += isinstance(error, BodyError)
        if outbox.unread >= TRIES:  # which SQLite's own look through the file does not find
            raise StoreDamagedError(damaged(outbox.place.path, str(error))) from error
        raise
