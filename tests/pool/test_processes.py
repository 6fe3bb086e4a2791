"""The link to a worker's process, on both event loops: the daemon's, and the one of Python."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest
import uvloop

from pocd.pool.processes import RankLink
from pocd.worker.messages import Cancel

if TYPE_CHECKING:
    from collections.abc import Callable


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
