"""What the daemon reports by itself: to the service manager, to the log, and as events."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from pocd.admin import status

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from pocd.admin.parts import Parts
    from pocd.chain.source import Block
    from pocd.observe.changes import Changes
    from pocd.observe.notify import Notifier

LOG_SECONDS = 60.0  # between two log lines with the funnel
STATUS_SECONDS = 10.0  # between two STATUS= lines to the service manager, where nothing changes


class Reports:
    """Reports what the daemon is doing."""

    def __init__(self, parts: Parts, changes: Changes, notifier: Notifier) -> None:
        self._parts = parts
        self._changes = changes
        self._notifier = notifier
        self._newest_hash: str | None = None  # as it was published

    def work(self) -> dict[str, Coroutine[Any, Any, None]]:
        """Return the reports that are made all the time, by name; each runs until it is cancelled."""
        reports = {
            "service manager": self._notify_manager(),
            "funnel": self._log_funnel(),
            "states": self._publish_states(),
        }
        return reports | ({"watchdog": self._feed_watchdog()} if self._notifier.watchdog_seconds else {})

    def head(self, block: Block) -> None:
        """Publish the newest block where it is another one than before."""
        if block.hash != self._newest_hash:
            self._newest_hash = block.hash
            self._parts.events.publish("block", height=block.height, hash=block.hash, chain_id=block.chain_id)

    async def _notify_manager(self) -> None:
        """Send READY=1, since the API listens already, and STATUS= at each change, also while the model loads."""
        self._notifier.ready()
        seen = 0
        while True:
            self._notifier.status(status.summary(self._parts))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATUS_SECONDS):
                    seen = await self._changes.after(seen)

    async def _log_funnel(self) -> None:
        while True:
            await asyncio.sleep(LOG_SECONDS)
            miner = self._parts.miner
            self._parts.log.info(
                status.summary(self._parts),
                action="funnel",
                checked_per_second_1m=round(miner.checked_rate.per_second(60), 2),
                checked_per_second_15m=round(miner.checked_rate.per_second(900), 2),
                valid_per_second_1m=round(miner.valid_rate.per_second(60), 3),
                valid_per_second_15m=round(miner.valid_rate.per_second(900), 3),
            )

    async def _publish_states(self) -> None:
        """Publish each change of the daemon's state."""
        published, seen = None, 0
        while True:
            state = status.state(self._parts)
            if state != published:
                self._parts.events.publish("state", state=state)
            published, seen = state, await self._changes.after(seen)

    async def _feed_watchdog(self) -> None:
        assert self._notifier.watchdog_seconds
        while True:
            self._notifier.alive()
            await asyncio.sleep(self._notifier.watchdog_seconds / 2)
