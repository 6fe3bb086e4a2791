"""Delivery to several receivers, across restarts, and while the store takes nothing; what is kept of an answer."""

import asyncio
import base64
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web

from pocd.store.deliveries import record_delivered
from pocd.store.outbox import Queue
from tests.support.clocks import NOW
from tests.support.delivering import Bench, Server, expected, prepared, running, sent, talking
from tests.support.waiting import PATIENCE, soon, until


async def test_a_dead_receiver_does_not_delay_another(bench: Bench, server: Server) -> None:
    asked = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()

    batches = await bench.store(5, "dead", "alive")
    async with talking(talk) as url:
        dead, alive = bench.dispatcher(url, "dead"), bench.dispatcher(server.url, "alive")
        async with running(dead):
            await soon(asked.wait())
            async with running(alive):
                assert sent(await server.take(5)) == expected(batches)
                await soon(alive.settled.wait())
            assert not dead.settled.is_set()
    queues = bench.outbox.view.queues
    assert queues["alive"] == Queue(delivered_batches=5, delivered_nonces=10)
    assert queues["dead"] == Queue(pending_batches=5, pending_nonces=10)
    assert bench.outbox.view.totals.delivered == 0


async def test_a_retry_goes_on_after_a_restart_where_it_stood(path: Path, server: Server) -> None:
    server.then(500, 500)
    with prepared(path) as bench:
        batches = await bench.store(2, "a")
        dispatcher = bench.dispatcher(server.url)
        async with running(dispatcher):
            await server.take(1)
            await soon(dispatcher.settled.wait())
            await bench.step(dispatcher)
            await server.take(1)

    with prepared(path) as again:
        assert again.receiver().failures == 2
        assert again.receiver().next_at == NOW + 3
        assert await again.faults() == [2, 0]
        again.clock.advance(NOW + 2.9 - again.clock.now)
        dispatcher = again.dispatcher(server.url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
            assert server.requests.empty(), "its time has not come"
            again.clock.advance(NOW + 3 - again.clock.now)
            dispatcher.wake()
            assert sent(await server.take(2)) == expected(batches)


async def test_an_attempt_that_was_cut_off_is_made_again(bench: Bench, server: Server) -> None:
    asked = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()

    batches = await bench.store(1, "a")
    async with talking(talk) as url, running(bench.dispatcher(url)):
        await soon(asked.wait())
    async with running(bench.dispatcher(server.url)):
        assert sent(await server.take(1)) == expected(batches)


FULL = """
CREATE TEMP TRIGGER large_writes AFTER UPDATE OF changed_at ON deliveries
BEGIN INSERT OR REPLACE INTO meta VALUES ('ballast', hex(zeroblob(100000))); END"""


async def test_a_batch_is_not_sent_again_while_the_full_disk_does_not_take_that_it_was_accepted(
    bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = asyncio.Queue[None]()
    loop = asyncio.get_running_loop()

    def watched(*arguments: Any) -> None:  # noqa: ANN401 - passed on
        loop.call_soon_threadsafe(tries.put_nowait, None)
        record_delivered(*arguments)

    monkeypatch.setattr("pocd.store.deliveries.record_delivered", watched)
    monkeypatch.setattr("pocd.store.thread.AGAIN_SECONDS", 0.001)
    batches = await bench.store(2, "a")
    db = bench.outbox.view.db
    (pages,) = await bench.outbox(lambda _: db.execute("PRAGMA page_count").fetchone())
    await bench.outbox(lambda _: db.execute(FULL))
    await bench.outbox(lambda _: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())

    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        assert sent(await server.take(1)) == expected(batches[:1])
        for _ in range(5):
            await soon(tries.get())
        dispatcher.wake()
        assert await bench.states() == ["pending", "pending"]
        assert server.requests.empty()

        await bench.outbox(lambda _: db.execute(f"PRAGMA max_page_count = {10 * pages + 100}").fetchone())
        assert sent(await server.take(1)) == expected(batches[1:])
        await soon(dispatcher.settled.wait())
    assert await bench.states() == ["delivered", "delivered"]
    assert server.requests.empty()


async def test_what_was_accepted_is_recorded_though_the_daemon_stops_and_the_store_is_busy(
    bench: Bench, server: Server
) -> None:
    busy, may_go_on = threading.Event(), threading.Event()
    executor = bench.outbox._executor

    def work() -> None:
        busy.set()
        assert may_go_on.wait(PATIENCE)

    async def handle(_: web.Request) -> web.Response:
        executor.submit(work)
        await asyncio.to_thread(busy.wait)
        return web.Response()

    server.handle = handle
    await bench.store(1, "a")
    async with running(bench.dispatcher(server.url)):
        await soon(asyncio.to_thread(busy.wait))
        await until(executor._work_queue.qsize)  # the record waits for its turn
    may_go_on.set()
    assert await bench.states() == ["delivered"]


async def test_an_answer_is_read_for_its_beginning_only(bench: Bench, server: Server) -> None:
    await bench.store(1, "a")
    server.answers.append(partial(web.Response, status=400, body=b"x" * 2**20))
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await soon(dispatcher.settled.wait())
    (dead,) = await bench.deliveries()
    assert dead.reason == "HTTP 400: " + "x" * 200 + "…"


async def test_the_url_of_a_parked_receiver_is_stored_without_its_credentials(bench: Bench, server: Server) -> None:
    await bench.store(1, "a")
    server.then(410)
    dispatcher = bench.dispatcher(server.url.replace("http://", "http://user:hunter2@"))
    async with running(dispatcher):
        await server.take(1)
        await soon(dispatcher.settled.wait())
    assert bench.receiver().parked_url == server.url.replace("http://", "http://***@")


async def test_a_receiver_that_sends_back_the_request_tells_nobody_its_credentials(
    bench: Bench, server: Server
) -> None:
    """As debugging services do. What is shown of an answer is shown without what was sent in confidence."""
    await bench.store(1, "a")
    url = server.url.replace("http://", "http://user:hunter%402@")
    sent_along = base64.b64encode(b"user:hunter@2").decode()

    def echo() -> web.Response:
        return web.Response(status=400, text=f"you sent Basic {sent_along}, user:hunter@2 or hunter%402")

    server.answers.append(echo)
    with structlog.testing.capture_logs() as logs:
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            (request,) = await server.take(1)
            await soon(dispatcher.settled.wait())
    assert request.headers["authorization"] == f"Basic {sent_along}"
    (delivery,) = await bench.deliveries()
    assert delivery.reason == "HTTP 400: you sent Basic ***, *** or ***"
    assert not [secret for secret in ("hunter", sent_along) if secret in repr(logs)]


async def test_what_nobody_foresaw_is_a_failure_like_any_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver must not be able to end the daemon, whatever it makes the client library raise."""
    await bench.store(1, "a")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug in a parser")

    monkeypatch.setattr("aiohttp.ClientSession.post", fail)
    dispatcher = bench.dispatcher("http://127.0.0.1:1")
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert dispatcher.state.error == "unforeseen RuntimeError: a bug in a parser"
    assert [entry["action"] for entry in logs] == ["delivery_bug", "delivery_retry"]


async def test_a_redirect_says_where_to_without_its_secrets(bench: Bench, server: Server) -> None:
    await bench.store(1, "a")
    location = {"Location": "https://user:hunter2@elsewhere.example/generated?key=hunter2"}
    server.answers.append(partial(web.Response, status=307, headers=location))
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await soon(dispatcher.settled.wait())
    assert dispatcher.state.error == "HTTP 307 to https://***@elsewhere.example/generated?key=***, not followed"
