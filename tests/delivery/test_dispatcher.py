"""Delivery over real sockets from a real store; only the wall clock and the jitter are the test's."""

import asyncio
import base64
import resource
import ssl
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import aiohttp
import orjson
import pytest
import structlog
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from pocd.check.finding import Level
from pocd.check.receivers import check_receiver
from pocd.delivery import policy, posting
from pocd.http.client import open_session
from pocd.http.webhooks import WebhookKeys
from pocd.store.outbox import ReceiverState
from tests.support.clocks import NOW
from tests.support.delivering import Bench, Server, expected, running, sent, serving, talking
from tests.support.waiting import PATIENCE, soon
from tests.support.zoo import certificate

OLD, NEW, OTHER = ("whsec_" + base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2, 3))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without waiting."""
    monkeypatch.setattr(policy, "BACKOFF_SECONDS", (0.0,))


# What is sent


async def test_batches_arrive_in_order_as_they_were_stored(bench: Bench, server: Server) -> None:
    batches = await bench.store(5, "a")
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        requests = await server.take(5)
        await soon(dispatcher.settled.wait())
    assert sent(requests) == expected(batches)
    assert await bench.head() is None
    assert server.requests.empty()
    assert dispatcher.state == ReceiverState()
    assert bench.outbox.view.totals.delivered == 10


@pytest.mark.parametrize("ending", ["", "/"])
async def test_a_batch_is_posted_as_json_to_generated_below_the_url(bench: Bench, server: Server, ending: str) -> None:
    (batch,) = await bench.store(1, "a")
    async with running(bench.dispatcher(f"{server.url}/base{ending}")):
        (request,) = await server.take(1)
    assert request.path == "/base/generated"
    assert request.headers["content-type"] == "application/json"
    assert request.timestamp == int(NOW)
    assert orjson.loads(request.body)["batch_id"] == request.id == batch.id


@pytest.mark.usefixtures("at_once")
async def test_while_a_key_is_rotated_both_verify_every_attempt_by_the_reference(bench: Bench, server: Server) -> None:
    bench.clock.now = time.time()  # the reference looks at the real clock
    (batch,) = await bench.store(1, "a")
    server.then(500)
    async with running(bench.dispatcher(server.url, keys=WebhookKeys.parse(f"{OLD}\n{NEW}"))):
        requests = await server.take(2)
    for request in requests:
        for secret in (OLD, NEW):
            assert Webhook(secret).verify(request.body, request.headers) == orjson.loads(batch.body)
            with pytest.raises(WebhookVerificationError):
                Webhook(secret).verify(request.body + b" ", request.headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(OTHER).verify(request.body, request.headers)


@pytest.mark.usefixtures("at_once")
async def test_sequence_numbers_are_dense_and_ascend_for_each_receiver_and_stay_with_their_batch(
    bench: Bench, server: Server
) -> None:
    await bench.store(2, "b")
    await bench.store(2, "a", "b")
    await bench.store(1, "a")
    async with serving() as other:
        server.then(500)
        async with running(bench.dispatcher(server.url, "a"), bench.dispatcher(other.url, "b")):
            to_a, to_b = await server.take(4), await other.take(4)
    assert [request.sequence for request in to_a] == [1, 1, 2, 3]
    assert [request.sequence for request in to_b] == [1, 2, 3, 4]
    assert [request.id for request in to_b[2:]] == [request.id for request in to_a[1:3]]


async def test_one_request_is_in_flight_at_a_time(bench: Bench, server: Server) -> None:
    flying, seen = 0, []

    async def handle(request: web.Request) -> web.Response:
        nonlocal flying
        flying += 1
        seen.append(flying)
        await request.read()
        for _turn in range(10):  # so that a second one could come
            await asyncio.sleep(0)
        flying -= 1
        return web.Response()

    server.handle = handle
    await bench.store(20, "a")
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        for _ in range(20):
            dispatcher.wake()
            await asyncio.sleep(0)
        await soon(dispatcher.settled.wait())
    assert await bench.states() == ["delivered"] * 20
    assert seen == [1] * 20


async def test_without_keys_nothing_is_signed(bench: Bench, server: Server) -> None:
    await bench.store(1, "a")
    async with running(bench.dispatcher(server.url)):
        (request,) = await server.take(1)
    assert "webhook-signature" not in request.headers


async def test_a_batch_of_the_largest_size_that_can_be_configured_is_delivered(bench: Bench, server: Server) -> None:
    batches = await bench.store(1, "a", size=100_000)
    async with running(bench.dispatcher(server.url)):
        assert sent(await server.take(1)) == expected(batches)


async def test_neither_cookies_nor_proxies_of_the_environment_are_used(
    bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_cookie() -> web.Response:
        response = web.Response()
        response.set_cookie("followed", "you")
        return response

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    server.answers.append(with_cookie)
    await bench.store(2, "a")
    async with running(bench.dispatcher(server.url.replace("127.0.0.1", "localhost"))):
        requests = await server.take(2)
    assert all("cookie" not in request.headers for request in requests)


async def test_what_is_stored_later_goes_out_when_woken(bench: Bench, server: Server) -> None:
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await soon(dispatcher.settled.wait())
        batches = await bench.store(2, "a")
        dispatcher.wake()
        assert not dispatcher.settled.is_set()
        assert sent(await server.take(2)) == expected(batches)
        await soon(dispatcher.settled.wait())
    assert await bench.head() is None


# What comes of it


async def test_a_retry_is_the_same_message_with_a_time_of_its_own(bench: Bench, server: Server) -> None:
    batches = await bench.store(2, "a")
    server.then(500)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        (first,) = await server.take(1)
        await soon(dispatcher.settled.wait())
        assert dispatcher.state == ReceiverState(failures=1, next_at=NOW + 1, error="HTTP 500")
        failed = await bench.head()
        assert failed is not None
        assert (failed.attempts, failed.faults) == (1, 1)

        bench.clock.advance(1.5)
        dispatcher.wake()
        second, third = await server.take(2)
        await soon(dispatcher.settled.wait())
    assert sent([first, second, third]) == expected([batches[0], batches[0], batches[1]])
    assert (first.timestamp, second.timestamp) == (int(NOW), int(NOW) + 1)
    assert dispatcher.state == ReceiverState()


async def test_nothing_is_sent_before_its_time(bench: Bench, server: Server) -> None:
    await bench.store(2, "a")
    server.then(500)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await server.take(1)
        await soon(dispatcher.settled.wait())
        bench.clock.advance(0.75)
        for _ in range(3):
            dispatcher.wake()
            await soon(dispatcher.settled.wait())
    assert server.requests.empty()
    assert dispatcher.state.failures == 1


async def test_a_retry_needs_nobody_to_wake_it(bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "BACKOFF_SECONDS", (0.01,))
    bench.clock.tick = 0.001
    batches = await bench.store(1, "a")
    server.then(500, 503, 429)
    async with running(bench.dispatcher(server.url)):
        assert sent(await server.take(4)) == expected(batches * 4)


async def test_while_an_attempt_is_under_way_nothing_is_settled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stops the daemon waits for `settled`, so that a delivery under way may end."""
    first, second = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not first.is_set():
            first.set()
            writer.write(b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            second.set()
            await reader.read()

    monkeypatch.setattr(policy, "BACKOFF_SECONDS", (0.01,))
    bench.clock.tick = 0.001
    await bench.store(1, "a")
    async with talking(talk) as url:
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            await soon(second.wait())
            assert not dispatcher.settled.is_set()


async def test_failures_in_a_row_wait_longer_and_longer(bench: Bench, server: Server) -> None:
    await bench.store(1, "a")
    server.then(*[429] * 9)
    dispatcher = bench.dispatcher(server.url)
    waits = []
    async with running(dispatcher):
        for _ in range(9):
            await server.take(1)
            await soon(dispatcher.settled.wait())
            waits.append(dispatcher.state.next_at - bench.clock.now)
            bench.clock.advance(waits[-1])
            dispatcher.wake()
        await server.take(1)
    assert waits == [1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]


async def test_what_this_host_lacks_is_soon_looked_for_again(bench: Bench, server: Server) -> None:
    await bench.store(1, "a")
    dispatcher = bench.dispatcher(server.url)
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    waits = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, most))  # what is open stays open
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
            for _ in range(6):
                waits.append(dispatcher.state.next_at - bench.clock.now)
                await bench.step(dispatcher)
            assert dispatcher.state.error == "no connection: Too many open files"
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
            await bench.step(dispatcher)
            await server.take(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
    assert waits == [1.0, 2.0, 5.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize("set_back", [3600.0, 10.0**9])
async def test_a_clock_that_was_set_back_does_not_hold_up_a_retry(
    bench: Bench, server: Server, set_back: float
) -> None:
    batches = await bench.store(1, "a")
    server.then(500)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await server.take(1)
        await soon(dispatcher.settled.wait())
        bench.clock.now -= set_back
        bench.clock.advance(1.5)
        dispatcher.wake()
        assert sent(await server.take(1)) == expected(batches)


@pytest.mark.parametrize("jump", [3600.0, 1e9, -3600.0])
async def test_a_clock_that_is_set_does_not_shorten_a_wait(bench: Bench, server: Server, jump: float) -> None:
    batches = await bench.store(1, "a")
    server.then(500)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await server.take(1)
        await soon(dispatcher.settled.wait())
        bench.clock.now += jump
        dispatcher.wake()
        await soon(dispatcher.settled.wait())
        assert server.requests.empty(), "its time has not come"
        bench.clock.advance(1.5)
        dispatcher.wake()
        assert sent(await server.take(1)) == expected(batches)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_never_followed_but_tried_again(bench: Bench, server: Server, status: int) -> None:
    batches = await bench.store(1, "a")
    async with serving() as elsewhere:
        location = {"Location": f"{elsewhere.url}/generated"}
        server.answers.append(partial(web.Response, status=status, headers=location))
        async with running(bench.dispatcher(server.url)):
            assert sent(await server.take(2)) == expected(batches * 2)
        assert elsewhere.requests.empty()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("status", [304, 401, 403, 404, 408, 425, 429, 500, 503, 599])
async def test_what_is_the_receiver_s_state_is_tried_again(bench: Bench, server: Server, status: int) -> None:
    batches = await bench.store(2, "a")
    server.then(status)
    async with running(bench.dispatcher(server.url)):
        assert sent(await server.take(3)) == expected([batches[0], *batches])


@pytest.mark.parametrize("status", [200, 201, 202, 204])
async def test_any_2xx_is_acceptance(bench: Bench, server: Server, status: int) -> None:
    await bench.store(1, "a")
    server.then(status)
    dispatcher = bench.dispatcher(server.url)
    async with running(dispatcher):
        await server.take(1)
        await soon(dispatcher.settled.wait())
    assert await bench.head() is None


@pytest.mark.parametrize(("status", "accepted"), [(b"200 OK", True), (b"500 Broken", False)])
async def test_the_end_of_an_endless_answer_is_not_waited_for(bench: Bench, status: bytes, accepted: bool) -> None:  # noqa: FBT001 - a parameter of the cases
    hung_up = asyncio.Event()

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 1000000000000\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        finally:
            hung_up.set()

    await bench.store(1, "a")
    async with talking(talk) as url:
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
            await soon(hung_up.wait())
    assert (await bench.head() is None) == accepted


async def test_no_more_may_arrive_unread_than_is_read(
    bench: Bench, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a flood costs the other receivers: see the zoo, where it is slow to show."""
    windows = []

    def watched(
        timeout: aiohttp.ClientTimeout,
        *,
        window: int,
        refuse: Callable[[str], str | None],
        certificate: Callable[[float], None],
    ) -> aiohttp.ClientSession:
        windows.append(window)
        return open_session(timeout, window=window, refuse=refuse, certificate=certificate)

    monkeypatch.setattr(posting, "open_session", watched)
    await bench.store(1, "a")
    async with running(bench.dispatcher(server.url)):
        await server.take(1)
    assert windows == [posting.ANSWER_BYTES]


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@127.0.0.1:1", "http://user:hunter2@[::bad", "http://a..b/hunter2"]
)
async def test_an_url_that_cannot_be_reached_fails_without_telling_its_credentials(bench: Bench, url: str) -> None:
    await bench.store(1, "a")
    dispatcher = bench.dispatcher(url)
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
    assert dispatcher.state.error
    assert "hunter2" not in dispatcher.state.error + repr(logs)
    assert await bench.states() == ["pending"]
    assert dispatcher.state.failures == 1


@pytest.mark.parametrize("status", [200, 302, 400, 404, 410, 500])
async def test_neither_logs_nor_reasons_tell_the_secret_or_the_url_s_credentials(
    bench: Bench, server: Server, status: int
) -> None:
    await bench.store(1, "a")
    server.then(status)
    url = server.url.replace("http://", "http://user:hunter2@")
    dispatcher = bench.dispatcher(url, keys=WebhookKeys.parse(NEW))
    with structlog.testing.capture_logs() as logs:
        async with running(dispatcher):
            (request,) = await server.take(1)
            await soon(dispatcher.settled.wait())
    assert request.headers["authorization"] == "Basic " + base64.b64encode(b"user:hunter2").decode()
    told = repr((logs, await bench.deliveries(), dispatcher.state, dispatcher.alarm, dispatcher.receiver.keys))
    for secret in ("hunter2", NEW.removeprefix("whsec_"), str(bytes([2]) * 32), request.headers["webhook-signature"]):
        assert secret not in told


# Certificates


async def test_a_certificate_that_soon_expires_is_an_alarm_while_batches_are_still_accepted(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = certificate(tmp_path)
    if context is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
    await bench.store(1, "a")
    async with serving(tls=context) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            await server.take(1)
            await soon(dispatcher.settled.wait())
        assert bench.outbox.view.totals.delivered == 2
        expires = dispatcher.certificate_expires
        assert expires is not None
        for days, level in ((15, Level.GREEN), (13, Level.YELLOW)):
            bench.clock.now = expires - days * 86_400
            finding = await check_receiver(dispatcher.receiver, clock=bench.clock, limit=PATIENCE)
            assert finding.level is level, finding
            assert (dispatcher.alarm is None) == (level is Level.GREEN)
    assert "certificate expires on " in str(dispatcher.alarm)


# Many receivers


@pytest.mark.usefixtures("at_once")
async def test_many_receivers_that_fail_hold_up_none_that_is_well(bench: Bench, server: Server) -> None:
    """Though they are asked again without a pause: while it gets a batch, each of them gets few."""
    names = [f"r{number}" for number in range(150)]
    batches = await bench.store(3, "well", *names)
    dispatchers = [bench.dispatcher("http://127.0.0.1:1", name) for name in names]
    async with running(*dispatchers, bench.dispatcher(server.url, "well")):
        requests = await server.take(3)
        failures = [dispatcher.state.failures for dispatcher in dispatchers]
    assert sent(requests) == expected(batches)
    assert max(failures) <= 12
