"""The keeper over a real store: what is pruned, what expires, when mining waits for room and when it goes on."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from pocd.clock import SteadyClock
from pocd.delivery.keeper import MIB, Keeper, StoreLimits, shortage
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs, Round
from pocd.store import deliveries, selections, upkeep
from pocd.store.batches import form_batches
from pocd.store.outbox import Outbox, Totals, Work
from pocd.store.place import copies
from pocd.store.proofs import Weights
from pocd.store.rounds import recent_rounds
from pocd.store.selections import Selection
from pocd.store.thread import OutboxThread
from tests.support.clocks import NOW, ROUND, ManualClock
from tests.support.delivering import dispatchers
from tests.support.stored import commit_span, proofs_of

WEIGHTS = Weights("f00d", "float32")
NODE = Node(0, 1)
DAY, WEEK = 86_400.0, 604_800.0
LIMITS = StoreLimits(keep_delivered=DAY, expire_after=WEEK, size=100 * MIB, free=50 * MIB)


@pytest.fixture
def outbox(path: Path) -> Iterator[OutboxThread]:
    with closing(OutboxThread(path)) as thread:
        yield thread


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


class Room:
    """How much the disk has free, as the test says."""

    def __init__(self) -> None:
        self.free = 1000 * MIB

    def __call__(self, folder: Path) -> int:
        assert folder.is_dir()
        return self.free


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.fixture
def miner(outbox: OutboxThread, clock: ManualClock) -> Miner:
    return Miner(outbox, Changes(), clock=clock, group_seconds=0)


@pytest.fixture
def keeper(path: Path, outbox: OutboxThread, miner: Miner, clock: ManualClock, room: Room) -> Keeper:
    return made(path, outbox, miner, clock, room)


def made(
    path: Path, outbox: OutboxThread, miner: Miner, clock: ManualClock, room: Room, limits: StoreLimits = LIMITS
) -> Keeper:
    log = structlog.get_logger()
    return Keeper(
        path, outbox, miner, dispatchers(outbox), limits=limits, clock=SteadyClock(clock), log=log, free_bytes=room
    )


async def store(outbox: OutboxThread, *receivers: str, now: float = NOW, nonces: int = 1) -> None:
    """Store one more batch, of as many proofs, for the receivers."""

    def write(opened: Outbox) -> None:
        start = opened.begin_round(Work(ROUND, NODE), now).checked
        span = Span(start, start + nonces)
        proofs = Proofs.of_distances((nonce, 0.5 + nonce * 0.61803398874989 % 1) for nonce in NODE.nonces(span))
        commit_span(opened, ROUND, NODE, span, proofs, WEIGHTS, now)
        form_batches(opened, receivers, size=nonces, age=0.0, now=now, current=ROUND)

    await outbox(write)


async def states(outbox: OutboxThread) -> list[str]:
    def read(opened: Outbox) -> list[str]:
        return [state for (state,) in opened.db.execute("SELECT state FROM deliveries ORDER BY receiver, sequence")]

    return await outbox(read)


async def test_what_was_delivered_is_pruned_a_day_after_its_last_receiver_had_it(
    outbox: OutboxThread, keeper: Keeper, clock: ManualClock
) -> None:
    await store(outbox, "a", "b")
    await outbox(deliveries.record_delivered, "a", 1, NOW)
    clock.advance(3 * DAY)
    await keeper.look()
    assert await states(outbox) == ["delivered", "pending"]
    await outbox(deliveries.record_delivered, "b", 1, clock.now)
    clock.advance(DAY - 1)
    await keeper.look()
    assert await states(outbox) == ["delivered", "delivered"]
    clock.advance(2)
    await keeper.look()
    assert await states(outbox) == []
    assert outbox.view.totals == Totals(checked=1, valid=1, stored=1, delivered=1)
    assert outbox.view.queues["a"].delivered_batches == 1


async def test_what_was_set_aside_is_kept_for_ever(outbox: OutboxThread, keeper: Keeper, clock: ManualClock) -> None:
    await store(outbox, "a")
    await outbox(deliveries.record_set_aside, "a", 1, "refused", NOW)
    clock.advance(1000 * DAY)
    await keeper.look()
    assert await states(outbox) == ["dead"]


async def test_queues_that_nobody_serves_expire_by_age_and_are_kept(
    outbox: OutboxThread, keeper: Keeper, clock: ManualClock
) -> None:
    await store(outbox, "gone")
    clock.advance(WEEK - 1)
    await store(outbox, "gone", now=clock.now)
    await keeper.look()
    assert await states(outbox) == ["pending", "pending"]
    clock.advance(2)
    with capture_logs() as logs:
        await keeper.look()
    assert await states(outbox) == ["expired", "pending"]
    assert [(entry["action"], entry["batches"]) for entry in logs] == [("expired", 1)]
    (delivery,) = await outbox(selections.listed, Selection(("expired",)), after=("", 0), limit=10)
    assert delivery.reason == "never sent"


async def test_a_backlog_is_pruned_and_expired_whole(
    outbox: OutboxThread, keeper: Keeper, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "CHUNK", 2)
    monkeypatch.setattr(upkeep, "PRUNED_BATCHES", 2)
    for _ in range(5):
        await store(outbox, "gone")
    clock.advance(2 * WEEK)
    await keeper.look()
    assert await states(outbox) == ["expired"] * 5
    for batch in range(1, 6):
        await outbox(deliveries.record_delivered, "gone", batch, clock.now)
    clock.advance(2 * DAY)
    await keeper.look()
    assert await states(outbox) == []


async def test_rounds_long_past_are_forgotten_but_not_what_they_found(
    outbox: OutboxThread, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "KEPT_ROUNDS", 2)
    await store(outbox, "a")  # of round 10, and pending
    waiting = Round("AB", 9, "miner", 1.4, "poc2", "tiny", 16)
    await outbox(Outbox.begin_round, Work(waiting, NODE), NOW)
    proofs = proofs_of(waiting, [0])
    await outbox(commit_span, waiting, NODE, Span(0, 1), proofs, WEIGHTS, NOW)  # in no batch yet
    for height in range(11, 16):
        round_ = Round("AB", height, "miner", 1.4, "poc2", "tiny", 16)
        await outbox(Outbox.begin_round, Work(round_, NODE), NOW)
    await keeper.look()
    found = await outbox(recent_rounds, 100)
    assert [round_.block_height for round_ in found] == [15, 14, 10, 9]


async def test_the_file_does_not_grow_for_ever(
    path: Path, outbox: OutboxThread, keeper: Keeper, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "KEPT_ROUNDS", 5)

    def write(opened: Outbox, height: int) -> None:
        """A round of its own, mined, batched and delivered."""
        round_ = Round("AB", height, "miner", 1.4, "poc2", "tiny", 16)
        opened.begin_round(Work(round_, NODE), clock.now)
        span = Span(0, 3000)
        commit_span(opened, round_, NODE, span, proofs_of(round_, NODE.nonces(span)), WEIGHTS, clock.now)
        form_batches(opened, ["a", "b"], size=1000, age=0.0, now=clock.now, current=None)
        for name in ("a", "b"):
            while head := deliveries.next_pending(opened, name):
                deliveries.record_delivered(opened, name, head.batch, clock.now)

    sizes = []
    for height in range(1, 41):
        await outbox(write, height)
        clock.advance(DAY / 2)
        await keeper.look()
        sizes.append(sum(file.stat().st_size for file in path.parent.iterdir()))
    assert max(sizes[20:]) <= 1.05 * max(sizes[:20])
    assert outbox.view.totals == Totals(checked=120_000, valid=120_000, stored=120_000, delivered=120_000)


# Room


async def test_a_disk_that_runs_full_holds_mining_until_there_is_room_to_spare(
    keeper: Keeper, miner: Miner, room: Room
) -> None:
    await miner.set_round(Work(ROUND, NODE))
    room.free = 50 * MIB - 1
    with capture_logs() as logs:
        await keeper.look()
        assert miner.current is None
        assert miner.held is not None
        assert "store.free_space_mib is 50" in miner.held
        room.free = 51 * MIB
        await keeper.look()
        assert miner.current is None, "not at the limit itself, or it would flutter"
        room.free = 53 * MIB
        await keeper.look()
    assert miner.current is not None
    assert [entry["action"] for entry in logs] == ["store_held", "store_released"]


async def test_a_full_store_gives_up_its_history_first_then_holds_mining(
    path: Path, outbox: OutboxThread, miner: Miner, clock: ManualClock, room: Room
) -> None:
    await store(outbox, "a", nonces=30_000)
    await store(outbox, "a", nonces=30_000)
    used = await outbox(upkeep.used_bytes)
    limits = StoreLimits(keep_delivered=DAY, expire_after=WEEK, size=used * 3 // 4, free=0)
    keeper = made(path, outbox, miner, clock, room, limits)
    await miner.set_round(Work(ROUND, NODE))
    await keeper.look()
    assert miner.held is not None
    assert "store.size_limit_mib" in miner.held
    assert "pocd outbox purge" in miner.held
    await outbox(deliveries.record_delivered, "a", 1, NOW)
    with capture_logs() as logs:
        await keeper.look()
    assert miner.held is None
    assert await states(outbox) == ["pending"]
    assert [entry["action"] for entry in logs] == ["pruned_early", "store_released"]


async def test_a_store_that_takes_nothing_holds_mining_and_goes_on_by_itself(
    outbox: OutboxThread, keeper: Keeper, miner: Miner
) -> None:
    """A real SQLite error, by a limit on the file's pages."""

    def limit(opened: Outbox, pages: int | None) -> None:
        (now,) = opened.db.execute("PRAGMA page_count").fetchone()
        opened.db.execute(f"PRAGMA max_page_count = {now if pages is None else pages}")

    await miner.set_round(Work(ROUND, NODE))
    lease = await miner.lease(20_000)
    await outbox(limit, None)
    await miner.complete(lease, [1.0] * 20_000, WEIGHTS)
    assert miner.held is not None
    assert "full" in miner.held
    assert miner.mining is not None
    assert (miner.mining.checked, outbox.view.totals) == (0, Totals())
    await keeper.look()
    assert miner.held is not None, "a mebibyte does not fit either"
    await outbox(limit, 2**30)
    miner.hold("the disk is full")
    with capture_logs() as logs:
        await keeper.look()
    assert miner.held is None
    assert [entry["action"] for entry in logs] == ["store_released"]
    again = await miner.lease(20_000)
    assert again.span == lease.span
    await miner.complete(again, [1.0] * 20_000, WEIGHTS)
    assert outbox.view.totals == Totals(checked=20_000, valid=20_000)


async def test_a_hold_that_is_over_at_the_next_look_is_told_all_the_same(keeper: Keeper, miner: Miner) -> None:
    miner.hold("the disk is full")
    with capture_logs() as logs:
        await keeper.look()
    assert miner.held is None
    assert [(entry["action"], entry.get("cause")) for entry in logs] == [
        ("store_held", "the disk is full"),
        ("store_released", None),
    ]


@pytest.mark.parametrize(
    ("used", "free", "held", "waits"),
    [
        (100, 50, False, None),
        (101, 50, False, "size_limit_mib"),
        (100, 49, False, "free_space_mib"),
        (96, 500, True, "size_limit_mib"),
        (95, 500, True, None),
        (0, 52, True, "free_space_mib"),
        (0, 53, True, None),
    ],
)
def test_shortage(used: int, free: int, held: bool, waits: str | None) -> None:  # noqa: FBT001 - a parameter of the cases
    reason = shortage(used * MIB, free * MIB, LIMITS, held=held)
    assert reason is None if waits is None else reason is not None and waits in reason


# Clocks


async def test_a_clock_that_is_set_back_neither_keeps_things_for_ever_nor_loses_them(
    outbox: OutboxThread, keeper: Keeper, clock: ManualClock
) -> None:
    clock.advance(1000 * DAY)  # a wrong clock, at which a batch is stored
    await keeper.look()
    await store(outbox, "gone", now=clock.now)
    clock.now = NOW
    with capture_logs() as logs:
        await keeper.look()
    assert [(entry["action"], entry["seconds"]) for entry in logs] == [("clock_jump", -1000 * DAY)]
    clock.advance(WEEK + 1)
    await keeper.look()
    assert await states(outbox) == ["expired"], "a week after the clock was set, not three years"


async def test_a_clock_that_was_set_back_while_the_daemon_was_off_is_seen_at_the_start(
    outbox: OutboxThread, keeper: Keeper, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store(outbox, "gone", now=NOW + 1000 * DAY)
    looked = asyncio.Event()

    def free(_: Path) -> int:
        looked.set()
        return 1000 * MIB

    monkeypatch.setattr(keeper, "_free_bytes", free)
    running = asyncio.create_task(keeper.run())
    await looked.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    clock.advance(WEEK)
    await keeper.look()
    assert await states(outbox) == ["expired"]


@pytest.mark.parametrize("jump", [50 * 365 * DAY, 9 * DAY, -DAY])
async def test_what_waits_is_no_older_and_no_younger_when_the_clock_is_set(
    outbox: OutboxThread, keeper: Keeper, clock: ManualClock, jump: float
) -> None:
    await store(outbox, "gone")
    await outbox(deliveries.record_failed, "gone", 1, "HTTP 429", fault=False, next_at=NOW + 25.0)
    clock.advance(WEEK - 10)
    clock.now += jump
    await keeper.look()
    assert await states(outbox) == ["pending"], "a week has not passed"
    assert outbox.view.receivers["gone"].next_at == pytest.approx(NOW + jump + 25.0)
    clock.advance(11)
    await keeper.look()
    assert await states(outbox) == ["expired"]


async def test_a_clock_that_is_wrong_for_some_seconds_changes_nothing(
    outbox: OutboxThread, keeper: Keeper, clock: ManualClock
) -> None:
    await store(outbox, "gone")
    for jump in (8 * DAY, -8 * DAY):
        clock.now += jump
        await keeper.look()
        clock.advance(6.0)
    (delivery,) = await outbox(selections.listed, Selection(("pending",)), after=("", 0), limit=2)
    assert delivery.changed_at == pytest.approx(NOW)


def test_a_steady_clock_passes_as_time_does_until_it_follows() -> None:
    source = ManualClock()
    clock = SteadyClock(source)
    source.advance(10.0)
    source.now += 3600
    assert (clock.wall(), clock.monotonic()) == (NOW + 10, 110.0)
    assert clock.follow() == 3600
    assert clock.wall() == NOW + 3610


def test_a_jump_is_told_once_and_steering_is_none() -> None:
    source = ManualClock()
    clock = SteadyClock(source)
    source.advance(100.0)
    assert clock.follow() == 0
    source.now += 0.5
    assert clock.follow() == 0
    assert clock.wall() == source.now, "it is steered as well"
    source.now -= 3600
    source.advance(10.0)
    assert clock.follow() == -3600
    assert clock.follow() == 0
    source.now += 7200
    assert clock.follow() == 7200


async def test_a_callback_url_that_nothing_names_any_more_ends_at_the_next_look(
    outbox: OutboxThread, keeper: Keeper
) -> None:
    work = Work(ROUND, NODE, by_chain=False, callback="callback-1", callback_url="http://127.0.0.1:1/one")
    await outbox(Outbox.begin_round, work, NOW)
    assert "callback-1" in outbox.view.receivers
    await keeper.look()
    assert "callback-1" not in outbox.view.receivers


# A store that is taken away


async def test_what_is_in_use_is_copied_when_its_file_is_taken_away_until_it_is_back(
    path: Path, outbox: OutboxThread, keeper: Keeper, miner: Miner
) -> None:
    await store(outbox, "a")
    away = path.with_name("away.db")
    path.rename(away)
    miner.hold("a commit failed, before the keeper looked")
    with capture_logs() as logs:
        await keeper.look()
    (copy,) = copies(path)
    assert f"pocd outbox restore {copy}" in logs[0]["cause"]
    assert f"pocd outbox restore {copy}" in (miner.held or "")
    away.rename(path)
    await keeper.look()
    assert miner.held is None
    assert copies(path) == []
