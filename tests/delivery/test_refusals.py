"""What is not simply tried again: dead letters, parked receivers, poison, expiry, and the alarms for people."""

from functools import partial

import pytest
import structlog
from aiohttp import web

from pocd.delivery import policy
from pocd.store import deliveries, selections
from pocd.store.outbox import Queue, ReceiverState
from tests.support.clocks import NOW
from tests.support.delivering import WEEK, Bench, Server, expected, running, sent
from tests.support.waiting import soon


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without waiting."""
    monkeypatch.setattr(policy, "BACKOFF_SECONDS", (0.0,))


def actions(logs: list[structlog.typing.EventDict], level: str) -> list[str]:
    return [entry["action"] for entry in logs if entry["log_level"] == level]


# Dead letters


REFUSALS = [400, 409, 413, 422]


@pytest.mark.parametrize("status", REFUSALS)
async def test_a_batch_that_is_refused_while_another_passes_is_a_dead_letter(
    bench: Bench, server: Server, status: int
) -> None:
    first, second, third, fourth = await bench.store(4, "a")
    refusal = partial(web.Response, status=status, text="nonces are\nnot sorted")
    server.answers += [web.Response, refusal, web.Response, refusal]
    dispatcher = bench.dispatcher(server.url)
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            assert sent(await server.take(5)) == expected([first, second, third, second, fourth])
            await soon(dispatcher.settled.wait())
    _, dead, *_ = await bench.deliveries()
    assert await bench.states() == ["delivered", "dead", "delivered", "delivered"]
    assert (dead.reason, dead.attempts) == (f"refused: HTTP {status}: nonces are not sorted", 2)
    assert dispatcher.state == ReceiverState()
    assert dispatcher.alarm is None
    assert actions(logs, "error") == ["dead_letter"]
    assert bench.outbox.view.queues["a"] == Queue(
        delivered_batches=3, delivered_nonces=6, dead_batches=1, dead_nonces=2
    )


@pytest.mark.usefixtures("at_once")
async def test_one_that_passes_when_another_did_is_no_dead_letter(bench: Bench, server: Server) -> None:
    """The receiver was at fault, and no more."""
    first, second = await bench.store(2, "a")
    server.then(400)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        assert sent(await server.take(3)) == expected([first, second, first])
        await soon(dispatcher.settled.wait())
    assert await bench.states() == ["delivered"] * 2


@pytest.mark.parametrize("status", REFUSALS)
async def test_a_receiver_that_refuses_whatever_comes_is_waited_for_with_an_alarm(
    bench: Bench, server: Server, status: int
) -> None:
    """A wrong secret or clock, plain HTTP on the port of https, a proxy's page: no batch is to blame."""
    batches = await bench.store(24, "a")
    server.then(*[status] * 9)
    dispatcher = bench.dispatcher(server.url)
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
            assert dispatcher.state.failures == 3
            assert dispatcher.state.next_at == NOW + policy.BACKOFF_SECONDS[2]
            for _ in range(2):
                await bench.step(dispatcher)
            assert await bench.states() == ["pending"] * 24
            assert dispatcher.alarm is not None
            assert dispatcher.alarm.startswith(f"accepts no batch, answers HTTP {status}: check its URL and its secret")
            shown = [batches[place] for place in (0, 1, 2, 0, 3, 4, 0, 5, 6)]
            assert sent(await server.take(9)) == expected(shown), "others each time, in the order of the queue"
            await bench.step(dispatcher)
            assert sent(await server.take(24)) == expected(batches)
            await soon(dispatcher.settled.wait())
    assert await bench.states() == ["delivered"] * 24
    assert dispatcher.alarm is None
    assert actions(logs, "error") == ["receiver_alarm"]


@pytest.mark.usefixtures("at_once")
async def test_of_many_that_are_refused_each_is_dead_once_another_passes(bench: Bench, server: Server) -> None:
    """A receiver that refuses a whole round's batches, and takes the next round's."""
    batches = await bench.store(8, "a")
    refused = {batch.id for batch in batches[:4]}

    async def handle(request: web.Request) -> web.Response:
        return web.Response(status=422 if request.headers["webhook-id"] in refused else 200)

    server.handle = handle
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await soon(dispatcher.settled.wait())
    assert await bench.states() == ["dead"] * 4 + ["delivered"] * 4


async def test_the_only_batch_of_a_queue_is_not_dead_until_another_passes(bench: Bench, server: Server) -> None:
    (first,) = await bench.store(1, "a")
    server.then(422, 422, 422, 422, 200, 422)
    before = bench.dispatcher(server.url)
    async with running(before):
        await soon(before.settled.wait())
        assert before.alarm is None, "it may well be the batch"
        for _ in range(2):
            await bench.step(before)
        assert before.alarm is not None
    assert await bench.states() == ["pending"]
    (second,) = await bench.store(1, "a")
    after = bench.dispatcher(server.url)  # as after a restart
    async with running(after):
        await bench.step(after)
    assert sent(await server.take(6)) == expected([first] * 4 + [second, first])
    assert await bench.states() == ["dead", "delivered"]
    assert after.alarm is None


async def test_a_receiver_that_fails_at_the_other_one_shows_nothing(bench: Bench, server: Server) -> None:
    first, second, third = await bench.store(3, "a")
    server.then(422, 503, 422, 422, 503)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await soon(dispatcher.settled.wait())
        assert sent(await server.take(2)) == expected([first, second])
        assert await bench.states() == ["pending"] * 3
        assert dispatcher.state.error == "HTTP 503"
        await bench.step(dispatcher)
        assert sent(await server.take(3)) == expected([first, second, third]), "none is left out"
    assert server.requests.empty()


async def test_a_refused_batch_that_is_withdrawn_meanwhile_is_not_sent_again(bench: Bench, server: Server) -> None:
    first, second = await bench.store(2, "a")

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.headers["webhook-id"] == second.id:
            withdraw = "UPDATE deliveries SET state = 'withdrawn' WHERE batch = ?"
            await bench.outbox(lambda outbox: outbox.db.execute(withdraw, (first.batch,)))
        return await server.answer(request)

    server.handle = handle
    server.then(422)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        assert sent(await server.take(2)) == expected([first, second])
        await soon(dispatcher.settled.wait())
    assert server.requests.empty()
    assert await bench.states() == ["withdrawn", "delivered"]


async def test_a_dead_letter_that_is_sent_again_is_the_same_message_at_the_end_of_the_queue(
    bench: Bench, server: Server
) -> None:
    first, second = await bench.store(2, "a")
    server.then(422, 200, 422)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await server.take(3)
        await soon(dispatcher.settled.wait())
        await bench.outbox(selections.send_again, selections.Selection(("dead",), "a", (first.id,)), NOW)
        dispatcher.wake()
        (again,) = await server.take(1)
        await soon(dispatcher.settled.wait())
    assert sent([again]) == expected([first])
    assert again.sequence == second.sequence + 1
    assert await bench.states() == ["delivered", "delivered"]


# Parked


async def test_a_receiver_that_is_gone_is_parked_and_its_queue_kept(bench: Bench, server: Server) -> None:
    await bench.store(3, "a")
    server.then(200, 410)
    dispatcher = bench.dispatcher(server.url)
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            await server.take(2)
            await soon(dispatcher.settled.wait())
            bench.clock.advance(30 * WEEK)
            dispatcher.wake()
            await soon(dispatcher.settled.wait())
    assert server.requests.empty(), "it is not asked again"
    assert await bench.states() == ["delivered", "pending", "pending"]
    assert dispatcher.state == ReceiverState(
        failures=1, error="HTTP 410", parked_at=NOW, parked_url=dispatcher.receiver.url
    )
    assert actions(logs, "error") == ["receiver_parked"]


async def test_a_parked_receiver_that_is_asked_again_gets_what_was_kept(bench: Bench, server: Server) -> None:
    batches = await bench.store(2, "a")
    server.then(410)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await server.take(1)
        await soon(dispatcher.settled.wait())
        await bench.outbox(deliveries.ask_again, "a")
        dispatcher.wake()
        assert sent(await server.take(2)) == expected(batches)
        await soon(dispatcher.settled.wait())
    assert dispatcher.state == ReceiverState()
    assert dispatcher.alarm is None


async def test_a_restart_unparks_a_receiver_only_if_its_url_changed(bench: Bench, server: Server) -> None:
    batches = await bench.store(2, "a")
    server.then(410)
    for _ in range(2):
        dispatcher = bench.dispatcher(server.url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
        assert bench.receiver().parked_at == NOW
    assert len(await server.take(1)) == 1
    assert server.requests.empty()

    moved = bench.dispatcher(f"{server.url}/v2")
    async with running(moved):
        requests = await server.take(2)
        await soon(moved.settled.wait())
    assert sent(requests) == expected(batches)
    assert requests[0].path == "/v2/generated"
    assert moved.state == ReceiverState()


# Poison


@pytest.mark.usefixtures("at_once")
async def test_a_batch_that_alone_fails_eight_times_is_set_aside(bench: Bench, server: Server) -> None:
    poison, second, third = await bench.store(3, "a")
    server.then(*[500] * 7, 200, 500)
    dispatcher = bench.dispatcher(server.url)
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            requests = await server.take(10)
            await soon(dispatcher.settled.wait())
    assert sent(requests) == expected([poison] * 7 + [second, poison, third])
    assert await bench.states() == ["dead", "delivered", "delivered"]
    (dead, *_) = await bench.deliveries()
    assert dead.reason == "poison: failed 8 times while a later batch was accepted: HTTP 500"
    assert dead.attempts == 8
    assert actions(logs, "error") == ["dead_letter"]
    assert dispatcher.state == ReceiverState()


@pytest.mark.usefixtures("at_once")
async def test_a_batch_that_passes_when_it_is_tried_once_more_is_not_poison(bench: Bench, server: Server) -> None:
    first, second, third = await bench.store(3, "a")
    server.then(*[500] * 7, 200, 200)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        requests = await server.take(10)
        await soon(dispatcher.settled.wait())
    assert sent(requests) == expected([first] * 7 + [second, first, third])
    assert await bench.states() == ["delivered"] * 3


@pytest.mark.usefixtures("at_once")
async def test_no_batch_is_poison_while_the_receiver_fails_at_all(bench: Bench, server: Server) -> None:
    first, second = await bench.store(2, "a")
    server.then(*[500] * 24)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        requests = await server.take(26)
        await soon(dispatcher.settled.wait())
    # After seven of the first the second is tried, and the count begins anew; three times.
    assert sent(requests) == expected(([first] * 7 + [second]) * 3 + [first, second])
    assert await bench.states() == ["delivered", "delivered"]
    assert [delivery.attempts for delivery in await bench.deliveries()] == [22, 4]


@pytest.mark.usefixtures("at_once")
async def test_a_next_batch_that_is_refused_does_not_show_that_the_first_is_poison(
    bench: Bench, server: Server
) -> None:
    first, second, third = await bench.store(3, "a")
    server.then(*[500] * 7, 400, 200, 400, 200, 400)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        requests = await server.take(12)
        await soon(dispatcher.settled.wait())
    assert sent(requests) == expected([first] * 7 + [second, first, second, third, second])
    assert await bench.states() == ["delivered", "dead", "delivered"]
    assert [delivery.attempts for delivery in await bench.deliveries()] == [8, 3, 1]


@pytest.mark.usefixtures("at_once")
async def test_the_only_batch_of_a_queue_is_never_poison(bench: Bench, server: Server) -> None:
    batches = await bench.store(1, "a")
    server.then(*[500] * 20)
    async with running(bench.dispatcher(server.url)):
        assert sent(await server.take(21)) == expected(batches * 21)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("status", [429, 404, 302])
async def test_what_is_the_receiver_s_state_is_never_the_batch_s_fault(
    bench: Bench, server: Server, status: int
) -> None:
    first, second = await bench.store(2, "a")
    server.then(*[status] * 20)
    async with running(bench.dispatcher(server.url)):
        assert sent(await server.take(22)) == expected([first] * 21 + [second])


async def test_what_is_tried_beside_a_suspect_waits_as_long_as_any_failure(bench: Bench, server: Server) -> None:
    """The next batch is tried at once, then both wait: the receiver is not asked twice as often."""
    await bench.store(2, "a")
    server.then(*[500] * 8)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await soon(dispatcher.settled.wait())
        for _ in range(6):
            await bench.step(dispatcher)
        assert len(await server.take(8)) == 8
        assert server.requests.empty()
        assert dispatcher.state.failures == 8
        assert dispatcher.state.next_at == bench.clock.now + 60
        assert await bench.faults() == [0, 0]


async def test_suspicion_outlives_a_restart(bench: Bench, server: Server) -> None:
    poison, second = await bench.store(2, "a")
    server.then(*[500] * 7, 200, 500)
    before = bench.dispatcher(server.url)
    async with running(before):
        for _ in range(4):
            await bench.step(before)
    assert await bench.faults() == [4, 0]
    after = bench.dispatcher(server.url)
    async with running(after):
        for _ in range(3):
            await bench.step(after)
    assert sent(await server.take(9)) == expected([poison] * 7 + [second, poison])
    assert await bench.states() == ["dead", "delivered"]


# Expiry


async def test_what_is_too_old_expires_when_an_attempt_fails_and_is_kept(bench: Bench, server: Server) -> None:
    old = await bench.store(2, "a")
    bench.clock.advance(50)
    await bench.store(1, "a")
    server.then(*[429] * 3)
    dispatcher = bench.dispatcher(server.url, expire_after=100.0)
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
            assert await bench.states() == ["pending"] * 3
            bench.clock.advance(NOW + 99.9 - bench.clock.now)
            await bench.step(dispatcher)
            assert await bench.states() == ["pending"] * 3
            bench.clock.advance(NOW + 102 - bench.clock.now)
            await bench.step(dispatcher)
            assert await bench.states() == ["expired", "expired", "pending"]
            await bench.step(dispatcher)
    assert await bench.states() == ["expired", "expired", "delivered"]
    tried, untried, _ = await bench.deliveries()
    assert (tried.reason, tried.attempts) == ("HTTP 429", 3)
    assert (untried.reason, untried.attempts) == ("never sent", 0)
    assert [(delivery.id, delivery.changed_at) for delivery in (tried, untried)] == [
        (each.id, NOW + 102) for each in old
    ]
    (told,) = [entry for entry in logs if entry["action"] == "expired"]
    assert told["batches"] == 2
    shown = await bench.outbox(lambda outbox: selections.shown(outbox, tried.id))
    assert shown is not None
    assert shown[1] == old[0].body


async def test_an_old_batch_is_delivered_to_a_receiver_that_is_well(bench: Bench, server: Server) -> None:
    batches = await bench.store(2, "a")
    bench.clock.advance(10 * WEEK)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        assert sent(await server.take(2)) == expected(batches)
        await soon(dispatcher.settled.wait())
    assert await bench.states() == ["delivered"] * 2


async def test_what_is_queued_again_has_a_life_of_its_own(bench: Bench, server: Server) -> None:
    await bench.store(1, "a")
    server.then(429, 429, 429)
    bench.clock.advance(NOW + WEEK - bench.clock.now)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await soon(dispatcher.settled.wait())
        assert await bench.states() == ["expired"]

        again_at = bench.clock.now
        await bench.outbox(selections.send_again, selections.Selection(("expired",)), again_at)
        await bench.step(dispatcher)
        assert await bench.states() == ["pending"], "its old age is forgotten"
        bench.clock.advance(again_at + WEEK - bench.clock.now)
        await bench.step(dispatcher)
        assert await bench.states() == ["expired"]
    assert (await bench.deliveries())[0].attempts == 3


async def test_more_than_one_transaction_of_batches_expires(
    bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "CHUNK", 3)
    await bench.store(10, "a")
    bench.clock.advance(WEEK)
    server.then(503)
    dispatcher = bench.dispatcher(server.url)
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert await bench.states() == ["expired"] * 10
    assert [entry["batches"] for entry in logs if entry["action"] == "expired"] == [10]


async def test_the_reason_of_what_was_withdrawn_during_an_attempt_stays(bench: Bench) -> None:
    (batch,) = await bench.store(1, "a")
    withdraw = "UPDATE deliveries SET state = 'withdrawn', reason = 'block replaced'"
    await bench.outbox(lambda outbox: outbox.db.execute(withdraw))
    failed = partial(deliveries.record_failed, reason="HTTP 500", fault=True, next_at=NOW + 1)
    await bench.outbox(lambda outbox: failed(outbox, "a", batch.batch))
    await bench.outbox(deliveries.record_parked, "a", batch.batch, "HTTP 410", "http://a", NOW)
    (delivery,) = await bench.deliveries()
    assert (delivery.state, delivery.reason) == ("withdrawn", "block replaced")
    assert delivery.attempts == 2
    assert bench.receiver().failures == 2


async def test_nothing_is_told_as_expired_when_what_failed_was_withdrawn_meanwhile(
    bench: Bench, server: Server
) -> None:
    async def handle(_: web.Request) -> web.Response:
        await bench.outbox(lambda outbox: outbox.db.execute("UPDATE deliveries SET state = 'withdrawn'"))
        return web.Response(status=503)

    server.handle = handle
    await bench.store(1, "a")
    bench.clock.advance(WEEK)
    dispatcher = bench.dispatcher(server.url)
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert dispatcher.state.failures == 1
    assert await bench.states() == ["withdrawn"]
    assert actions(logs, "error") == []


# Alarms


@pytest.mark.parametrize("status", [301, 401, 403, 404])
async def test_what_only_a_person_can_mend_is_an_alarm_until_it_is_mended(
    bench: Bench, server: Server, status: int
) -> None:
    await bench.store(1, "a")
    server.then(status, status, 503, status)
    dispatcher = bench.dispatcher(server.url)
    alarm = f"answers HTTP {status}: check its URL and its secret"
    seen = []
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
            seen.append(dispatcher.alarm)
            for _ in range(4):
                await bench.step(dispatcher)
                seen.append(dispatcher.alarm)
    assert seen == [alarm, alarm, None, alarm, None]
    assert actions(logs, "error") == ["receiver_alarm"] * 2, "told when it is raised, not at each attempt"
    assert actions(logs, "info") == ["receiver_restored"]
    assert await bench.states() == ["delivered"]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503, 400])
async def test_other_failures_are_no_alarm(bench: Bench, server: Server, status: int) -> None:
    await bench.store(1, "a")
    server.then(status)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await soon(dispatcher.settled.wait())
    assert dispatcher.alarm is None
