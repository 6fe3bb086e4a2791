"""What a round of the live network found is sent until it is late: then it is worth nothing, and is set aside."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn, Protocol

from pocd.mining.phases import Mode
from pocd.store import deliveries

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.mining.control import Control
    from pocd.mining.follower import ChainHealth
    from pocd.store.outbox import Outbox
    from pocd.store.thread import OutboxThread

LOOK_SECONDS = 1.0


class Windows(Protocol):
    """Says which rounds are open."""

    def closing(self) -> Callable[[Outbox, float], tuple[int, int]] | None:
        """Return what sets aside the batches of all rounds that are over now, and returns how many batches and nonces.

        None where it is not known which are over.
        """


class OrchestratedWindows:
    """A round of an orchestrator is open while it is mined, and some seconds after that.

    A restart begins these seconds anew.

    Args:
        control: Says which round was requested last, and whether it is mined.
        seconds: For how long a round is open after it was stopped.
        clock: The time.
    """

    def __init__(self, control: Control, *, seconds: float, clock: Clock) -> None:
        self._control = control
        self._seconds = seconds
        self._clock = clock
        self._mined_at = clock.monotonic()

    def closing(self) -> Callable[[Outbox, float], tuple[int, int]] | None:
        """Return what sets aside all but the round that was requested last, and that too once its time is over."""
        now, asked = self._clock.monotonic(), self._control.asked
        if self._control.mode is Mode.GENERATING:
            self._mined_at = now
        if asked is None:
            return None
        open_round = asked.round.id if now - self._mined_at < self._seconds else None
        return lambda outbox, wall: deliveries.set_late_aside(outbox, open_round, wall)


class EpochWindows:
    """A round of the chain's epoch is open as long as the chain accepts its artifacts, by height.

    Nothing is remembered, so a restart changes nothing, and while the chain says nothing no round ends.

    Args:
        health: What the chain said last.
    """

    def __init__(self, health: ChainHealth) -> None:
        self._health = health

    def closing(self) -> Callable[[Outbox, float], tuple[int, int]] | None:
        """Return what sets aside all rounds whose artifacts are not accepted at the height that was seen last."""
        if self._health.epoch is None:
            return None
        accepted = list(self._health.epoch.accepted)
        return lambda outbox, wall: deliveries.set_closed_aside(outbox, accepted, wall)


class LateArtifacts:
    """Sets aside what receivers have not accepted when its round is over.

    Level-triggered: each look asks anew which rounds are open.

    Args:
        windows: Says which rounds are open.
        outbox: Store of what waits.
        clock: The time.
        log: Gets a line when something is set aside.
    """

    def __init__(self, windows: Windows, outbox: OutboxThread, *, clock: Clock, log: FilteringBoundLogger) -> None:
        self._windows = windows
        self._outbox = outbox
        self._clock = clock
        self._log = log

    async def run(self) -> NoReturn:
        """Look every second, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Set aside what is late now."""
        close = self._windows.closing()
        if close is None or not any(queue.pending_batches for queue in self._outbox.view.queues.values()):
            return
        batches = nonces = 0
        while (found := await self._outbox.persistently(close, self._clock.wall()))[0]:
            batches, nonces = batches + found[0], nonces + found[1]
        if batches:
            self._log.error("late, and set aside", action="late", batches=batches, nonces=nonces)
