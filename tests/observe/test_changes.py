"""Changes: whoever waits looks again after each, and misses none."""

import asyncio

from pocd.observe.changes import Changes
from tests.support.waiting import soon


async def test_all_who_wait_are_woken_by_one_change() -> None:
    changes = Changes()
    waiting = [asyncio.create_task(changes.after(0)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    changes.notify()
    assert await soon(asyncio.gather(*waiting)) == [1, 1, 1]


async def test_a_change_before_the_wait_is_not_missed() -> None:
    changes = Changes()
    changes.notify()
    changes.notify()
    assert await soon(changes.after(0)) == 2
    waiting = asyncio.create_task(changes.after(2))
    await asyncio.sleep(0)
    assert not waiting.done(), "there was none since"
    changes.notify()
    assert await soon(waiting) == 3


async def test_a_condition_is_looked_at_first_and_after_each_change() -> None:
    changes, looks = Changes(), 0

    def third() -> bool:
        nonlocal looks
        looks += 1
        return looks == 3

    waiting = asyncio.create_task(changes.until(third))
    for expected in (1, 2, 3):
        await asyncio.sleep(0)
        assert looks == expected
        changes.notify()
    await soon(waiting)


async def test_a_wait_that_is_given_up_leaves_the_others_waiting() -> None:
    changes = Changes()
    first, second = (asyncio.create_task(changes.after(0)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    changes.notify()
    assert await soon(second) == 1
