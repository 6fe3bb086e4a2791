"""The miner: leases spans of nonces to idle workers, filters their distances, commits what was found."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pocd.observe.changes import Changes
from pocd.observe.rates import RateWindow
from pocd.protocol.nonces import Ledger, Span
from pocd.protocol.proof import Proof
from pocd.store.errors import StoreUnavailableError
from pocd.store.outbox import Outbox, RoundProgress, Weights, Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.clock import Clock
    from pocd.protocol.nonces import Node
    from pocd.protocol.proof import Round
    from pocd.store.thread import OutboxThread

LATEST = 20  # proofs that status shows


@dataclass(frozen=True, slots=True)
class Lease:
    """A span of one round's nonces, lent to one worker."""

    mining: Mining
    span: Span

    @property
    def nonces(self) -> range:
        """The nonces of the span."""
        return self.mining.node.nonces(self.span)


@dataclass(eq=False, slots=True)
class Mining:
    """A round while it is being mined. Counts include what earlier runs of the daemon did.

    Attributes:
        started_at: When this daemon took it up, in seconds of the monotonic clock.
        checked_before: Nonces that were checked before that.
        expected_valid_rate: What theory says, once a worker has told it.
    """

    round: Round
    node: Node
    ledger: Ledger
    started_at: float
    checked_before: int
    checked: int
    valid: int
    latest: deque[Proof] = field(default_factory=lambda: deque(maxlen=LATEST))
    expected_valid_rate: float | None = None


class Miner:
    """Owns the active round. Workers take leases from it and bring distances back.

    Attributes:
        paused: Whether nothing is mined because somebody said so, see `pocd.mining.control`.
        batchable: Changes after which a batch may be due: proofs were committed, or another round is mined, or none.
        held: Why nothing is mined though nobody stopped it: the store takes nothing. None while it does.
    """

    def __init__(self, outbox: OutboxThread, changes: Changes, *, clock: Clock) -> None:
        self._outbox = outbox
        self._changes = changes
        self._clock = clock
        self._lent: Counter[Mining] = Counter()  # how many leases of each round are out; no zeros
        self._closed = False
        self.paused = False
        self.held: str | None = None
        self.mining: Mining | None = None
        self.checked_rate = RateWindow(clock.monotonic)
        self.valid_rate = RateWindow(clock.monotonic)
        self.refused_batches = 0
        self.batchable = Changes()

    @property
    def current(self) -> Mining | None:
        """The round to work on now; None while there is none, or mining is stopped or held."""
        return None if self.paused or self._closed or self.held else self.mining

    async def set_round(self, work: Work | None) -> None:
        """Replace the active round at once. What the old one found is delivered all the same."""
        if not self.works_on(work):
            self.take_up(work, await self._outbox(Outbox.begin_round, work, self._clock.wall()) if work else None)

    def works_on(self, work: Work | None) -> bool:
        """Tell whether the active round is that of `work`, on the same share of the nonces."""
        if self.mining is None or work is None:
            return self.mining is None and work is None
        return (self.mining.round, self.mining.node) == (work.round, work.node)

    def take_up(self, work: Work | None, done: RoundProgress | None) -> None:
        """Make `work`, which was begun in the store, the active round at once; `done` is what was done of it."""
        if not self.works_on(work):
            # A round that comes back while leases of it are out goes on with its ledger, which alone knows of them.
            lent = (mining for mining in self._lent if work and (mining.round, mining.node) == (work.round, work.node))
            self.mining = next(lent, None) or (self._mining(work, done) if work and done else None)
        self._notify()

    def _mining(self, work: Work, done: RoundProgress) -> Mining:
        return Mining(
            round=work.round,
            node=work.node,
            ledger=Ledger(done.progress),
            started_at=self._clock.monotonic(),
            checked_before=done.checked,
            checked=done.checked,
            valid=done.valid,
        )

    def pause(self, paused: bool) -> None:  # noqa: FBT001 - it sets that very flag
        """Lend nothing, or go on with the active round. What is being checked is still committed."""
        self.paused = paused
        self._notify()

    def hold(self, reason: str | None) -> None:
        """Lend nothing for a reason, until it is None."""
        self.held = reason
        self._notify()

    async def close(self, limit: float) -> None:
        """Lease nothing more; wait up to `limit` seconds for what is leased."""
        self._closed = True
        self._notify()
        with contextlib.suppress(TimeoutError):  # what is not committed will be checked again
            async with asyncio.timeout(limit):
                await self._changes.until(lambda: not self._lent)

    async def lease(self, count: int) -> Lease:
        """Lend the next nonces, at most `count`; waits while there is nothing to mine."""
        mining = await self.until_mining()
        self._lent[mining] += 1
        return Lease(mining, mining.ledger.take(count))

    async def until_mining(self) -> Mining:
        """Wait until there is a round to work on, and return it."""
        await self._changes.until(lambda: self.current is not None)
        assert self.current is not None
        return self.current

    async def until_replaced(self, mining: Mining) -> None:
        """Return when `mining` is no longer what should be worked on."""
        await self._changes.until(lambda: self.current is not mining)

    async def complete(self, lease: Lease, distances: Sequence[float], weights: Weights) -> None:
        """Commit a lease's result: the valid nonces are on disk when this returns, or mining is held.

        `weights` are what computed it. What the store does not take is not counted, and lent again when it does.
        """
        mining = lease.mining
        assert len(distances) == len(lease.span), "one distance per nonce"
        assert all(math.isfinite(distance) for distance in distances), "workers refuse NaN and infinity"
        proofs = [
            Proof(nonce, distance)
            for nonce, distance in zip(lease.nonces, distances, strict=True)
            if distance < mining.round.r_target
        ]
        try:
            await self._outbox(
                Outbox.commit_span, mining.round, mining.node, lease.span, proofs, weights, self._clock.wall()
            )
        except StoreUnavailableError as error:
            self.hold(str(error))
            self.give_back(lease)
            return
        mining.checked += len(distances)
        mining.valid += len(proofs)
        mining.latest.extend(proofs)
        self.checked_rate.add(len(distances))
        self.valid_rate.add(len(proofs))
        if proofs:
            self.batchable.notify()
        self._returned(mining)

    def give_back(self, lease: Lease) -> None:
        """Take back a lease that its worker did not finish; another one will."""
        lease.mining.ledger.give_back(lease.span)
        self._returned(lease.mining)

    def refuse(self, lease: Lease) -> None:
        """Set a lease aside that has no result: not checked, and not stored as checked."""
        lease.mining.ledger.set_aside(lease.span)
        self.refused_batches += 1
        self._returned(lease.mining)

    def retry_refused(self) -> None:
        """Lend once more what the last worker gave no result for: another one may."""
        if self.mining is not None:
            self.mining.ledger.retry()

    def _returned(self, mining: Mining) -> None:
        self._lent[mining] -= 1
        if not self._lent[mining]:
            del self._lent[mining]
        if not self._lent:
            self._changes.notify()  # `close` may wait for that

    def _notify(self) -> None:
        """Have everybody look again who depends on what is mined."""
        self._changes.notify()
        self.batchable.notify()
