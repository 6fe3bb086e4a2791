"""Measure what delivery costs mining: two real daemons, with and without the reference receiver, by turns."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocd.admin.client import call
from pocd.dev.processes import Running, started
from pocd.protocol.schemes import RANDOM_HEAD_DIM
from pocd.protocol.theory import r_target_for
from scripts.bench.measuring import cpu_seconds, new_table, ratio, show

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

API = "/api/v1/pow"
VALID_RATE = 0.1  # one nonce in ten counts
CONFIG = """\
[node]
public_key = "bench"
[chain]
urls = ["{chain}"]
poll_interval = 0.5
[round]
every = 1
duration = 1
r_target = {r_target}
seq_len = {seq_len}
[model]
name = "bundled:tiny-qwen3"
dtype = "float32"
device = "cpu"
[delivery]
receivers = [{receivers}]
batch_seconds = 1.0
[admin]
port = 0
[store]
path = "{store}"
[log]
format = "json"
"""


@dataclass
class MeasuredDaemon:
    """A daemon that mines in its turns.

    Attributes:
        pids: Process ids of the daemon and of its receiver, where it has one; the worker is another process.
        rates: Nonces per second in each turn.
        loads: CPU time per second of each of `pids` in each turn.
    """

    daemon: Running
    pids: list[int]
    rates: list[float] = dataclasses.field(default_factory=list)
    loads: list[list[float]] = dataclasses.field(default_factory=list)

    async def mine(self, seconds: float, warm_up: float) -> None:
        """Mine for a while, alone, and note how fast. What is counted begins and ends with a commit."""
        await call(self.daemon.url, "POST", f"{API}/resume")
        await self._commit()
        await asyncio.sleep(warm_up)
        before, began = await self._commit()
        used = [cpu_seconds(pid) for pid in self.pids]
        await asyncio.sleep(seconds)
        after, ended = await self._commit()
        self.rates.append((after - before) / (ended - began))
        self.loads.append(
            [(cpu_seconds(pid) - cpu) / (ended - began) for pid, cpu in zip(self.pids, used, strict=True)]
        )
        await call(self.daemon.url, "POST", f"{API}/stop")

    async def _checked(self) -> int:
        body = await call(self.daemon.url, "GET", f"{API}/status")
        checked = body["funnel"]["checked"]
        assert isinstance(checked, int)
        return checked

    async def _commit(self) -> tuple[int, float]:
        """Wait until nonces are committed; returns how many were so far, and the monotonic time."""
        before = await self._checked()
        while (checked := await self._checked()) == before:
            await asyncio.sleep(0.02)
        return checked, time.monotonic()


async def mine_in_turns(options: argparse.Namespace, folder: Path) -> dict[str, MeasuredDaemon]:
    """Start both daemons and let them mine by turns."""
    async with AsyncExitStack() as stack:
        chain = await stack.enter_async_context(started(folder, "devchain", "--port", "0", "--block-seconds", "5"))
        receiver = await stack.enter_async_context(
            started(folder, "receiver", "--port", "0", "--store", str(folder / "receiver.db"))
        )
        receivers = {"none": "", "reference": f'{{ name = "local", url = "{receiver.url}" }}'}
        miners = {}
        for name, value in receivers.items():
            home = folder / name
            home.mkdir()
            config = home / "pocd.toml"
            config.write_text(
                CONFIG.format(
                    chain=chain.url,
                    r_target=r_target_for(VALID_RATE, RANDOM_HEAD_DIM),
                    seq_len=options.seq_len,
                    receivers=value,
                    store=home / "outbox.db",
                )
            )
            daemon = await stack.enter_async_context(started(home, "run", "--config", str(config)))
            pids = [daemon.process.pid, *([receiver.process.pid] if value else [])]
            miners[name] = MeasuredDaemon(daemon, pids)
            await miners[name].mine(min(options.seconds, 2), options.warm_up)
            del miners[name].rates[:], miners[name].loads[:]
        for turn in range(options.rounds):
            for miner in list(miners.values())[:: 1 if turn % 2 else -1]:
                await miner.mine(options.seconds, options.warm_up)
        for miner in miners.values():
            await miner.daemon.end()
    return miners


def mining(options: argparse.Namespace, folder: Path) -> None:
    """Measure what delivery costs mining."""
    miners = asyncio.run(mine_in_turns(options, folder))
    table = new_table(
        f"mining with and without a receiver, {options.rounds} turns of {options.seconds:g} s each",
        *("receiver", "nonces/s", "min–max", "with/without", "min–max", "daemon's CPU", "receiver's"),
    )
    without = miners["none"].rates
    for name, miner in miners.items():
        rate = statistics.median(miner.rates)
        spread = f"{min(miner.rates):.1f}–{max(miner.rates):.1f}"
        ratios = ("", "") if name == "none" else ratio(miner.rates, without)
        loads = [f"{statistics.median(load):.1%}" for load in zip(*miner.loads, strict=True)]
        table.add_row(name, f"{rate:.1f}", spread, *ratios, *loads)
    show(table)
