"""`pocd watch`: ask a daemon for its status, listen to its events, and draw both until the reader has seen enough."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from pocd.admin.client import AdminError, ServerEvent, call, events
from pocd.cli.live import draw, is_drawable, print_once
from pocd.cli.watch_view import Sample, Seen, View
from pocd.process import EXIT_CRASH, EndedError

ANSWER_SECONDS = 10.0  # for a status; the daemon makes one in milliseconds
BACKLOG_SECONDS = 1.0  # for the events that have happened, where one view is printed
AGAIN_SECONDS = 2.0  # after which a stream that ended is opened again
LONGEST = 900.0  # seconds of what was seen that are kept
EVENTS_KEPT = 100
EVENTS_PRINTED = 15  # where one view is printed


@dataclass(slots=True)
class Viewer:
    """Status and events of one daemon, kept up to date by `follow_status` and `follow_events`."""

    url: str
    token: str | None
    status: dict[str, Any] | None = None
    status_at: float = 0.0  # monotonic, as all times here
    away: str | None = None
    deaf: str | None = None
    last_id: str | None = None
    events: deque[ServerEvent] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    samples: deque[Sample] = field(default_factory=deque)

    def seen(self) -> Seen:
        """Return what is known now."""
        return Seen(
            url=self.url,
            now=time.time(),
            status=self.status,
            status_age=time.monotonic() - self.status_at,
            away=self.away,
            events=tuple(self.events),
            deaf=self.deaf,
            samples=tuple(self.samples),
        )

    async def ask(self) -> None:
        """Ask for the status once.

        Raises:
            AdminError: The API cannot be reached or refuses.
        """
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                self.status = await call(self.url, "GET", "/api/v1/pow/status", token=self.token)
        except TimeoutError:
            raise AdminError(f"{self.url} did not answer within {ANSWER_SECONDS:g} s") from None
        self.status_at = time.monotonic()
        self.samples.append(Sample(self.status_at, self.status["funnel"]["checked"]))
        while self.samples[0].at < self.status_at - LONGEST:
            self.samples.popleft()

    async def follow_status(self, interval: float) -> None:
        """Ask for the status again and again, whatever happens."""
        while True:
            try:
                await self.ask()
                self.away = None
            except AdminError as error:
                self.away = str(error)
            await asyncio.sleep(interval)

    async def follow_events(self) -> None:
        """Listen to the events, and again behind the last one whenever the stream ends."""
        while True:
            try:
                await self.listen()
            except AdminError as error:
                self.deaf = str(error)
            await asyncio.sleep(AGAIN_SECONDS)

    async def listen(self) -> None:
        """Listen to the events until the daemon ends the stream.

        Raises:
            AdminError: The API cannot be reached or refuses.
        """
        stream = events(self.url, token=self.token, last_id=self.last_id, latest=EVENTS_KEPT)
        async with aclosing(stream):
            async for event in stream:
                self.last_id, self.deaf = event.id, None
                if event.kind != "dropped" or event.data["missed"]:
                    self.events.append(event)


async def watch(url: str, token: str | None, *, interval: float) -> None:
    """Draw the daemon at `url` until q, Ctrl-C or SIGTERM; where there is no terminal, print it once.

    Args:
        url: Address of the admin API, as `pocd.admin.client.call` takes it.
        token: Bearer token, if the API needs one.
        interval: Seconds between two looks at the status.

    Raises:
        EndedError: Without a terminal: the API cannot be reached, or refuses.
    """
    viewer = Viewer(url, token)
    console = Console(highlight=False)
    if is_drawable(console):
        followers = {"status": viewer.follow_status(interval), "events": viewer.follow_events()}
        await draw(lambda: View(viewer.seen()), console, followers)
    else:
        await _once(viewer, console)


async def _once(viewer: Viewer, console: Console) -> None:
    try:
        await viewer.ask()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BACKLOG_SECONDS):
                await viewer.listen()
    except AdminError as error:
        raise EndedError(EXIT_CRASH, str(error)) from error
    print_once(View(replace(viewer.seen(), events=tuple(viewer.events)[-EVENTS_PRINTED:])), console)
