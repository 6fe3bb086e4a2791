"""Receivers that come with a callback URL: which may, how many, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import orjson
import pytest

from pocd.delivery.posting import Receiver
from pocd.delivery.receivers import MOST_CALLBACKS, MOST_KNOWN, CallbackError, callback_name
from pocd.protocol.nonces import Span
from pocd.protocol.proof import Proofs, canonical_json
from pocd.store import deliveries, selections, upkeep, validations
from pocd.store.batches import form_batches
from pocd.store.callbacks import ENDED
from pocd.store.outbox import Outbox, Work
from tests.support.clocks import NOW, ROUND
from tests.support.delivering import NODE, WEIGHTS, Bench, Server, dispatchers
from tests.support.stored import commit_span
from tests.support.waiting import soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from pocd.delivery.receivers import Receivers
    from pocd.protocol.proof import Round


def over(
    bench: Bench, *urls: str, origins: tuple[str, ...] = (), at_work: Callable[[], Sequence[str]] = list
) -> Receivers:
    """Receivers for receivers of the configuration, named a, b, …"""
    receivers = [Receiver(name, url, None) for name, url in zip("abc", urls, strict=False)]
    return dispatchers(
        bench.outbox, receivers, lambda receiver: bench.dispatcher(receiver.url, receiver.name), origins, at_work
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


async def ask(bench: Bench, callback: Receiver, round_: Round = ROUND) -> None:
    """Have a round begin whose batches `callback` is to get."""
    work = Work(round_, NODE, by_chain=False, callback=callback.name, callback_url=callback.url)
    await bench.outbox(Outbox.begin_round, work, NOW)


async def queue(bench: Bench, callback: Receiver, round_: Round = ROUND) -> None:
    """Put a batch into the queue of a callback URL, and of no other receiver."""
    await ask(bench, callback, round_)

    def write(outbox: Outbox) -> None:
        done = outbox.begin_round(Work(round_, NODE), NOW).progress.cursor
        commit_span(outbox, round_, NODE, Span(done, done + 1), Proofs.of_distances([(done, 1.0)]), WEIGHTS, NOW)
        form_batches(outbox, [], size=1, age=0.0, now=NOW, current=None)

    await bench.outbox(write)


async def accept(bench: Bench, callback: Receiver) -> None:
    """Have `callback` accept the first batch of its queue."""
    head = await bench.outbox(deliveries.next_pending, callback.name)
    assert head is not None
    await bench.outbox(deliveries.record_delivered, callback.name, head.batch, NOW)


def served(each: Receivers) -> list[str]:
    return [dispatcher.receiver.name for dispatcher in each]


async def test_a_callback_url_is_served_from_the_call_on_and_its_queue_is_its_own(bench: Bench, server: Server) -> None:
    each = over(bench, origins=(server.url,))
    async with running(each):
        receiver = await each.callback(f"{server.url}/one", wanted=None)
        assert receiver.name == callback_name(f"{server.url}/one")
        await queue(bench, receiver)
        each.wake()
        (request,) = await server.take(1)
    assert request.path == "/one/generated"


async def test_a_url_of_the_configuration_is_that_receiver_and_no_other(bench: Bench, server: Server) -> None:
    each = over(bench, f"{server.url}/main")
    async with running(each):
        assert await each.callback(f"{server.url}/main/", wanted=None) == each.configured[0]
        assert (
            await each.callback(f"{server.url}/beside", wanted=None)
        ).name != "a"  # the same origin is a configured one
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
        found = [await each.callback(f"{origin}/{number}", wanted=None) for number in range(MOST_CALLBACKS)]
        names = [receiver.name for receiver in found]
        for receiver in found:
            await queue(bench, receiver)
        with pytest.raises(CallbackError, match="still have batches") as refused:
            await each.callback(f"{origin}/more", wanted=None)
        assert refused.value.full
        assert served(each) == names
        # The first has got everything, and so has the second, which is in use.
        for receiver in found[:2]:
            await accept(bench, receiver)
        more = await each.callback(f"{origin}/more", wanted=names[1])
        assert served(each) == [*names[1:], more.name]


async def test_what_comes_late_for_one_that_made_room_is_sent_all_the_same(bench: Bench, server: Server) -> None:
    each = over(bench, origins=(server.url,))
    async with running(each):
        receiver = await each.callback(f"{server.url}/early", wanted=None)
        for number in range(MOST_CALLBACKS):
            await each.callback(f"{server.url}/{number}", wanted=None)
        assert receiver.name not in served(each)
        await queue(bench, receiver)
        each.wake()
        (request,) = await server.take(1)
    assert request.path == "/early/generated"


async def test_after_a_restart_those_are_served_that_have_something_to_get_or_are_in_use(
    bench: Bench, server: Server
) -> None:
    each = over(bench, origins=(server.url,))
    waiting, idle, used = [await each.callback(f"{server.url}/{path}", wanted=None) for path in ("w", "i", "u")]
    await queue(bench, waiting)
    for receiver in (idle, used):
        await ask(bench, receiver)
    again = over(bench, origins=(server.url,))
    async with running(again, used.name):
        (request,) = await server.take(1)
        assert sorted(served(again)) == sorted([waiting.name, used.name])
    assert request.path == "/w/generated"


async def test_after_a_restart_an_origin_that_is_no_longer_allowed_is_not_called_and_its_queue_is_kept(
    bench: Bench, server: Server
) -> None:
    each = over(bench, origins=(server.url,))
    receiver = await each.callback(f"{server.url}/one", wanted=None)
    await queue(bench, receiver)
    again = over(bench)
    async with running(again, receiver.name):
        await soon(bench.outbox(deliveries.next_pending, receiver.name))
        assert served(again) == []
    assert bench.outbox.view.queues[receiver.name].pending_batches == 1
    assert server.requests.empty()


def rounds(number: int) -> Round:
    return replace(ROUND, block_hash=f"H{number}")


async def test_callback_urls_that_have_got_everything_leave_nothing_but_a_count(bench: Bench, server: Server) -> None:
    each, view = over(bench, f"{server.url}/main", origins=(server.url,)), bench.outbox.view
    async with running(each):
        for number in range(MOST_KNOWN + 20):
            receiver = await each.callback(f"{server.url}/rounds/{number}", wanted=None)
            await queue(bench, receiver, rounds(number))
            each.wake()
            (request,) = await server.take(1)
            assert request.path == f"/rounds/{number}/generated"
            await until(lambda: not any(queue.pending_batches for queue in view.queues.values()))
            assert len(view.receivers) <= MOST_KNOWN
            assert len(served(each)) <= 1 + MOST_CALLBACKS
        await each.end_idle()
        assert served(each) == ["a"]
        await until(  # those that were delivering are cancelled, and end in their own time
            lambda: not any(task.get_name().startswith("receiver callback-") for task in asyncio.all_tasks())
        )
    assert view.receivers == {}
    assert set(view.queues) == {ENDED}
    assert view.queues[ENDED].delivered_batches == view.totals.delivered == MOST_KNOWN + 20


async def test_a_callback_url_ends_only_when_nothing_can_come_for_it(bench: Bench) -> None:
    checking: list[str] = []
    each = over(bench, origins=("http://127.0.0.1:1",), at_work=lambda: checking)
    receiver = await each.callback("http://127.0.0.1:1/one", wanted=None)
    asked = {"mode": "READY", "asked": {"callback": receiver.name}}
    work = Work(ROUND, NODE, by_chain=False, callback=receiver.name, callback_url=receiver.url)
    name = receiver.name

    async def stays() -> bool:
        await each.end_idle()
        return name in bench.outbox.view.receivers

    # The round that was asked for last names it.
    await bench.outbox(Outbox.set_control, orjson.dumps(asked).decode(), work, NOW)
    assert await stays()
    await bench.outbox(Outbox.set_control, None, None, NOW)
    # Nonces of its round are being checked.
    checking.append(ROUND.id)
    assert await stays()
    checking.clear()
    # Proofs of its round are in no batch yet; then in a batch that waits; then in one that was refused.
    await bench.outbox(commit_span, ROUND, NODE, Span(0, 1), Proofs.of_distances([(0, 1.0)]), WEIGHTS, NOW)
    assert await stays()
    await bench.outbox(form_batches, [], size=1, age=0.0, now=NOW, current=None)
    assert await stays()
    head = await bench.outbox(deliveries.next_pending, name)
    assert head is not None
    await bench.outbox(deliveries.record_set_aside, name, head.batch, "no", NOW)
    assert await stays()
    await bench.outbox(selections.send_again, selections.Selection(("dead",)), NOW)
    # A validation whose verdict it is to get waits.
    request = canonical_json({"claim": {}, "callback": name})
    await bench.outbox(validations.ask, "v", request, callback=(name, receiver.url), most=9, now=NOW)
    await accept(bench, receiver)
    assert await stays()
    await bench.outbox(validations.fail, "v", "no", NOW)
    assert not await stays()
    assert served(each) == []
    # What it got is still a batch that was delivered, and is pruned as one.
    assert bench.outbox.view.totals.delivered == 1
    assert await bench.outbox(upkeep.prune_delivered, NOW + 1) == 1


async def test_a_batch_that_was_given_up_stays_given_up_when_another_receiver_has_it(bench: Bench) -> None:
    each = over(bench, "http://127.0.0.1:1/main")
    receiver = await each.callback("http://127.0.0.1:1/one", wanted=None)
    await ask(bench, receiver)
    await bench.outbox(commit_span, ROUND, NODE, Span(0, 1), Proofs.of_distances([(0, 1.0)]), WEIGHTS, NOW)
    await bench.outbox(form_batches, ["a"], size=1, age=0.0, now=NOW, current=None)
    await bench.outbox(selections.purge, selections.Selection(("pending",), receiver.name), NOW)
    await each.end_idle()
    await accept(bench, each.configured[0])
    assert bench.outbox.view.totals.purged == 1


async def test_callback_urls_with_batches_left_are_bounded_and_the_next_one_is_refused(bench: Bench) -> None:
    origin = "http://127.0.0.1:1"
    each = over(bench, origins=(origin,))
    for number in range(MOST_KNOWN):
        receiver = await each.callback(f"{origin}/{number}", wanted=None)
        await queue(bench, receiver, rounds(number))
        head = await bench.outbox(deliveries.next_pending, receiver.name)
        assert head is not None
        await bench.outbox(deliveries.record_set_aside, receiver.name, head.batch, "no", NOW)
    with pytest.raises(CallbackError, match="purge") as refused:
        await each.callback(f"{origin}/more", wanted=None)
    assert refused.value.full
    assert (await each.callback(f"{origin}/0", wanted=None)).name in bench.outbox.view.receivers
    await bench.outbox(selections.purge, selections.Selection(("dead",), callback_name(f"{origin}/1")), NOW)
    assert (await each.callback(f"{origin}/more", wanted=None)).url == f"{origin}/more"
