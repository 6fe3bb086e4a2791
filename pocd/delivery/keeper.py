"""Keep the store small, and mining within what the disk can take."""

from __future__ import annotations

import asyncio
import math
import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pocd.store import deliveries, upkeep, validations
from pocd.store.errors import StoreUnavailableError
from pocd.store.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import SteadyClock
    from pocd.delivery.receivers import Receivers
    from pocd.mining.miner import Miner
    from pocd.store.thread import OutboxThread

LOOK_SECONDS = 5.0
ROOM_AGAIN = 0.05  # how far back from a limit mining goes on, so that it does not flutter there
MIB = 2**20


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Limits of the store: seconds that batches are kept, and bytes that they may take.

    Attributes:
        keep_delivered: Seconds that a batch is kept after the last receiver has accepted it.
        expire_after: Seconds until a batch expires whose receiver is parked or no longer configured.
        size: Most bytes in use in the store's file.
        free: Bytes that have to stay free on the store's disk.
    """

    keep_delivered: float
    expire_after: float
    size: int
    free: int


def shortage(used: int, free: int, limits: StoreLimits, *, held: bool) -> str | None:
    """Return why mining has to wait for room; None where there is enough.

    Args:
        used: Bytes in use in the store's file.
        free: Bytes free on the store's disk.
        limits: Limits of the store.
        held: Whether mining waits already; it then resumes only with some room to spare.
    """
    margin = ROOM_AGAIN if held else 0.0
    if used > limits.size * (1 - margin):
        return (
            f"the store holds {used / MIB:.0f} MiB, and store.size_limit_mib is {limits.size / MIB:.0f}: mend what "
            "keeps receivers from accepting (pocd status), give up dead letters (pocd outbox purge), or raise the limit"
        )
    if free < limits.free * (1 + margin):
        return (
            f"the store's disk has {free / MIB:.0f} MiB free, and store.free_space_mib is {limits.free / MIB:.0f}: "
            "make room on the disk"
        )
    return None


class Keeper:
    """Prunes and expires batches every few seconds, and holds mining while the store has no room."""

    def __init__(
        self,
        path: Path,
        outbox: OutboxThread,
        miner: Miner,
        receivers: Receivers,
        *,
        limits: StoreLimits,
        clock: SteadyClock,
        log: FilteringBoundLogger,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._path = path
        self._outbox = outbox
        self._miner = miner
        self._receivers = receivers
        self._limits = limits
        self._clock = clock
        self._log = log
        self._free_bytes = free_bytes
        self._logged: str | None = None  # the reason that was logged last

    async def run(self) -> None:
        """Look at the store every few seconds until cancelled."""
        await self._clamp()  # the clock may have been set back while the daemon was not running
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Prune and expire batches that are due, and hold mining or let it go on."""
        try:
            await self._outbox(Outbox.keep_place)
        except StoreUnavailableError as error:
            self._hold(str(error))
            return
        held = self._miner.held
        self._log_hold(held)  # a commit that failed may have held it since the last look
        await self._follow_clock()
        try:
            await self._prune(self._clock.wall() - self._limits.keep_delivered)
            await self._repeat(upkeep.prune_rounds)
            await self._outbox(validations.prune, self._clock.wall() - self._limits.keep_delivered)
            await self._expire_unserved()
            await self._receivers.end_idle()
            reason = await self._shortage()
            if held and reason is None:
                await self._outbox(upkeep.probe)
        except StoreUnavailableError as error:
            reason = str(error)
        if reason is None and self._miner.held != held:
            return  # a commit failed meanwhile: the next look finds out whether it can be made
        self._hold(reason)

    def _hold(self, reason: str | None) -> None:
        if reason != self._miner.held:
            self._miner.hold(reason)
        self._log_hold(reason)

    def _log_hold(self, reason: str | None) -> None:
        if reason and not self._logged:
            self._log.error("mining waits for the store", action="store_held", cause=reason)
        elif self._logged and not reason:
            self._log.info("the store takes proofs again, mining goes on", action="store_released")
        self._logged = reason

    async def _follow_clock(self) -> None:
        """Where the wall clock was set, move what waits with it: its age is the time that really passed."""
        jump = self._clock.follow()
        if not jump:
            return
        # Asked for before anything else can run: what was asked before has earlier times, what comes later has later.
        await self._outbox.persistently(upkeep.shift_times, jump)
        self._log.warning("the wall clock was set", action="clock_jump", seconds=round(jump, 1))
        if jump < 0:
            await self._clamp()

    async def _clamp(self) -> None:
        await self._outbox.persistently(upkeep.clamp_times, self._clock.wall())

    async def _shortage(self) -> str | None:
        used = await self._outbox(upkeep.used_bytes)
        if used > self._limits.size * (1 - ROOM_AGAIN):
            # What was delivered is kept for convenience only, and goes before mining stops.
            pruned = await self._prune(math.inf)
            await self._outbox(validations.prune, math.inf)
            if pruned:
                self._log.warning("delivered batches were pruned for room", action="pruned_early", batches=pruned)
            used = await self._outbox(upkeep.used_bytes)
        return shortage(used, self._free(), self._limits, held=self._miner.held is not None)

    def _free(self) -> int:
        try:
            return self._free_bytes(self._path.parent)
        except OSError as error:
            raise StoreUnavailableError(f"the store's folder cannot be looked at: {error}") from error

    async def _prune(self, before: float) -> int:
        return await self._repeat(upkeep.prune_delivered, before)

    async def _repeat(self, method: Callable[..., int], *args: object) -> int:
        """Repeat a bounded piece of upkeep until none is left; other work gets its turn between."""
        total = 0
        while count := await self._outbox(method, *args):
            total += count
        return total

    async def _expire_unserved(self) -> None:
        """Expire old batches in queues that no dispatcher sends from; in the others they expire at a failed attempt."""
        served = {each.receiver.name for each in self._receivers if each.state.parked_at is None}
        for name, queue in self._outbox.view.queues.items():
            if name in served or not queue.pending_batches:
                continue
            now = self._clock.wall()
            expired = await self._repeat(
                partial(deliveries.expire, receiver=name, queued_before=now - self._limits.expire_after, now=now)
            )
            if expired:
                self._log.error("batches expired; they are kept", action="expired", receiver=name, batches=expired)
