"""The ring of events, and its stream to real clients, of which some are slow."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import CapturingLogger

from pocd.admin.events import MOST_LISTENERS, MOST_OF_ONE, EventsApi
from pocd.admin.operations import routes
from pocd.clock import SYSTEM
from pocd.http.server import errors_as_json, listening
from pocd.observe.events import Event, Events, Missed
from tests.support.waiting import PATIENCE, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@given(st.integers(1, 5), st.integers(0, 12), st.data())
async def test_a_cursor_gets_all_that_follows_or_is_told_what_is_gone(
    size: int, count: int, data: st.DataObject
) -> None:
    events = Events(SYSTEM, size)
    for number in range(count):
        events.publish("block", height=number)
    cursor = data.draw(st.integers(0, count))
    got: list[int] = []
    while cursor + len(got) < count:
        found = await events.after(cursor + len(got))
        if isinstance(found, Missed):
            assert not got, "nothing can be gone that was behind a cursor in the ring"
            assert found.count == count - size - cursor > 0
            cursor += found.count
        else:
            got += [event.data["height"] for event in found]
    assert got == list(range(cursor, count))


async def test_who_waits_is_woken_by_the_next_event() -> None:
    events = Events(SYSTEM)
    waiting = [asyncio.create_task(events.after(0)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    events.publish("state", state="IDLE")
    for found in await soon(asyncio.gather(*waiting)):
        assert isinstance(found, list)
        assert [(event.id, event.kind, event.data) for event in found] == [(1, "state", {"state": "IDLE"})]


class Served:
    """The stream of `events` on a real socket."""

    def __init__(self, size: int = 1024, **limits: float) -> None:
        self.events = Events(SYSTEM, size)
        self.log = CapturingLogger()
        self.api = EventsApi(self.events, self.log, **limits)
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Served]:
        app = web.Application(middlewares=[errors_as_json])
        app.add_routes(routes(self.api.operations()))
        app.on_shutdown.append(self.api.close)
        async with listening(app, "127.0.0.1", 0, shutdown_timeout=PATIENCE) as url:
            self.url = f"{url}/api/v1/pow/events"
            yield self

    def dropped(self) -> list[dict[str, Any]]:
        return [call.kwargs for call in self.log.calls if call.kwargs["action"] == "listener_dropped"]


class Stream:
    """A client that reads message by message."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> dict[str, str] | None:
        """The next message that is no comment, by field; None at the end."""
        async with asyncio.timeout(PATIENCE):
            while True:
                lines = []
                while (line := await self.response.content.readline()) not in {b"\n", b""}:
                    lines.append(line.decode().rstrip("\n"))
                if not line:
                    return None
                fields = dict(line.split(": ", 1) for line in lines)
                if "event" in fields:
                    return fields


@contextlib.asynccontextmanager
async def listener(
    served: Served, last: str | None = None, query: str = "", address: str = "127.0.0.1"
) -> AsyncIterator[Stream]:
    headers = {"Last-Event-ID": last} if last is not None else {}
    connector = aiohttp.TCPConnector(local_addr=(address, 0))
    async with (
        aiohttp.ClientSession(headers=headers, connector=connector) as session,
        session.get(served.url + query) as response,
    ):
        assert (response.status, response.content_type) == (200, "text/event-stream")
        yield Stream(response)


async def test_events_arrive_in_order_and_a_client_that_comes_back_misses_none() -> None:
    async with Served().running() as served:
        served.events.publish("block", height=1)
        async with listener(served) as stream:
            served.events.publish("block", height=2)
            served.events.publish("state", state="IDLE\n")
            second, third = await stream.next(), await stream.next()
            assert second
            assert third
            assert (second["event"], orjson.loads(second["data"])["height"]) == ("block", 2)
            assert orjson.loads(third["data"])["state"] == "IDLE\n"
        served.events.publish("block", height=3)
        async with listener(served, last=second["id"]) as stream:
            assert await stream.next() == third
            following = await stream.next()
            assert following
            assert orjson.loads(following["data"])["height"] == 3
        async with listener(served, query=f"?last_event_id={third['id']}") as stream:
            assert await stream.next() == following
        assert not served.dropped()


async def test_a_client_that_fell_off_the_ring_is_told_how_much_is_gone_and_where_to_go_on() -> None:
    async with Served(size=3).running() as served:
        for height in range(1, 9):
            served.events.publish("block", height=height)
        async with listener(served, last=f"{served.events.life}-1") as stream:
            notice = await stream.next()
            assert notice
            assert notice["event"] == "dropped"
            assert orjson.loads(notice["data"]) == {"reason": "fell_behind", "missed": 4}
            assert await stream.next() is None
        async with listener(served, last=notice["id"]) as stream:
            heights = [orjson.loads((await stream.next() or {})["data"])["height"] for _ in range(3)]
            assert heights == [6, 7, 8]
        assert [each["missed"] for each in served.dropped()] == [4]


@pytest.mark.parametrize("other", ["{}-9", "1-1"])  # from the future, and from before the daemon's start
async def test_an_id_of_another_life_of_the_daemon_is_known_as_such(other: str) -> None:
    async with Served().running() as served:
        served.events.publish("block", height=1)
        async with listener(served, last=other.format(served.events.life)) as stream:
            notice = await stream.next()
            assert notice
            assert orjson.loads(notice["data"]) == {"reason": "unknown_id", "missed": None}
            assert await stream.next() is None
        async with listener(served, last=notice["id"]) as stream:
            first = await stream.next()
            assert first
            assert orjson.loads(first["data"])["height"] == 1


async def test_silence_is_filled_with_comments() -> None:
    async with Served(silence=0.01).running() as served, listener(served) as stream:
        async with asyncio.timeout(PATIENCE):
            while (line := await stream.response.content.readline()) != b": nothing new\n":
                assert line


@contextlib.asynccontextmanager
async def stuck(served: Served) -> AsyncIterator[asyncio.StreamReader]:
    """A client that takes nothing until it is said to be dropped."""
    host, port = served.url.split("/")[2].split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=client, limit=2**20)
        writer.transport.pause_reading()  # type: ignore[attr-defined] # a stream's is one that can
        writer.write(b"GET /api/v1/pow/events HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(PATIENCE):
            while not served.dropped():  # until the kernel's buffers are full
                served.events.publish("block", text="x" * 65536)
                await asyncio.sleep(0)
        writer.transport.resume_reading()  # type: ignore[attr-defined] # likewise
        yield reader
        writer.close()


async def test_a_client_that_takes_nothing_is_dropped_and_reads_so_when_it_wakes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = Served(patience=0.02)
    drop = served.api._drop

    async def drop_patiently(*arguments: Any) -> None:  # noqa: ANN401 - passed on
        served.api._patience = PATIENCE  # it wakes in time, however slow this machine is
        await drop(*arguments)

    monkeypatch.setattr(served.api, "_drop", drop_patiently)
    async with served.running(), stuck(served) as reader:
        async with asyncio.timeout(PATIENCE):
            while (line := await reader.readline()) != b"event: dropped\n":
                assert line
        notice = await reader.readline()
        (dropped,) = served.dropped()
        assert notice == b'data: {"reason":"too_slow","missed":%d}\n' % dropped["missed"]
        assert dropped["missed"] > 0


async def test_a_client_that_never_wakes_is_gone_all_the_same() -> None:
    async with Served(patience=0.02).running() as served:
        async with stuck(served):
            pass
        await until(lambda: served.events.listeners == 0)


async def test_listeners_are_limited_and_one_that_hangs_up_makes_room() -> None:
    async with Served().running() as served, contextlib.AsyncExitStack() as stack:
        for number in range(MOST_LISTENERS - 1):
            await stack.enter_async_context(listener(served, address=f"127.0.0.{2 + number // MOST_OF_ONE}"))
        async with aiohttp.ClientSession() as session:
            async with listener(served), session.get(served.url) as response:
                assert (response.status, response.headers["Retry-After"]) == (429, "10")
                assert (await response.json())["error"]["code"] == "too_many_listeners"
            await until(lambda: served.events.listeners < MOST_LISTENERS)
        async with listener(served):
            assert served.events.listeners == MOST_LISTENERS


async def test_one_address_leaves_places_for_others() -> None:
    async with Served().running() as served, contextlib.AsyncExitStack() as stack:
        for _ in range(MOST_OF_ONE):
            await stack.enter_async_context(listener(served))
        async with aiohttp.ClientSession() as session, session.get(served.url) as response:
            assert response.status == 429
            assert "your address" in (await response.json())["error"]["message"]
        async with listener(served, address="127.0.0.2"):
            assert served.events.listeners == MOST_OF_ONE + 1


async def test_a_client_that_resets_its_stream_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with Served().running() as served:
        where = ("127.0.0.1", int(served.url.split(":")[2].partition("/")[0]))
        for _ in range(3):
            served.events.publish("state", state="IDLE")
            with socket.create_connection(where) as client:
                client.sendall(b"GET /api/v1/pow/events?latest=1024 HTTP/1.1\r\nHost: x\r\n\r\n")
                await until(lambda: served.events.listeners)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            served.events.publish("state", state="IDLE")
            await until(lambda: not served.events.listeners)
    assert [record.getMessage() for record in caplog.records] == []


async def test_the_end_of_the_server_ends_all_streams_at_once() -> None:
    ended: list[bool] = []
    async with contextlib.AsyncExitStack() as stack:
        running = Served().running()
        served = await running.__aenter__()
        streams = [await stack.enter_async_context(listener(served)) for _ in range(3)]
        async with asyncio.timeout(PATIENCE / 2):  # the server would wait for PATIENCE
            await running.__aexit__(None, None, None)
        for stream in streams:
            with contextlib.suppress(aiohttp.ClientPayloadError):
                assert await stream.next() is None
            ended.append(True)
    assert len(ended) == 3


async def test_what_is_asked_in_a_wrong_way() -> None:
    async with Served().running() as served, aiohttp.ClientSession() as session:
        for headers, query in (({}, "?last_event_id=7"), ({}, "?colour=1"), ({"Last-Event-ID": "seven"}, "")):
            async with session.get(served.url + query, headers=headers) as response:
                assert response.status == 400
        async with session.head(served.url) as response:
            assert (response.status, await response.read()) == (200, b"")
        assert served.events.listeners == 0


def test_an_event_is_small() -> None:
    assert not hasattr(Event(1, "block", 0.0, {}), "__dict__")
