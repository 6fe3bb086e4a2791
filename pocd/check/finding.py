"""Findings of checks, and limits that keep a check from hanging."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from pocd.observe.mask import excerpt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


class Level(StrEnum):
    """Severity of a finding: green, nothing to do; yellow, look at it; red, it will not work."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        name: Subject of the check, such as "clock" or "receiver main".
        level: Severity.
        text: Result on one line, without secrets.
        remedy: Action to take; None where there is none.
    """

    name: str
    level: Level
    text: str
    remedy: str | None = None


def green(name: str, text: str) -> Finding:
    """Return a finding about something that works."""
    return Finding(name, Level.GREEN, text)


def yellow(name: str, text: str, remedy: str) -> Finding:
    """Return a finding about something that works or may work, but should be looked at."""
    return Finding(name, Level.YELLOW, text, remedy)


def red(name: str, text: str, remedy: str) -> Finding:
    """Return a finding about something that will not work."""
    return Finding(name, Level.RED, text, remedy)


async def bounded(name: str, check: Awaitable[list[Finding]], limit: float) -> list[Finding]:
    """Return what `check` finds; that it takes longer than `limit` seconds, or fails itself, is a red finding too."""
    try:
        async with asyncio.timeout(limit):
            return await check
    except TimeoutError:
        return [red(name, f"no result within {limit:g} s", "find out what hangs: a disk, a driver or the network")]
    except Exception as error:  # noqa: BLE001 - a check that fails must not hide what the others find
        text = type(error).__name__ if "://" in str(error) else f"{type(error).__name__}: {excerpt(str(error), 160)}"
        return [red(name, f"the check itself failed: {text}", "this is a defect of pocd; please report it")]


async def in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that keeps nobody from going on: a disk or a driver may hang for ever."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def report(result: T | None, error: Exception | None) -> None:
        if done.done():
            return  # nobody waits any more
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type] # T may be None itself

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001 - raised again where it is waited for
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(report, result, error)

    threading.Thread(target=run, name="check", daemon=True).start()
    return await done
