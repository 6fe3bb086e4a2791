"""Changes: a notice that something changed, for all who have to look again then."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Changes:
    """Counts changes, and wakes all who wait for one. Notify and wait in the loop's thread.

    Attributes:
        count: Number of changes so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._next = asyncio.Event()

    def notify(self) -> None:
        """Count a change, and wake all who wait."""
        self.count += 1
        self._next.set()
        self._next = asyncio.Event()

    async def after(self, count: int) -> int:
        """Wait until there were more than `count` changes; returns their number."""
        await self.until(lambda: self.count > count)
        return self.count

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, which is looked at now and after each change."""
        while not condition():
            await self._next.wait()
