"""The miner over a real store: what is lent, what is committed, and who waits for what."""

import asyncio
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from struct import pack, unpack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocd.mining.miner import LATEST, Lease, Miner
from pocd.observe.changes import Changes
from pocd.protocol.nonces import Ledger, Node, Progress, Span
from pocd.protocol.proof import Proofs, Round
from pocd.protocol.schemes import SCHEMES, VECTOR_SIZE
from pocd.store.deliveries import next_pending
from pocd.store.outbox import Outbox, Totals, Work
from pocd.store.proofs import Weights
from pocd.store.thread import OutboxThread
from tests.support.clocks import NEXT, NOW, ROUND, ManualClock
from tests.support.stored import VECTORS, proofs_of, vector_of
from tests.support.waiting import soon

WEIGHTS = Weights("f00d", "float32")
NODE = Node(1, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[OutboxThread]:
    with closing(OutboxThread(path)) as thread:
        yield thread


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def miner(outbox: OutboxThread, clock: ManualClock) -> Miner:
    return open_miner(outbox, clock)


def open_miner(outbox: OutboxThread, clock: ManualClock | None = None) -> Miner:
    return Miner(outbox, Changes(), clock=clock or ManualClock(), group_seconds=0)


async def let_all_run(outbox: OutboxThread) -> None:
    """Let every task go as far as it can: through the loop and through the store's thread, several times."""
    for _ in range(5):
        await outbox(next_pending, "nobody")
        await asyncio.sleep(0)


async def complete(miner: Miner, lease: Lease, distance: float = 1.0) -> None:
    """Bring a lease back with the same distance for each of its nonces, or with a vector that only the nonce has."""
    distances, vectors = [distance] * len(lease.nonces), b"".join(map(vector_of, lease.nonces))
    await soon(miner.complete(lease, distances if lease.mining.round.output == "distance" else vectors, WEIGHTS))


async def stored(outbox: OutboxThread) -> Proofs:
    """Return the proofs on disk, in order."""

    def read(store: Outbox) -> Proofs:
        rows = store.db.execute("SELECT size, nonces, results FROM proofs ORDER BY number")
        return Proofs.joined([Proofs(unpack(f"<{size}q", nonces), results) for size, nonces, results in rows])

    return await outbox(read)


async def progress(outbox: OutboxThread, round_: Round = ROUND) -> Progress:
    return (await outbox(Outbox.begin_round, Work(round_, NODE), NOW)).progress


# Leases


async def test_leases_are_this_nodes_nonces_dense_and_none_twice(miner: Miner) -> None:
    await miner.set_round(Work(ROUND, NODE))
    leases = await soon(asyncio.gather(*(miner.lease(count) for count in (4, 1, 3))))
    assert [nonce for lease in leases for nonce in lease.nonces] == [1 + 3 * x for x in range(8)]
    assert all(lease.mining is miner.mining for lease in leases)


async def test_without_a_round_a_lease_waits_for_one(miner: Miner, outbox: OutboxThread) -> None:
    waiting = asyncio.create_task(miner.lease(2))
    await let_all_run(outbox)
    assert not waiting.done()
    await miner.set_round(Work(ROUND, NODE))
    lease = await soon(waiting)
    assert lease.mining.round == ROUND


async def test_everybody_who_waits_for_a_round_gets_a_share_of_it(miner: Miner, outbox: OutboxThread) -> None:
    waiting = [asyncio.create_task(miner.lease(2)) for _ in range(3)]
    await let_all_run(outbox)
    await miner.set_round(Work(ROUND, NODE))
    leases = await soon(asyncio.gather(*waiting))
    assert sorted(lease.span for lease in leases) == [Span(0, 2), Span(2, 4), Span(4, 6)]


async def test_what_is_given_back_is_lent_again_first(miner: Miner) -> None:
    await miner.set_round(Work(ROUND, NODE))
    first, second = await miner.lease(4), await miner.lease(4)
    miner.give_back(second)
    miner.give_back(first)
    spans = [(await miner.lease(4)).span for _ in range(3)]
    assert spans == [first.span, second.span, Span(8, 12)]


async def test_after_a_restart_what_was_lent_and_not_finished_is_lent_first(path: Path) -> None:
    with closing(OutboxThread(path)) as outbox:
        miner = open_miner(outbox)
        await miner.set_round(Work(ROUND, NODE))
        leases = [await miner.lease(2) for _ in range(4)]
        await complete(miner, leases[0])
        await complete(miner, leases[2])
    with closing(OutboxThread(path)) as outbox:
        miner = open_miner(outbox)
        await miner.set_round(Work(ROUND, NODE))
        assert [(await miner.lease(2)).span for _ in range(3)] == [leases[1].span, Span(6, 8), Span(8, 10)]
        assert miner.mining is not None
        assert (miner.mining.checked_before, miner.mining.checked, miner.mining.valid) == (4, 4, 4)


# Results


async def test_valid_is_strictly_below_the_target(miner: Miner, outbox: OutboxThread) -> None:
    await miner.set_round(Work(ROUND, NODE))
    lease = await miner.lease(5)
    below, above = math.nextafter(1.4, 0), math.nextafter(1.4, 2)
    await soon(miner.complete(lease, [1.4, below, above, 0.0, 2.0], WEIGHTS))
    assert await stored(outbox) == Proofs.of_distances([(4, below), (10, 0.0)])
    assert outbox.view.totals == Totals(checked=5, valid=2, stored=0, delivered=0)


async def test_a_completed_lease_is_on_disk(path: Path) -> None:
    with closing(OutboxThread(path)) as outbox:
        miner = open_miner(outbox)
        await miner.set_round(Work(ROUND, NODE))
        await soon(miner.complete(await miner.lease(2), [1.5, 1.25], WEIGHTS))
    with closing(OutboxThread(path)) as outbox:
        assert await stored(outbox) == Proofs.of_distances([(4, 1.25)])
        assert await progress(outbox) == Progress(2)


@pytest.mark.parametrize(
    "distances",
    [[1.0], [1.0, 1.0, 1.0], [], [1.0, math.nan], [math.inf, 1.0], [1.0, -math.inf]],
    ids=["fewer", "more", "none", "nan", "infinity", "minus infinity"],
)
async def test_what_is_not_one_finite_distance_per_nonce_commits_nothing(
    miner: Miner, outbox: OutboxThread, distances: list[float]
) -> None:
    await miner.set_round(Work(ROUND, NODE))
    lease = await miner.lease(2)
    with pytest.raises(AssertionError):
        await miner.complete(lease, distances, WEIGHTS)
    assert await stored(outbox) == Proofs()
    assert await progress(outbox) == Progress()
    await complete(miner, lease)  # it is still lent, and may be completed yet


async def test_counts_and_rates_follow_what_is_committed(miner: Miner, clock: ManualClock) -> None:
    await miner.set_round(Work(ROUND, NODE))
    mining = miner.mining
    assert mining is not None
    clock.advance(10)
    await soon(miner.complete(await miner.lease(4), [1.0, 1.0, 2.0, 1.5], WEIGHTS))
    assert (mining.checked_before, mining.checked, mining.valid) == (0, 4, 2)
    assert mining.latest == Proofs.of_distances([(1, 1.0), (4, 1.0)])
    assert (miner.checked_rate.per_second(60), miner.valid_rate.per_second(60)) == (0.4, 0.2)
    assert mining.started_at == 100.0


async def test_only_the_latest_proofs_are_held(miner: Miner) -> None:
    await miner.set_round(Work(ROUND, NODE))
    await complete(miner, await miner.lease(LATEST + 5))
    assert miner.mining is not None
    assert miner.mining.latest.nonces == tuple(1 + 3 * x for x in range(5, LATEST + 5))


async def test_a_batch_may_be_due_after_proofs_were_stored(miner: Miner) -> None:
    await miner.set_round(Work(ROUND, NODE))
    seen = miner.batchable.count
    await complete(miner, await miner.lease(2), distance=1.9)
    assert miner.batchable.count == seen, "nothing was found"
    await complete(miner, await miner.lease(2))
    assert miner.batchable.count == seen + 1


def without_numbers(*places: int) -> bytes:
    """Return a vector of ones, but for places that have no finite number."""
    numbers = [math.nan if place % 2 else math.inf for place in range(VECTOR_SIZE)]
    return pack("<12e", *(number if place in places else 1.0 for place, number in enumerate(numbers)))


async def test_every_nonce_with_a_finite_vector_counts(miner: Miner, outbox: OutboxThread) -> None:
    await miner.set_round(Work(VECTORS, NODE))
    lease = await miner.lease(5)
    broken = [without_numbers(0), without_numbers(11), without_numbers(*range(12))]
    vectors = [broken[0], vector_of(4), broken[1], broken[2], vector_of(13)]
    await soon(miner.complete(lease, b"".join(vectors), WEIGHTS))
    assert await stored(outbox) == proofs_of(VECTORS, [4, 13])
    assert outbox.view.totals == Totals(checked=5, valid=2)
    assert miner.non_finite == 3
    miner.refuse(await miner.lease(4))
    assert miner.non_finite == 7
    assert await progress(outbox, VECTORS) == Progress(5)


@pytest.mark.parametrize(
    ("round_", "results"),
    [(VECTORS, vector_of(1)), (VECTORS, vector_of(1) * 3), (VECTORS, [1.0, 1.0]), (ROUND, vector_of(1) * 2)],
    ids=["fewer", "more", "distances", "vectors of a round of distances"],
)
async def test_results_of_another_kind_or_number_commit_nothing(
    miner: Miner, outbox: OutboxThread, round_: Round, results: bytes | list[float]
) -> None:
    await miner.set_round(Work(round_, NODE))
    lease = await miner.lease(2)
    with pytest.raises(AssertionError):
        await miner.complete(lease, results, WEIGHTS)
    assert await progress(outbox, round_) == Progress()


# Groups


async def commits(outbox: OutboxThread) -> int:
    """Return how many transactions the store has seen."""
    return await outbox(
        lambda store: int(store.db.execute("SELECT value FROM meta WHERE key = 'commits'").fetchone()[0])
    )


@pytest.mark.parametrize("round_", [ROUND, VECTORS], ids=["distances", "vectors"])
async def test_what_comes_at_once_is_committed_in_one_transaction(outbox: OutboxThread, round_: Round) -> None:
    miner = Miner(outbox, Changes(), clock=ManualClock(), group_seconds=0.05)
    await miner.set_round(Work(round_, NODE))
    leases = [await miner.lease(3) for _ in range(8)]
    before, seen = await commits(outbox), miner.batchable.count
    await asyncio.gather(*(complete(miner, lease) for lease in leases))
    assert await commits(outbox) == before + 1
    assert miner.batchable.count == seen + 1
    assert await progress(outbox, round_) == Progress(24)
    assert miner.mining is not None
    assert (miner.mining.checked, miner.mining.valid, outbox.view.totals.valid) == (24, 24, 24)


async def test_what_comes_while_a_group_is_committed_is_in_the_next(miner: Miner, outbox: OutboxThread) -> None:
    await miner.set_round(Work(VECTORS, NODE))
    leases = [await miner.lease(2) for _ in range(20)]
    for lease in leases:  # one after the other, without waiting for any
        waiting = asyncio.ensure_future(complete(miner, lease))
        await asyncio.sleep(0)
    await soon(waiting)
    await soon(miner.close(3600))
    assert await stored(outbox) == proofs_of(VECTORS, NODE.nonces(Span(0, 40)))
    assert await progress(outbox, VECTORS) == Progress(40)


async def test_a_group_that_the_store_cannot_take_is_leased_again(miner: Miner, outbox: OutboxThread) -> None:
    await miner.set_round(Work(VECTORS, NODE))
    first, second = await miner.lease(2), await miner.lease(3)
    await outbox(lambda store: store.db.execute("PRAGMA query_only = ON"))
    await asyncio.gather(complete(miner, first), complete(miner, second))
    assert miner.held is not None
    await outbox(lambda store: store.db.execute("PRAGMA query_only = OFF"))
    assert await progress(outbox, VECTORS) == Progress()
    miner.hold(None)
    assert [(await miner.lease(3)).span for _ in range(2)] == [first.span, second.span]


# Rounds


async def test_a_new_round_replaces_the_old_one_at_once(miner: Miner) -> None:
    await miner.set_round(Work(ROUND, NODE))
    old = await miner.lease(5)
    replaced = asyncio.create_task(miner.until_replaced(old.mining))
    seen = miner.batchable.count
    await miner.set_round(Work(NEXT, NODE))
    await soon(replaced)
    assert miner.batchable.count > seen
    new = await miner.lease(2)
    assert (new.mining.round, new.span) == (NEXT, Span(0, 2))


async def test_what_was_lent_under_the_old_round_still_commits_to_it(miner: Miner, outbox: OutboxThread) -> None:
    await miner.set_round(Work(ROUND, NODE))
    old = await miner.lease(2)
    await miner.set_round(Work(NEXT, NODE))
    new = await miner.lease(3)
    await complete(miner, old)
    await complete(miner, new)
    assert (await progress(outbox, ROUND), await progress(outbox, NEXT)) == (Progress(2), Progress(3))
    assert miner.mining is not None
    assert miner.mining.checked == 3
    assert outbox.view.totals.checked == 5


async def test_the_same_round_again_changes_nothing(miner: Miner) -> None:
    await miner.set_round(Work(ROUND, NODE))
    lease = await miner.lease(2)
    await complete(miner, lease)
    seen = miner.batchable.count
    await miner.set_round(Work(ROUND, NODE))
    assert miner.mining is lease.mining
    assert miner.batchable.count == seen
    assert (await miner.lease(2)).span == Span(2, 4)


async def test_between_rounds_nothing_is_lent(miner: Miner, outbox: OutboxThread) -> None:
    await miner.set_round(Work(ROUND, NODE))
    old = await miner.lease(2)
    await miner.set_round(None)
    await soon(miner.until_replaced(old.mining))
    waiting = asyncio.create_task(miner.lease(2))
    await let_all_run(outbox)
    assert not waiting.done()
    await complete(miner, old)
    await miner.set_round(Work(NEXT, NODE))
    assert (await soon(waiting)).mining.round == NEXT


async def test_a_round_that_comes_back_goes_on_where_it_was(miner: Miner) -> None:
    await miner.set_round(Work(ROUND, NODE))
    await complete(miner, await miner.lease(4))
    await miner.set_round(Work(NEXT, NODE))
    await miner.set_round(Work(ROUND, NODE))
    assert (await miner.lease(2)).span == Span(4, 6)
    assert miner.mining is not None
    assert (miner.mining.checked_before, miner.mining.checked) == (4, 4)


@pytest.mark.parametrize("between", [None, Work(NEXT, NODE)], ids=["none", "another"])
async def test_a_round_that_comes_back_does_not_lend_again_what_is_still_lent(
    miner: Miner, outbox: OutboxThread, between: Work | None
) -> None:
    """A chain node that lags can take the head back into the round that has just ended."""
    await miner.set_round(Work(ROUND, NODE))
    old = await miner.lease(2)
    await miner.set_round(between)
    await miner.set_round(Work(ROUND, NODE))
    new = await miner.lease(2)
    assert set(old.nonces).isdisjoint(new.nonces)
    await complete(miner, old)
    await complete(miner, new)
    assert await progress(outbox) == Progress(4)
    assert miner.mining is not None
    assert miner.mining.checked == 4


# Other shares of the same round


async def test_a_share_that_changes_goes_on_with_what_was_not_checked(miner: Miner) -> None:
    await miner.set_round(Work(ROUND, Node(0, 1)))
    await complete(miner, await miner.lease(6))
    await miner.set_round(Work(ROUND, Node(0, 2)))
    lease = await miner.lease(3)
    assert lease.nonces == [6, 8, 10]
    await complete(miner, lease)
    await miner.set_round(Work(ROUND, Node(0, 1)))
    lease = await miner.lease(5)
    assert lease.nonces == [7, 9, 11, 12, 13]
    assert miner.mining is not None
    assert (miner.mining.checked_before, miner.mining.checked, miner.mining.valid) == (9, 9, 9)


async def test_what_was_under_way_when_the_share_changed_is_counted_once(miner: Miner, outbox: OutboxThread) -> None:
    await miner.set_round(Work(ROUND, Node(0, 1)))
    first, second = await miner.lease(4), await miner.lease(4)
    await miner.set_round(Work(ROUND, Node(0, 2)))
    again = await miner.lease(2)
    assert again.nonces == [0, 2]
    await complete(miner, first)
    await complete(miner, again)
    assert miner.mining is not None
    assert (miner.mining.checked, miner.mining.valid, outbox.view.totals.checked) == (4, 4, 4)
    miner.give_back(second)
    assert (await miner.lease(2)).nonces == [4, 6]
    assert (await stored(outbox)).nonces == (0, 1, 2, 3)


async def test_a_share_that_comes_back_leaves_out_what_the_other_did_meanwhile(miner: Miner) -> None:
    await miner.set_round(Work(ROUND, Node(0, 1)))
    old = await miner.lease(2)
    await miner.set_round(Work(ROUND, Node(0, 2)))
    await complete(miner, await miner.lease(3))
    await miner.set_round(Work(ROUND, Node(0, 1)))
    assert miner.mining is old.mining, "it alone knows of its lease"
    assert miner.mining.checked == 3
    lease = await miner.lease(3)
    assert lease.nonces == [3, 5, 6]
    await complete(miner, lease)
    await complete(miner, old)
    assert miner.mining.checked == 7


SHARES = [Node(0, 1), Node(0, 2), Node(1, 2), Node(0, 3), Node(1, 3), Node(3, 4), Node(2, 5)]
STEPS = st.one_of(
    st.tuples(st.just("lease"), st.integers(1, 9)),
    st.tuples(st.sampled_from(["complete", "give_back"]), st.integers(0, 9)),
    st.tuples(st.just("share"), st.sampled_from(SHARES)),
    st.tuples(st.just("restart"), st.none()),
)


@given(steps=st.lists(STEPS, max_size=40), round_=st.sampled_from([ROUND, VECTORS]))
@settings(max_examples=40, deadline=None)
def test_however_shares_change_no_nonce_is_counted_twice_and_none_is_left_out(
    steps: list[tuple[str, Any]], round_: Round
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(change_shares(Path(folder) / "store.db", round_, steps))


async def change_shares(path: Path, round_: Round, steps: list[tuple[str, Any]]) -> None:
    """Do the steps on one round, and hold what is stored against what was computed."""
    bench = Sharing(path, round_)
    with closing(bench):
        await bench.share(SHARES[0])
        for step, what in steps:
            await getattr(bench, step)(what)
        await bench.finish_share()
        assert bench.miner.mining is not None
        proofs = await stored(bench.outbox)
        nonces = proofs.nonces
        if round_.output == "vector":
            assert proofs == proofs_of(round_, nonces), "a nonce has another's vector"
        assert sorted(nonces) == sorted(bench.committed), "a nonce was stored twice, or not at all"
        counts = bench.outbox.view.totals.checked, bench.miner.mining.checked, bench.miner.mining.valid
        assert set(counts) == {len(bench.committed)}


class Sharing:
    """One round, mined in shares that change; every nonce is valid."""

    def __init__(self, path: Path, round_: Round) -> None:
        self.path = path
        self.round = round_
        self.outbox = OutboxThread(path)
        self.miner = open_miner(self.outbox)
        self.node = SHARES[0]
        self.leases: list[Lease] = []
        self.committed: set[int] = set()

    def close(self) -> None:
        self.outbox.close()

    async def share(self, node: Node) -> None:
        self.node = node
        await self.miner.set_round(Work(self.round, node))

    async def restart(self, _: None) -> None:
        self.close()
        self.outbox, self.leases = OutboxThread(self.path), []
        self.miner = open_miner(self.outbox)
        await self.share(self.node)

    async def lease(self, count: int) -> None:
        lease = await soon(self.miner.lease(count))
        assert self.committed.isdisjoint(lease.nonces), "mined again"
        self.leases.append(lease)

    async def complete(self, which: int) -> None:
        if self.leases:
            lease = self.leases.pop(which % len(self.leases))
            await complete(self.miner, lease)
            self.committed.update(lease.nonces)

    async def give_back(self, which: int) -> None:
        if self.leases:
            self.miner.give_back(self.leases.pop(which % len(self.leases)))

    async def finish_share(self) -> None:
        """Complete what is leased, and the present share up to the greatest nonce."""
        while self.leases:
            await self.complete(0)
        due = set(self.node.nonces(Span(0, 1 + max(self.committed, default=0))))
        while not due <= self.committed:
            await self.lease(50)
            await self.complete(0)


# The end of the nonces

LARGEST = SCHEMES["artifacts"].largest_nonce
LAST = LARGEST // NODE.count  # the last position of this node, which is id 1 of 3: nonce 2**31 - 1


async def test_no_nonce_is_leased_that_the_scheme_lacks(miner: Miner, outbox: OutboxThread) -> None:
    """What comes back is leased again; a round that follows is mined."""
    round_ = dataclasses.replace(VECTORS, scheme="artifacts")
    work = Work(round_, NODE)
    await outbox(Outbox.begin_round, work, NOW)
    await outbox(lambda store: store.db.execute("UPDATE progress SET cursor = ?", (LAST - 2,)))
    await miner.set_round(work)
    lease = await miner.lease(8)
    assert (lease.span.start, lease.nonces) == (LAST - 2, [LARGEST - 6, LARGEST - 3, LARGEST])
    assert not miner.is_done, "it is leased"
    waiting = asyncio.create_task(miner.lease(8))
    await let_all_run(outbox)
    assert not waiting.done()
    miner.give_back(lease)
    await complete(miner, await soon(waiting))
    assert miner.is_done
    waiting = asyncio.create_task(miner.lease(8))
    await let_all_run(outbox)
    assert not waiting.done()
    await miner.set_round(Work(NEXT, NODE))
    assert (await soon(waiting)).mining.round == NEXT
    assert not miner.is_done


async def test_the_last_nonces_are_tried_once_more_where_they_had_no_result(miner: Miner, outbox: OutboxThread) -> None:
    await miner.set_round(Work(ROUND, NODE))
    assert miner.mining is not None
    miner.mining.ledger = Ledger(Progress(), size=2)
    miner.refuse(await miner.lease(2))
    assert miner.is_done
    waiting = asyncio.create_task(miner.lease(2))
    await let_all_run(outbox)
    assert not waiting.done()
    miner.retry_refused()
    assert (await soon(waiting)).span == Span(0, 2)


# Stopping by hand


async def test_while_paused_nothing_is_lent_and_what_was_lent_still_commits(miner: Miner, outbox: OutboxThread) -> None:
    await miner.set_round(Work(ROUND, NODE))
    lease = await miner.lease(2)
    replaced = asyncio.create_task(miner.until_replaced(lease.mining))
    miner.pause(paused=True)
    await soon(replaced)
    assert miner.current is None
    waiting = asyncio.create_task(miner.lease(2))
    await complete(miner, lease)
    await let_all_run(outbox)
    assert not waiting.done()
    miner.pause(paused=False)
    assert (await soon(waiting)).span == Span(2, 4)


async def test_a_round_that_begins_while_paused_is_taken_up_at_resume(miner: Miner) -> None:
    await miner.set_round(Work(ROUND, NODE))
    miner.pause(paused=True)
    await miner.set_round(Work(NEXT, NODE))
    assert miner.current is None
    miner.pause(paused=False)
    assert (await miner.lease(1)).mining.round == NEXT


# Closing


async def test_close_waits_for_every_lease_and_lends_no_more(miner: Miner, outbox: OutboxThread) -> None:
    await miner.set_round(Work(ROUND, NODE))
    first, second = await miner.lease(2), await miner.lease(2)
    closing_ = asyncio.create_task(miner.close(3600))
    late = asyncio.create_task(miner.lease(2))
    await complete(miner, first)
    await let_all_run(outbox)
    assert not closing_.done()
    miner.give_back(second)
    await soon(closing_)
    await let_all_run(outbox)
    assert not late.done()
    late.cancel()
    assert await progress(outbox) == Progress(2)


async def test_close_with_nothing_lent_returns(miner: Miner) -> None:
    await soon(miner.close(3600))


async def test_close_gives_up_after_its_limit_and_what_was_lent_is_checked_again(path: Path) -> None:
    with closing(OutboxThread(path)) as outbox:
        miner = open_miner(outbox)
        await miner.set_round(Work(ROUND, NODE))
        lease = await miner.lease(2)
        await soon(miner.close(0.01))
    with closing(OutboxThread(path)) as outbox:
        miner = open_miner(outbox)
        await miner.set_round(Work(ROUND, NODE))
        assert (await miner.lease(2)).span == lease.span
