"""How tests wait: for what has to happen, and never for a time to pass."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

PATIENCE = 600.0
"""Seconds until a test gives up, so that one that fails ends. No test measures time, and a busy machine fails none."""


async def soon(awaitable: Awaitable[T]) -> T:
    """Wait for what has to happen."""
    return await asyncio.wait_for(awaitable, PATIENCE)


async def until(condition: Callable[[], object]) -> None:
    """Wait until something holds that wakes nobody: the kernel's doings, or another process's."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - as said above
            await asyncio.sleep(0.02)
