"""The miner: leases spans of nonces to idle workers, takes out those that count, and commits the proofs."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pocd.observe.changes import Changes
from pocd.observe.rates import RateWindow
from pocd.protocol.nonces import Ledger, Span, unskipped
from pocd.protocol.proof import Proofs
from pocd.protocol.schemes import SCHEMES, VECTOR_BYTES
from pocd.protocol.vectors import are_finite
from pocd.store.errors import StoreUnavailableError
from pocd.store.outbox import Outbox, Work
from pocd.store.proofs import CheckedSpan, commit_spans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.clock import Clock
    from pocd.protocol.nonces import Node
    from pocd.protocol.proof import Round
    from pocd.store.progress import RoundProgress
    from pocd.store.proofs import Counted, Weights
    from pocd.store.thread import OutboxThread

LATEST = 20  # proofs that status shows
GROUP_SECONDS = 0.1  # from one commit to the next, at least: what comes meanwhile is committed together


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
    latest: Proofs = field(default_factory=Proofs)
    expected_valid_rate: float | None = None

    def count(self, counted: Counted) -> None:
        """Count what was committed of the round."""
        self.checked += counted.checked
        self.valid += len(counted.proofs)
        self.latest = Proofs.joined([self.latest, counted.proofs[-LATEST:]])[-LATEST:]


@dataclass(frozen=True, slots=True)
class _Group:
    """Leases with their results, which are committed together, and the task that does it."""

    leases: list[tuple[Lease, CheckedSpan]]
    commit: asyncio.Task[None]


def those_that_count(round_: Round, nonces: Sequence[int], results: Sequence[float] | bytes) -> Proofs:
    """Return the proofs among computed nonces: those with a distance below r_target, or with a finite vector."""
    if isinstance(results, bytes):
        assert round_.output == "vector", "only a round of vectors has them"
        assert len(results) == VECTOR_BYTES * len(nonces), "one vector per nonce"
        return Proofs(tuple(nonces), results).only(are_finite(results))
    assert round_.r_target is not None, "a round of distances has a target"
    assert len(results) == len(nonces), "one distance per nonce"
    assert all(math.isfinite(distance) for distance in results), "workers refuse NaN and infinity"
    pairs = zip(nonces, results, strict=True)
    return Proofs.of_distances((nonce, distance) for nonce, distance in pairs if distance < round_.r_target)


class Miner:
    """Owns the active round. Workers take leases from it and bring results back.

    Attributes:
        paused: Whether mining is stopped by a call of the API, see `pocd.mining.control`.
        batchable: Changes after which a batch may be due: proofs were committed, or what is mined changed.
        held: Why mining waits for the store, which cannot take proofs; None while it can.
        refused_batches: Batches for which workers gave no result.
        non_finite: Nonces without a result: all of refused batches, and those whose vectors have NaN or infinity.
    """

    def __init__(
        self, outbox: OutboxThread, changes: Changes, *, clock: Clock, group_seconds: float = GROUP_SECONDS
    ) -> None:
        self._outbox = outbox
        self._changes = changes
        self._clock = clock
        self._group_seconds = group_seconds
        self._group: _Group | None = None  # the one that still takes leases
        self._committing = asyncio.Lock()
        self._commit_at = 0.0  # not before, in the loop's time
        self._leased: Counter[Mining] = Counter()  # how many leases of each round are out; no zeros
        self._closed = False
        self.paused = False
        self.held: str | None = None
        self.mining: Mining | None = None
        self.checked_rate = RateWindow(clock)
        self.valid_rate = RateWindow(clock)
        self.refused_batches = 0
        self.non_finite = 0
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
            ledger=Ledger(done.progress, done.skipped, size=work.node.size(SCHEMES[work.round.scheme].largest_nonce)),
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
        while True:
            mining = await self.until_mining()
            if span := mining.ledger.take(count):
                break
            await self._changes.until(lambda: self.current is None or not self.current.ledger.is_used_up)
        self._leased[mining] += 1
        nonces = [mining.node.id + mining.node.count * x for x in unskipped(span, mining.ledger.skipped)]
        return Lease(mining, span, nonces)

    @property
    def is_done(self) -> bool:
        """Whether the active round has no nonce left: all that its scheme allows are checked, or have no result."""
        mining = self.mining
        return mining is not None and mining.ledger.is_used_up and not self._leased.get(mining)

    async def until_mining(self) -> Mining:
        """Wait until there is a round to work on, and return it."""
        await self._changes.until(lambda: self.current is not None)
        assert self.current is not None
        return self.current

    async def until_replaced(self, mining: Mining) -> None:
        """Wait until `mining` is no longer the round to work on."""
        await self._changes.until(lambda: self.current is not mining)

    def complete(self, lease: Lease, results: Sequence[float] | bytes, weights: Weights) -> asyncio.Task[None]:
        """Have a lease's result committed, with those of others that come within `GROUP_SECONDS`.

        What the store cannot take is not counted, and its nonces are leased again.

        Args:
            lease: What was computed.
            results: Distances, or vectors as they travel, in the order of the lease's nonces.
            weights: What the results were computed with.

        Returns:
            The commit: when it is done, the nonces that count are on disk, or mining is held. Whoever waits for it and
            may be cancelled has to shield it, since others' results are in it.
        """
        mining = lease.mining
        proofs = those_that_count(mining.round, lease.nonces, results)
        if self._group is None:
            leases: list[tuple[Lease, CheckedSpan]] = []
            self._group = _Group(leases, asyncio.create_task(self._commit(leases), name="miner: commit"))
        self._group.leases.append((lease, CheckedSpan(mining.round, mining.node, lease.span, proofs, weights)))
        return self._group.commit

    async def _commit(self, results: Sequence[tuple[Lease, CheckedSpan]]) -> None:
        """Commit a group of results, once the one before is committed and its time has come."""
        async with self._committing:
            await asyncio.sleep(self._commit_at - asyncio.get_running_loop().time())
            self._group = None  # what comes from now on is in another one
            try:
                found = await self._outbox(commit_spans, [span for _, span in results], self._clock.wall())
            except StoreUnavailableError as error:
                self.hold(str(error))
                for lease, _ in results:
                    self.give_back(lease)
                return
            finally:
                self._commit_at = asyncio.get_running_loop().time() + self._group_seconds
            for (lease, _), counted in zip(results, found, strict=True):
                self._committed(lease, counted)
            if any(counted.proofs for counted in found):
                self.batchable.notify()

    def _committed(self, lease: Lease, counted: Counted) -> None:
        mining = lease.mining
        mining.count(counted)
        if self.mining is not None and self.mining is not mining and self.mining.round == mining.round:
            # It is mined as another node now, to which this comes too late to be in what the store told it.
            self.mining.count(counted)
            ledger = self.mining.ledger
            ledger.skipped = (*ledger.skipped, self.mining.node.positions(mining.node.nonces(lease.span)))
        self.checked_rate.add(counted.checked)
        self.valid_rate.add(len(counted.proofs))
        if mining.round.output == "vector":
            self.non_finite += counted.checked - len(counted.proofs)
        self._returned(mining)

    def give_back(self, lease: Lease) -> None:
        """Take back a lease that its worker did not finish, for another worker."""
        lease.mining.ledger.give_back(lease.span)
        self._returned(lease.mining)
        self._changes.notify()  # somebody may wait for nonces

    def refuse(self, lease: Lease) -> None:
        """Set a lease aside that has no result: its nonces do not count as checked."""
        lease.mining.ledger.set_aside(lease.span)
        self.refused_batches += 1
        self.non_finite += len(lease.nonces)
        self._returned(lease.mining)

    def retry_refused(self) -> None:
        """Lease the nonces once more that had no result: another worker may give one."""
        if self.mining is not None:
            self.mining.ledger.retry()
            self._changes.notify()

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
