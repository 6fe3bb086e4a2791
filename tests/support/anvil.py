"""A real Ethereum node for tests: anvil, a process of its own, that mines and reorganises when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROGRAM = Path(os.environ.get("ANVIL", Path(__file__).parent.parent.parent / ".tools/anvil/anvil"))

needs_anvil = pytest.mark.skipif(not PROGRAM.exists(), reason="anvil is not installed: scripts/setup-anvil needs npm")


@dataclass
class Anvil:
    """A running node; it has block 0 and mines no other by itself."""

    url: str
    session: aiohttp.ClientSession

    async def call(self, method: str, *params: object) -> object:
        content = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        async with self.session.post(self.url, json=content) as response:
            message = await response.json()
        assert "error" not in message, message
        return message["result"]

    async def mine(self, blocks: int) -> None:
        await self.call("anvil_mine", hex(blocks))

    async def reorganise(self, depth: int) -> None:
        """Replace the newest `depth` blocks by as many others."""
        await self.call("anvil_reorg", depth, [])


@contextlib.asynccontextmanager
async def running_anvil(*options: str) -> AsyncIterator[Anvil]:
    """Start a node on a free port, and kill it at the end."""
    process = await asyncio.create_subprocess_exec(
        *(str(PROGRAM), "--port", "0", "--no-mining", *options), stdin=DEVNULL, stdout=PIPE
    )
    assert process.stdout is not None
    said = b""
    try:
        async with asyncio.timeout(PATIENCE), aiohttp.ClientSession() as session:
            while not (found := re.search(rb"Listening on (\S+)", said)):
                line = await process.stdout.readline()
                assert line, f"anvil ended: {said.decode()}"
                said += line
            drained = asyncio.create_task(process.stdout.read())  # it logs each call, and a full pipe would stop it
            yield Anvil(f"http://{found[1].decode()}", session)
    finally:
        process.kill()
        await process.wait()
    await drained
