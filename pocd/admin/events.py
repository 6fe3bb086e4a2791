"""The stream of events: server-sent events (WHATWG HTML, section 9.2), with all that a listener can cost bounded."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Annotated

import orjson
from aiohttp import web
from pydantic import Field

from pocd.admin.operations import Media, Operation
from pocd.http.parsing import Input, parse_query
from pocd.http.server import RefusalError
from pocd.observe.events import RING, Event, Events, Missed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from structlog.typing import FilteringBoundLogger

    from pocd.admin.operations import Answer

MOST_LISTENERS = 16
MOST_OF_ONE = 8  # from one address, so that one host's pages and scripts leave places for others
SILENCE_SECONDS = 15.0  # after which a comment tells client and proxies that the stream lives
PATIENCE_SECONDS = 10.0  # for a client to take what was written to it
LOOK_SECONDS = 1.0  # after which a client that hung up is noticed
RETRY_MS = 2000  # that a browser waits before it connects again
EVENT_ID = r"^[0-9a-f]{1,16}-[0-9]{1,18}$"


class EventsQuery(Input):
    """The query of `GET /api/v1/pow/events`."""

    last_event_id: Annotated[str, Field(pattern=EVENT_ID)] | None = Field(
        default=None,
        description="Begin after this event. The header `Last-Event-ID` has the same meaning and precedence.",
    )
    latest: int = Field(
        default=0, ge=0, le=RING, description="Number of past events to begin with, where no event id is given."
    )


class EventsApi:
    """The route for the stream of events."""

    def __init__(
        self,
        events: Events,
        log: FilteringBoundLogger,
        *,
        silence: float = SILENCE_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._events = events
        self._log = log
        self._silence = silence
        self._patience = patience
        self._streams: dict[asyncio.Task[object], str | None] = {}  # with the address of each client

    def operations(self) -> list[Operation]:
        """Return the operation of this route."""
        answers: dict[int, Answer] = {
            200: Media("text/event-stream", "The stream; it ends when the daemon stops or the client is dropped."),
            429: f"There are {MOST_LISTENERS} listeners already, or {MOST_OF_ONE} of the caller's address "
            "(`too_many_listeners`); see `Retry-After`.",
        }
        return [Operation("GET", "/api/v1/pow/events", self.events, "events", query=EventsQuery, answers=answers)]

    async def close(self, _app: web.Application) -> None:
        """End all streams at once; for the application's `on_shutdown`."""
        for task in self._streams:
            task.cancel()

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Stream events as they happen: blocks, rounds, batches, deliveries, workers (server-sent events).

        Each event has an `id`, its kind as `event`, and one line of JSON as `data`: `time` (seconds since the epoch)
        and the kind's fields: `block` {height, hash, chain_id}; `chain` {problem}; `round` {height, block_hash, id,
        by}; `state` {state}; `batch` {id, kind, nonces, height}; `delivery` {receiver, id, outcome}; `worker` {what,
        pid, cause}; `validation` {id, state}; `reload` {applied, restart, problem}. The latest 1024 are kept: a client
        that connects again with the id of the last one it saw gets what it missed. The last event of a client that is
        dropped is `dropped` {reason, missed}, with the id to connect again with. Reasons: `fell_behind`, so many events
        are gone; `too_slow`, so many were not sent, since it took nothing for 10 s; `unknown_id`, the daemon was
        started anew since.
        """
        cursor = self._cursor(request)
        self._refuse_more(request.remote)
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        response = web.StreamResponse(headers=headers)
        with self._listening(request.remote), contextlib.suppress(ConnectionError):  # the client has hung up
            await response.prepare(request)
            if request.method != "HEAD":
                await self._tell(request, response, cursor)
        return response

    def _refuse_more(self, address: str | None) -> None:
        same = sum(each == address for each in self._streams.values())
        if self._events.listeners < MOST_LISTENERS and same < MOST_OF_ONE:
            return
        who = f"{MOST_OF_ONE} listeners of your address" if same >= MOST_OF_ONE else f"{MOST_LISTENERS} listeners"
        message = f"there are {who} already; close one, or try again later"
        raise RefusalError(429, "too_many_listeners", message, headers={"Retry-After": "10"})

    def _cursor(self, request: web.Request) -> int | None:
        """Return where to begin; None when the id that was given is not one of this process's."""
        query = parse_query(request, EventsQuery)
        given = request.headers.get("Last-Event-ID") or query.last_event_id
        if given is None:
            return max(self._events.newest - query.latest, self._events.gone)
        if not re.match(EVENT_ID, given):
            raise RefusalError(400, "invalid_request", "Last-Event-ID: has to be the id of an event", "last_event_id")
        life, _, number = given.partition("-")
        return int(number) if life == self._events.life and int(number) <= self._events.newest else None

    @contextlib.contextmanager
    def _listening(self, address: str | None) -> Iterator[None]:
        """Count the stream, and have it cancelled when the server ends."""
        task = asyncio.current_task()
        assert task is not None
        self._streams[task] = address
        self._events.listeners += 1
        try:
            yield
        finally:
            self._events.listeners -= 1
            del self._streams[task]

    async def _tell(self, request: web.Request, response: web.StreamResponse, cursor: int | None) -> None:
        """Write events until the client is dropped or hangs up."""
        await response.write(b"retry: %d\n\n" % RETRY_MS)
        if cursor is None:
            await self._drop(request, response, 0, "unknown_id", None)
            return
        while (found := await self._next(request, cursor)) is not None:
            if isinstance(found, Missed):
                await self._drop(request, response, cursor + found.count, "fell_behind", found.count)
                return
            cursor = found[-1].id if found else cursor
            try:
                async with asyncio.timeout(self._patience):
                    await response.write(b"".join(map(self._event, found)) or b": nothing new\n\n")
            except TimeoutError:
                await self._drop(request, response, cursor, "too_slow", self._events.newest - cursor)
                return

    async def _next(self, request: web.Request, cursor: int) -> list[Event] | Missed | None:
        """Wait for events: none when there were none for a while, None when the client hung up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._silence):
                while request.transport is not None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_SECONDS):
                            return await self._events.after(cursor)
                return None
        return []

    def _event(self, event: Event) -> bytes:
        return self._message(event.id, event.kind, {"time": event.time} | event.data)

    def _message(self, number: int, kind: str, data: dict[str, object]) -> bytes:
        return b"id: %s-%d\nevent: %s\ndata: %s\n\n" % (
            self._events.life.encode(),
            number,
            kind.encode(),
            orjson.dumps(data),
        )

    async def _drop(
        self, request: web.Request, response: web.StreamResponse, cursor: int, reason: str, missed: int | None
    ) -> None:
        """End the stream with a `dropped` event, which the client has `patience` seconds to read."""
        self._log.warning("listener dropped", action="listener_dropped", reason=reason, missed=missed)
        try:
            async with asyncio.timeout(self._patience):
                await response.write(self._message(cursor, "dropped", {"reason": reason, "missed": missed}))
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
