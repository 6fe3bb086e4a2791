"""What was found in a round of an orchestrator is sent until it is late: then it is worth nothing, and is set aside."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn

from pocd.mining.phases import Mode
from pocd.store import deliveries

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.mining.control import Control
    from pocd.store.thread import OutboxThread

LOOK_SECONDS = 1.0


class LateArtifacts:
    """Sets aside what callback URLs have not accepted when its round is over.

    Level-triggered: each look says which round is open. A round is, while it is mined and some seconds after that;
    a restart begins these seconds anew.

    Args:
        control: Says which round was requested last, and whether it is mined.
        outbox: Store of what waits.
        seconds: For how long a round is open after it was stopped.
        clock: The time.
        log: Gets a line when something is set aside.
    """

    def __init__(
        self, control: Control, outbox: OutboxThread, *, seconds: float, clock: Clock, log: FilteringBoundLogger
    ) -> None:
        self._control = control
        self._outbox = outbox
        self._seconds = seconds
        self._clock = clock
        self._log = log
        self._mined_at = clock.monotonic()

    async def run(self) -> NoReturn:
        """Look every second, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Set aside what is late now."""
        now, asked = self._clock.monotonic(), self._control.asked
        if self._control.mode is Mode.GENERATING:
            self._mined_at = now
        if asked is None or not any(queue.pending_batches for queue in self._outbox.view.queues.values()):
            return
        open_round = asked.round.id if now - self._mined_at < self._seconds else None
        batches = nonces = 0
        while (found := await self._outbox.persistently(deliveries.set_late_aside, open_round, self._clock.wall()))[0]:
            batches, nonces = batches + found[0], nonces + found[1]
        if batches:
            self._log.error("late, and set aside", action="late", batches=batches, nonces=nonces)
