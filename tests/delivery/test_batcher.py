"""Batches are formed when they are full, old enough, or their round is over: a real miner, store and receiver."""

import asyncio
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from pocd.delivery import batcher
from pocd.delivery.batcher import Batcher
from pocd.delivery.dispatcher import Dispatcher
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.store.batches import Formed, form_batches
from pocd.store.deliveries import PendingDelivery
from pocd.store.outbox import Work
from pocd.store.rounds import replace_round
from tests.support.clocks import NEXT, NOW, ROUND
from tests.support.delivering import (
    NODE,
    WEIGHTS,
    Bench,
    Request,
    Server,
    events,
    running,
)
from tests.support.waiting import soon


@dataclass(frozen=True, slots=True)
class Mine:
    """A miner, and the batcher between it and one receiver."""

    miner: Miner
    dispatcher: Dispatcher
    batcher: Batcher

    async def find(self, count: int) -> None:
        """Check `count` nonces, all of them valid."""
        lease = await self.miner.lease(count)
        await self.miner.complete(lease, [1.0] * len(lease.span), WEIGHTS)


def mine(bench: Bench, url: str, *, size: int, age: float, withdraw: bool = True, jitter: float = 1.0) -> Mine:
    miner = Miner(bench.outbox, Changes(), clock=bench.clock, group_seconds=0)
    dispatchers = bench.dispatchers(url)
    batcher = Batcher(
        miner,
        bench.outbox,
        dispatchers,
        size=size,
        age=age,
        withdraw=withdraw,
        clock=bench.clock,
        jitter=lambda: jitter,
        events=events(),
    )
    (dispatcher,) = dispatchers
    return Mine(miner, dispatcher, batcher)


def nonces(message: Request | PendingDelivery) -> list[int]:
    found = orjson.loads(message.body)["nonces"]
    assert isinstance(found, list)
    return found


async def test_a_batch_goes_out_when_it_is_full(bench: Bench, server: Server) -> None:
    one = mine(bench, server.url, size=3, age=1e6)
    await one.miner.set_round(Work(ROUND, NODE))
    async with running(one.dispatcher, one.batcher):
        await one.find(2)
        await one.find(5)
        assert [nonces(request) for request in await server.take(2)] == [[0, 1, 2], [3, 4, 5]]
        await soon(one.dispatcher.settled.wait())
    assert server.requests.empty()
    assert bench.outbox.view.totals.stored == 6


async def test_what_one_forming_leaves_is_formed_next(
    bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocd.store.batches.MOST_BATCHES", 1)
    one = mine(bench, server.url, size=2, age=1e6)
    await one.miner.set_round(Work(ROUND, NODE))
    await one.find(6)
    async with running(one.dispatcher, one.batcher):
        assert [nonces(request) for request in await server.take(3)] == [[0, 1], [2, 3], [4, 5]]


async def test_a_batch_is_formed_when_it_is_old_enough(bench: Bench) -> None:
    one = mine(bench, "http://127.0.0.1:1", size=100, age=5.0)
    await one.miner.set_round(Work(ROUND, NODE))
    await one.find(2)
    bench.clock.now += 4.5
    assert await one.batcher.form() == NOW + 5
    assert await bench.head() is None
    bench.clock.now += 0.5
    assert await one.batcher.form() is None
    assert [nonces(batch) for batch in [await bench.head()] if batch] == [[0, 1]]


async def test_hosts_that_begin_a_round_together_do_not_send_together(bench: Bench) -> None:
    one = mine(bench, "http://127.0.0.1:1", size=100, age=5.0, jitter=-0.2)
    for round_ in (ROUND, NEXT):
        began = bench.clock.now
        await one.miner.set_round(Work(round_, NODE))
        await one.find(2)
        assert await one.batcher.form() == began + 2, "the first batch of a round; what is left of another is no reason"
        await one.find(1)
        assert await one.batcher.form() == began + 2
        bench.clock.now += 2
        assert await one.batcher.form() is None
        await one.find(1)
        assert await one.batcher.form() == bench.clock.now + 5, "a later one"


async def test_a_batch_that_grows_old_goes_out_with_nobody_to_ask_for_it(bench: Bench, server: Server) -> None:
    bench.clock.tick = 0.001
    one = mine(bench, server.url, size=100, age=0.02)
    await one.miner.set_round(Work(ROUND, NODE))
    async with running(one.dispatcher, one.batcher):
        await one.find(2)
        (request,) = await server.take(1)
    assert nonces(request) == [0, 1]


@pytest.mark.parametrize("following", [Work(NEXT, NODE), None], ids=["next", "none"])
async def test_what_is_left_of_a_round_goes_out_when_it_is_over(
    bench: Bench, server: Server, following: Work | None
) -> None:
    one = mine(bench, server.url, size=100, age=1e6)
    await one.miner.set_round(Work(ROUND, NODE))
    async with running(one.dispatcher, one.batcher):
        await one.find(2)
        await one.miner.set_round(following)
        (request,) = await server.take(1)
    assert nonces(request) == [0, 1]
    assert orjson.loads(request.body)["block_hash"] == ROUND.block_hash


async def test_a_late_result_of_a_round_that_is_over_goes_out_at_once(bench: Bench, server: Server) -> None:
    one = mine(bench, server.url, size=100, age=1e6)
    await one.miner.set_round(Work(ROUND, NODE))
    lease = await one.miner.lease(2)
    await one.miner.set_round(Work(NEXT, NODE))
    async with running(one.dispatcher, one.batcher):
        await soon(one.dispatcher.settled.wait())
        await one.miner.complete(lease, [1.0, 1.0], WEIGHTS)
        (request,) = await server.take(1)
    assert nonces(request) == [0, 1]


@pytest.mark.parametrize("how", ["pause", "close"])
async def test_stopping_sends_what_is_left(bench: Bench, server: Server, how: str) -> None:
    one = mine(bench, server.url, size=100, age=1e6)
    await one.miner.set_round(Work(ROUND, NODE))
    async with running(one.dispatcher, one.batcher):
        await one.find(2)
        if how == "close":
            await one.miner.close(1.0)
        else:
            one.miner.pause(paused=True)
        (request,) = await server.take(1)
    assert nonces(request) == [0, 1]


async def test_while_the_store_takes_nothing_the_batcher_waits_and_tries_again(
    bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = asyncio.Queue[None]()
    loop = asyncio.get_running_loop()

    def watched(*arguments: Any, **names: Any) -> Formed:  # noqa: ANN401 - passed on
        loop.call_soon_threadsafe(tries.put_nowait, None)
        return form_batches(*arguments, **names)

    monkeypatch.setattr(batcher, "form_batches", watched)
    bench.clock.tick = 0.001
    one = mine(bench, server.url, size=2, age=0.02)
    await one.miner.set_round(Work(ROUND, NODE))
    await one.find(2)
    db = bench.outbox.view.db
    await bench.outbox(lambda _: db.execute("PRAGMA query_only = ON"))
    async with running(one.dispatcher, one.batcher):
        for _ in range(3):
            await soon(tries.get())
        assert await bench.states() == []
        await bench.outbox(lambda _: db.execute("PRAGMA query_only = OFF"))
        (request,) = await server.take(1)
    assert nonces(request) == [0, 1]


@pytest.mark.parametrize("withdraw", [True, False])
async def test_what_a_replaced_round_found_is_withdrawn_as_soon_as_it_is_formed(
    bench: Bench,
    server: Server,
    withdraw: bool,  # noqa: FBT001 - a parameter of the cases
) -> None:
    one = mine(bench, server.url, size=2, age=1e6, withdraw=withdraw)
    await one.miner.set_round(Work(ROUND, NODE))
    await one.find(2)
    await bench.outbox(replace_round, ROUND, "reorganised", withdraw=withdraw, now=NOW)
    async with running(one.dispatcher):
        await one.batcher.form()
        await soon(one.dispatcher.settled.wait())
    assert await bench.states() == ["withdrawn" if withdraw else "delivered"]
    assert server.requests.empty() == withdraw
