"""`pocd watch`: ask a daemon for its status, listen to its events, and draw both until the reader has seen enough."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import time
import tty
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from pocd.admin.client import AdminError, ServerEvent, call, events
from pocd.cli.api import echo
from pocd.cli.watch_view import Sample, Seen, View
from pocd.process import EXIT_CRASH, EndedError
from pocd.tasks import first_error

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWER_SECONDS = 10.0  # for a status; the daemon makes one in milliseconds
BACKLOG_SECONDS = 1.0  # for the events that have happened, where one view is printed
AGAIN_SECONDS = 2.0  # after which a stream that ended is opened again
DRAW_SECONDS = 0.5  # between two pictures; ages go on while nothing is asked
LONGEST = 900.0  # seconds of what was seen that are kept
EVENTS_KEPT = 100
EVENTS_PRINTED = 15  # where one view is printed
QUIT = {b"q", b"Q", b"\x04"}


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
    if sys.stdout.isatty() and not console.is_dumb_terminal:
        await _live(viewer, console, interval)
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
    with console.capture() as captured:
        console.print(View(replace(viewer.seen(), events=tuple(viewer.events)[-EVENTS_PRINTED:])))
    echo(captured.get().rstrip("\n"), keep="\033")  # of colours that were asked for: the view itself is clean


async def _live(viewer: Viewer, console: Console, interval: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with asyncio.TaskGroup() as group:
            following = [
                group.create_task(viewer.follow_status(interval), name="status"),
                group.create_task(viewer.follow_events(), name="events"),
            ]
            with _keys(stop), Live(console=console, screen=True, auto_refresh=False) as live:
                while not stop.is_set():
                    live.update(View(viewer.seen()), refresh=True)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(DRAW_SECONDS):
                            await stop.wait()
            for task in following:
                task.cancel()
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None


@contextlib.contextmanager
def _keys(stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` at q, where keys can be read at all; the terminal is left as it was found."""
    if not sys.stdin.isatty():
        yield
        return
    loop, keyboard = asyncio.get_running_loop(), sys.stdin.fileno()

    def read() -> None:
        if not (key := os.read(keyboard, 1)):
            loop.remove_reader(keyboard)  # the terminal has gone; SIGHUP ends us
        elif key in QUIT:
            stop.set()

    found = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, read)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, found)
