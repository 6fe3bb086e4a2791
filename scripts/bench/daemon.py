"""Measure the daemon: time to the first answer, latency of its API, memory over many batches.

Usage: .venv/bin/python -m scripts.bench.daemon [--batches 10000] [--requests 2000]

It starts development chain, receiver and daemon as real processes with the bundled model. Every
nonce is valid (r_target = 2) and every proof is a batch of its own, so that batches come fast.
Latency is measured by one client that asks again and again while the worker computes on all cores.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

from pocd.admin.client import AdminError, call
from pocd.dev.processes import started

CONFIG = """\
[node]
public_key = "measure"
[chain]
urls = ["{chain}"]
poll_interval = 0.5
[round]
every = 1
duration = 1
r_target = 2.0
seq_len = 16
[model]
name = "bundled:tiny-llama"
dtype = "float32"
device = "cpu"
[worker]
batch_size = 32
[delivery]
receivers = [{{ name = "local", url = "{receiver}" }}]
batch_nonces = 1
batch_seconds = 0.1
[admin]
port = {port}
[store]
path = "{folder}/outbox.db"
[log]
format = "json"
"""
PORT = 18460
STATUS = "/api/v1/pow/status"


def resident(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6


async def first_answer(url: str) -> float:
    """Ask until the API answers; returns the monotonic time of the answer."""
    while True:
        try:
            await call(url, "GET", "/healthz")
            return time.monotonic()
        except AdminError:
            await asyncio.sleep(0.005)


async def latencies(url: str, requests: int) -> list[float]:
    """Ask for the status `requests` times, one after another: milliseconds each, ascending."""
    found = []
    async with aiohttp.ClientSession() as session:
        for _ in range(requests):
            began = time.perf_counter()
            async with session.get(url + STATUS) as response:
                await response.read()
            found.append(1e3 * (time.perf_counter() - began))
    return sorted(found)


async def measure(folder: Path, batches: int, requests: int) -> Table:
    """Run everything and return the table of results."""
    table = Table("what", "measured", title="pocd daemon")
    url = f"http://127.0.0.1:{PORT}"
    async with AsyncExitStack() as stack:
        chain = await stack.enter_async_context(started(folder, "devchain", "--port", "0", "--block-seconds", "60"))
        receiver = await stack.enter_async_context(
            started(folder, "receiver", "--port", "0", "--store", str(folder / "receiver.db"))
        )
        config = folder / "pocd.toml"
        config.write_text(CONFIG.format(chain=chain.url, receiver=receiver.url, port=PORT, folder=folder))
        began = time.monotonic()
        answered = asyncio.create_task(first_answer(url))
        daemon = await stack.enter_async_context(started(folder, "run", "--config", str(config)))
        table.add_row("start to first answer", f"{await answered - began:.2f} s")
        while (await call(url, "GET", STATUS))["total_checked"] < 100:
            await asyncio.sleep(0.1)

        found = await latencies(url, requests)
        p99 = found[int(0.99 * len(found))]
        table.add_row(
            f"status, {requests} requests while mining",
            f"median {statistics.median(found):.1f} ms, p99 {p99:.1f} ms, worst {found[-1]:.1f} ms",
        )
        began, delivered = time.monotonic(), 0
        for step in range(5):
            goal = batches * step // 4
            while True:
                body = await call(url, "GET", STATUS)
                delivered = body["receivers"][0]["delivered_batches"]
                if delivered >= goal:
                    break
                await asyncio.sleep(0.2)
            daemon_mb, worker_mb = resident(daemon.process.pid), resident(body["worker"]["pid"])
            table.add_row(f"memory after {delivered} batches", f"daemon {daemon_mb:.0f} MB, worker {worker_mb:.0f} MB")
        table.add_row("batches delivered", f"{delivered / (time.monotonic() - began):.0f} per second")
        await daemon.end()
    return table


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the daemon as a whole.")
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Console().print(asyncio.run(measure(Path(folder), arguments.batches, arguments.requests)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
