"""Loops that never end: what follows when one of them does."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import NoReturn

import pytest
import structlog

from pocd.process import EndedError
from pocd.tasks import LoopEndedError, run_forever


class LostError(Exception):
    """What a loop fails by."""


run = partial(run_forever, log=structlog.get_logger(), foreseen=(LostError,))


async def wait_forever() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


async def fail(text: str = "lost") -> NoReturn:
    await asyncio.sleep(0)
    raise LostError(text)


async def test_the_first_error_ends_all_loops_and_is_raised_itself() -> None:
    ended = []

    async def other() -> None:
        try:
            await wait_forever()
        finally:
            await asyncio.sleep(0)
            ended.append("other")

    with pytest.raises(LostError, match="lost"):
        await run({"other": other(), "one": fail()})
    assert ended == ["other"]


async def test_of_errors_at_the_same_moment_the_one_named_first_is_raised_and_tells_of_the_others() -> None:
    with pytest.raises(LostError, match="why") as error:
        await run({"receive": fail("why"), "send": fail("broken pipe")})
    assert error.value.__notes__ == ["at the same moment: LostError('broken pipe')"]


async def test_a_keeper_goes_on_after_any_number_of_failures_and_its_timeouts_stay_timeouts() -> None:
    """A TaskGroup would leave a request for cancellation behind at each failure, by which Python 3.11.2 goes wrong."""
    task = asyncio.current_task()
    assert task is not None
    for _ in range(3):
        with pytest.raises(LostError):
            await run({"one": fail()})
        assert task.cancelling() == 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await wait_forever()


async def test_a_loop_that_returns_is_an_error_with_its_name() -> None:
    async def stop() -> None:
        await asyncio.sleep(0)

    with pytest.raises(EndedError, match="the loop 'keep worker 3' returned"):
        await run({"others": wait_forever(), "keep worker 3": stop()})


async def test_a_loop_that_is_cancelled_by_mistake_is_an_error_with_its_name() -> None:
    async def cancelled() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with pytest.raises(LoopEndedError, match="the loop 'keep worker 3' was cancelled"):
        await run({"others": wait_forever(), "keep worker 3": cancelled()})


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_is_heeded_after_all_loops_have_ended_also_while_one_fails(fails: bool) -> None:  # noqa: FBT001 - a case
    """A TaskGroup before Python 3.13 would raise the loop's error alone, and its owner would go on."""
    cleaning, clean = asyncio.Event(), asyncio.Event()
    ended = []

    async def slow() -> None:
        try:
            await wait_forever()
        finally:
            cleaning.set()
            await clean.wait()
            ended.append("slow")

    owner = asyncio.create_task(run({"slow": slow(), "other": fail() if fails else wait_forever()}))
    if fails:
        await cleaning.wait()
    else:
        await asyncio.sleep(0)
    owner.cancel()
    await cleaning.wait()
    owner.cancel()
    await asyncio.sleep(0)
    assert not owner.done()
    clean.set()
    with pytest.raises(asyncio.CancelledError):
        await owner
    assert ended == ["slow"]
