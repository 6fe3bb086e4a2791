"""The miner: leases spans of nonces to idle workers, filters their distances, commits the proofs."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pocd.observe.changes import Changes
from pocd.observe.rates import RateWindow
from pocd.protocol.nonces import Ledger, Span, unskipped
from pocd.protocol.proof import Proof
from pocd.store.errors import StoreUnavailableError
from pocd.store.outbox import Outbox, Weights, Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.clock import Clock
    from pocd.protocol.nonces import Node
    from pocd.protocol.proof import Round
    from pocd.store.progress import RoundProgress
    from pocd.store.thread import OutboxThread

LATEST = 20  # proofs that status shows


@dataclass(frozen=True, slots=True)
class Lease:
    """Nonces of one round, leased to one worker.

    Attributes:
        span: The positions that are settled with the lease.
        nonces: The nonces at them, without those that were checked as another node's.
    """

    mining: Mining
    span: Span
    nonces: list[int]


@dataclass(eq=False, slots=True)
class Mining:
    """A round while it is being mined. Counts include earlier runs of the daemon, and other shares of the nonces.

    Attributes:
        started_at: Monotonic time in seconds at which this process began the round.
        checked_before: Nonces of the round that were checked before that.
        expected_valid_rate: Share of valid nonces by theory, 0 to 1; None until a worker has reported it.
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
        paused: Whether mining is stopped by a call of the API, see `pocd.mining.control`.
        batchable: Changes after which a batch may be due: proofs were committed, or what is mined changed.
        held: Why mining waits for the store, which cannot take proofs; None while it can.
    """

    def __init__(self, outbox: OutboxThread, changes: Changes, *, clock: Clock) -> None:
        self._outbox = outbox
        self._changes = changes
        self._clock = clock
        self._leased: Counter[Mining] = Counter()  # how many leases of each round are out; no zeros
        self._closed = False
        self.paused = False
        self.held: str | None = None
        self.mining: Mining | None = None
        self.checked_rate = RateWindow(clock)
        self.valid_rate = RateWindow(clock)
        self.refused_batches = 0
        self.batchable = Changes()

    @property
    def current(self) -> Mining | None:
        """The round to work on now; None while there is none, or mining is stopped or held."""
        return None if self.paused or self._closed or self.held else self.mining

    def rounds_at_work(self) -> list[str]:
        """Return the ids of the active round, and of earlier ones whose nonces are still being checked."""
        return [mining.round.id for mining in {*self._leased, *([self.mining] if self.mining else [])}]

    async def set_round(self, work: Work | None) -> None:
        """Replace the active round at once. The old one's proofs are delivered all the same."""
        if not self.works_on(work):
            self.activate(work, await self._outbox(Outbox.begin_round, work, self._clock.wall()) if work else None)

    def works_on(self, work: Work | None) -> bool:
        """Tell whether the active round is that of `work`, on the same share of the nonces."""
        if self.mining is None or work is None:
            return self.mining is None and work is None
        return (self.mining.round, self.mining.node) == (work.round, work.node)

    def activate(self, work: Work | None, done: RoundProgress | None) -> None:
        """Make `work`, which was begun in the store, the active round at once; `done` is its earlier progress."""
        if not self.works_on(work):
            # A round that comes back while leases of it are out goes on with its ledger, which alone knows of them.
            leased = (
                mining for mining in self._leased if work and (mining.round, mining.node) == (work.round, work.node)
            )
            self.mining = next(leased, None) or (self._mining(work, done) if work and done else None)
            if self.mining and done:  # it may have been mined as another node meanwhile
                self.mining.ledger.skipped = done.skipped
                self.mining.checked, self.mining.valid = done.checked, done.valid
        self._notify()

    def _mining(self, work: Work, done: RoundProgress) -> Mining:
        return Mining(
            round=work.round,
            node=work.node,
            ledger=Ledger(done.progress, done.skipped),
            started_at=self._clock.monotonic(),
            checked_before=done.checked,
            checked=done.checked,
            valid=done.valid,
        )

    def pause(self, paused: bool) -> None:  # noqa: FBT001 - it sets that very flag
        """Stop leasing, or go on with the active round. Nonces that are being checked are still committed."""
        self.paused = paused
        self._notify()

    def hold(self, reason: str | None) -> None:
        """Stop leasing for a reason; with None, go on."""
        self.held = reason
        self._notify()

    async def close(self, limit: float) -> None:
        """Stop leasing for good, and wait up to `limit` seconds for the leases that are out."""
        self._closed = True
        self._notify()
        with contextlib.suppress(TimeoutError):  # what is not committed will be checked again
            async with asyncio.timeout(limit):
                await self._changes.until(lambda: not self._leased)

    async def lease(self, count: int) -> Lease:
        """Lease the next nonces, at most `count`; waits while there is nothing to mine."""
        mining = await self.until_mining()
        self._leased[mining] += 1
        span = mining.ledger.take(count)
        nonces = [mining.node.id + mining.node.count * x for x in unskipped(span, mining.ledger.skipped)]
        return Lease(mining, span, nonces)

    async def until_mining(self) -> Mining:
        """Wait until there is a round to work on, and return it."""
        await self._changes.until(lambda: self.current is not None)
        assert self.current is not None
        return self.current

    async def until_replaced(self, mining: Mining) -> None:
        """Wait until `mining` is no longer the round to work on."""
        await self._changes.until(lambda: self.current is not mining)

    async def complete(self, lease: Lease, distances: Sequence[float], weights: Weights) -> None:
        """Commit a lease's result: the valid nonces are on disk when this returns, or mining is held.

        `weights` computed the distances. A result that the store cannot take is not counted, and its nonces are leased
        again.
        """
        mining = lease.mining
        assert len(distances) == len(lease.nonces), "one distance per nonce"
        assert all(math.isfinite(distance) for distance in distances), "workers refuse NaN and infinity"
        proofs = [
            Proof(nonce, distance)
            for nonce, distance in zip(lease.nonces, distances, strict=True)
            if distance < mining.round.r_target
        ]
        try:
            checked, stored = await self._outbox(
                Outbox.commit_span, mining.round, mining.node, lease.span, proofs, weights, self._clock.wall()
            )
        except StoreUnavailableError as error:
            self.hold(str(error))
            self.give_back(lease)
            return
        self._count(mining, checked, stored)
        if self.mining is not None and self.mining is not mining and self.mining.round == mining.round:
            # It is mined as another node now, to which this comes too late to be in what the store told it.
            self._count(self.mining, checked, stored)
            ledger = self.mining.ledger
            ledger.skipped = (*ledger.skipped, self.mining.node.positions(mining.node.nonces(lease.span)))
        self.checked_rate.add(checked)
        self.valid_rate.add(len(stored))
        if stored:
            self.batchable.notify()
        self._returned(mining)

    def _count(self, mining: Mining, checked: int, stored: Sequence[Proof]) -> None:
        mining.checked += checked
        mining.valid += len(stored)
        mining.latest.extend(stored)

    def give_back(self, lease: Lease) -> None:
        """Take back a lease that its worker did not finish, for another worker."""
        lease.mining.ledger.give_back(lease.span)
        self._returned(lease.mining)

    def refuse(self, lease: Lease) -> None:
        """Set a lease aside that has no result: its nonces do not count as checked."""
        lease.mining.ledger.set_aside(lease.span)
        self.refused_batches += 1
        self._returned(lease.mining)

    def retry_refused(self) -> None:
        """Lease the nonces once more that had no result: another worker may give one."""
        if self.mining is not None:
            self.mining.ledger.retry()

    def _returned(self, mining: Mining) -> None:
        self._leased[mining] -= 1
        if not self._leased[mining]:
            del self._leased[mining]
        if not self._leased:
            self._changes.notify()  # `close` may wait for that

    def _notify(self) -> None:
        """Have everybody look again who depends on what is mined."""
        self._changes.notify()
        self.batchable.notify()
