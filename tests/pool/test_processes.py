"""The processes of a worker and the links to them, on both event loops: the daemon's, and the one of Python."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest
import uvloop

from pocd.pool.processes import RankLink, find_first
from pocd.worker.messages import Cancel

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("codes", "first"),
    [
        ([1, -9], 1),
        ([-9, 1], 0),
        ([0, 1, 0], 1),
        ([1, 1, -15, -9], 2),
        ([None, 0], 1),
        ([None, None, 1], 2),
        ([None, None], None),
        ([], None),
    ],
)
def test_of_several_processes_the_one_is_named_because_of_which_the_others_ended(
    codes: list[int | None], first: int | None
) -> None:
    assert find_first(codes) == first


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_process_that_is_gone_is_an_error_of_the_system_at_every_message(run: Callable[..., None]) -> None:
    async def send() -> None:
        ours, theirs = socket.socketpair()
        link = RankLink(*await asyncio.open_connection(sock=ours))
        theirs.close()
        for _ in range(3):
            with pytest.raises(OSError, match=r"lost|gone|pipe|reset"):
                await link.send(Cancel([0]))
            await asyncio.sleep(0)

    run(send())
