"""A picture on the terminal that is drawn again and again until its reader has seen enough."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.live import Live

from pocd.cli.api import echo
from pocd.tasks import first_error

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

DRAW_SECONDS = 0.5  # between two pictures; ages go on while nothing is asked
QUIT = {b"q", b"Q", b"\x04"}


@dataclass(frozen=True, slots=True)
class _Fitting:
    """A picture that is told the terminal's height, which rich's `Live` keeps to itself, so that it can fit."""

    picture: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.picture, options.update(height=options.size.height))


def is_drawable(console: Console) -> bool:
    """Tell whether standard output is a terminal that pictures can be drawn on."""
    return sys.stdout.isatty() and not console.is_dumb_terminal


def print_once(picture: RenderableType, console: Console) -> None:
    """Print a picture, which must be clean of what others wrote."""
    with console.capture() as captured:
        console.print(picture)
    echo(captured.get().rstrip("\n"), keep="\033")  # of colours that were asked for


async def draw(
    picture: Callable[[], RenderableType], console: Console, followers: dict[str, Coroutine[Any, Any, None]]
) -> None:
    """Draw what `picture` returns until q, Ctrl-C or SIGTERM.

    Args:
        picture: Called for each drawing.
        console: Terminal to draw on.
        followers: Coroutines by name, which keep up to date what is drawn, and run meanwhile.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with asyncio.TaskGroup() as group:
            following = [group.create_task(each, name=name) for name, each in followers.items()]
            with _keys(stop), Live(console=console, screen=True, auto_refresh=False) as live:
                while not stop.is_set():
                    live.update(_Fitting(picture()), refresh=True)
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
