"""Receivers that come with a callback URL: which may, how many, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from pocd.delivery.posting import Receiver
from pocd.delivery.receivers import MOST_CALLBACKS, CallbackError, callback_name
from pocd.protocol.nonces import Span
from pocd.protocol.proof import Proof
from pocd.store import deliveries
from pocd.store.batches import form_batches
from pocd.store.outbox import Outbox, Work
from tests.support.clocks import NOW, ROUND
from tests.support.delivering import NODE, WEIGHTS, Bench, Server, dispatchers
from tests.support.waiting import soon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pocd.delivery.receivers import Receivers


def over(bench: Bench, *urls: str, origins: tuple[str, ...] = ()) -> Receivers:
    """Receivers for receivers of the configuration, named a, b, …"""
    receivers = [Receiver(name, url, None) for name, url in zip("abc", urls, strict=False)]
    return dispatchers(
        bench.outbox, receivers, lambda receiver: bench.dispatcher(receiver.url, receiver.name), origins=origins
    )


@contextlib.asynccontextmanager
async def running(each: Receivers, callback: str | None = None) -> AsyncIterator[None]:
    task = asyncio.create_task(each.run(callback))
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def queue(bench: Bench, callback: str) -> None:
    """Put a batch into the queue of a callback URL, and of no other receiver."""

    def write(outbox: Outbox) -> None:
        done = outbox.begin_round(Work(ROUND, NODE, by_chain=False, callback=callback), NOW).progress.cursor
        outbox.commit_span(ROUND, NODE, Span(done, done + 1), [Proof(done, 1.0)], WEIGHTS, NOW)
        form_batches(outbox, [], size=1, age=0.0, now=NOW, current=None)

    await bench.outbox(write)


def served(each: Receivers) -> list[str]:
    return [dispatcher.receiver.name for dispatcher in each]


async def test_a_callback_url_is_served_from_the_call_on_and_its_queue_is_its_own(bench: Bench, server: Server) -> None:
    each = over(bench, origins=(server.url,))
    async with running(each):
        name = await each.callback(f"{server.url}/one", wanted=None)
        assert name == callback_name(f"{server.url}/one")
        await queue(bench, name)
        each.wake()
        (request,) = await server.take(1)
    assert request.path == "/one/generated"


async def test_a_url_of_the_configuration_is_that_receiver_and_no_other(bench: Bench, server: Server) -> None:
    each = over(bench, f"{server.url}/main")
    async with running(each):
        assert await each.callback(f"{server.url}/main/", wanted=None) == "a"
        assert await each.callback(f"{server.url}/beside", wanted=None) != "a"  # the same origin is a configured one
        assert len(served(each)) == 2
        # The same URL again is the same receiver.
        await each.callback(f"{server.url}/beside", wanted=None)
        assert len(served(each)) == 2
    assert each.names("a") == ["a"]
    assert each.names("callback-1") == ["a", "callback-1"]


async def test_an_origin_that_nobody_configured_is_refused_and_nothing_is_remembered(bench: Bench) -> None:
    each = over(bench, "http://127.0.0.1:1/main", origins=("https://good.example",))
    async with running(each):
        for url in ("http://good.example", "https://good.example:444", "https://good.example@evil.example", "x"):
            with pytest.raises(CallbackError, match=r"admin\.callback_origins") as refused:
                await each.callback(url, wanted=None)
            assert not refused.value.full
        assert served(each) == ["a"]
    assert set(bench.outbox.view.receivers) <= {"a"}


async def test_callback_urls_are_bounded_and_idle_ones_make_room(bench: Bench) -> None:
    origin = "http://127.0.0.1:1"
    each = over(bench, origins=(origin,))
    async with running(each):
        names = [await each.callback(f"{origin}/{number}", wanted=None) for number in range(MOST_CALLBACKS)]
        for name in names:
            await queue(bench, name)
        with pytest.raises(CallbackError, match="still have batches") as refused:
            await each.callback(f"{origin}/more", wanted=None)
        assert refused.value.full
        assert served(each) == names
        # The first has got everything, and so has the second, which is in use.
        for name in names[:2]:
            head = await bench.outbox(deliveries.next_pending, name)
            assert head is not None
            await bench.outbox(deliveries.record_delivered, name, head.batch, NOW)
        more = await each.callback(f"{origin}/more", wanted=names[1])
        assert served(each) == [*names[1:], more]


async def test_what_comes_late_for_one_that_made_room_is_sent_all_the_same(bench: Bench, server: Server) -> None:
    each = over(bench, origins=(server.url,))
    async with running(each):
        name = await each.callback(f"{server.url}/early", wanted=None)
        for number in range(MOST_CALLBACKS):
            await each.callback(f"{server.url}/{number}", wanted=None)
        assert name not in served(each)
        await queue(bench, name)
        each.wake()
        (request,) = await server.take(1)
    assert request.path == "/early/generated"


async def test_after_a_restart_those_are_served_that_have_something_to_get_or_are_in_use(
    bench: Bench, server: Server
) -> None:
    each = over(bench, origins=(server.url,))
    waiting, idle, used = [await each.callback(f"{server.url}/{path}", wanted=None) for path in ("w", "i", "u")]
    await queue(bench, waiting)
    again = over(bench, origins=(server.url,))
    async with running(again, used):
        (request,) = await server.take(1)
        assert sorted(served(again)) == sorted([waiting, used])
    assert request.path == "/w/generated"
    assert idle not in served(again)


async def test_after_a_restart_an_origin_that_is_no_longer_allowed_is_not_called_and_its_queue_is_kept(
    bench: Bench, server: Server
) -> None:
    each = over(bench, origins=(server.url,))
    name = await each.callback(f"{server.url}/one", wanted=None)
    await queue(bench, name)
    again = over(bench)
    async with running(again, name):
        await soon(bench.outbox(deliveries.next_pending, name))
        assert served(again) == []
    assert bench.outbox.view.queues[name].pending_batches == 1
    assert server.requests.empty()
