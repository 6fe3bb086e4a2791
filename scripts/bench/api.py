"""Measure the admin API while the daemon mines: under a steady load of status, and beset by silent connections.

Usage: python -m scripts.bench.api status [--rate 500] [--seconds 20] [--rounds 6] [--seq-len 64]
       python -m scripts.bench.api silent [--rate 500] [--seconds 20] [--connections 1000] [--seq-len 64]
       python -m scripts.bench.api both   [the options of both: one after the other, of one daemon]

A real daemon mines on a bundled model. Requests for the status come from another process, each at its time, whether
or not the earlier ones are answered; latency counts from that time, so what waits in a queue shows, and so does up to
1 ms by which the loader's own timers are late.

status: the daemon mines by turns with and without the load. Ratios are medians, each of two turns one after the
other; beside them stand the smallest and the greatest. The loader runs on the same machine: its CPU time stands beside
the daemon's, and what the worker loses to it is part of the ratio.
silent: latencies first without, then with so many connections that were opened and say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from pocd.admin.client import call
from pocd.dev.processes import Running, started
from pocd.protocol.schemes import RANDOM_HEAD_DIM
from pocd.protocol.theory import r_target_for
from scripts.bench.measuring import new_table, ratio, show
from scripts.bench.mining import API, CONFIG, VALID_RATE, MeasuredDaemon

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

MOST_CONNECTIONS = 64  # of the loader, so that its place among others does not decide
MOST_UNDER_WAY = 2000  # requests that wait for an answer or a connection; more are counted as errors
ANSWER_SECONDS = 10.0


# The load, in a process of its own


class LoadGenerator:
    """Requests for the status at a steady rate, over as many connections as that takes."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self._address = (parts.hostname, parts.port)
        self._head = f"GET {API}/status HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._places = asyncio.Semaphore(MOST_CONNECTIONS)
        self.latencies: list[float] = []  # milliseconds
        self.errors: Counter[str] = Counter()

    async def run(self, rate: float, stop: asyncio.Event) -> None:
        """Ask `rate` times a second until told to stop, and wait for the last answers."""
        tasks: set[asyncio.Task[None]] = set()
        began, asked = time.perf_counter(), 0
        while not stop.is_set():
            due = began + asked / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            asked += 1
            if len(tasks) >= MOST_UNDER_WAY:
                self.errors["not sent"] += 1
                continue
            task = asyncio.create_task(self._ask(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        for _, writer in self._idle:
            writer.close()

    async def _ask(self, due: float) -> None:
        async with self._places:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    connection = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
                    reader, writer = connection
                    writer.write(self._head)
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
                    await reader.readexactly(int(length))
            except (OSError, EOFError, ValueError) as error:
                self.errors[type(error).__name__] += 1
                return
            self.latencies.append(1e3 * (time.perf_counter() - due))
            self._idle.append(connection)
            if not head.startswith(b"HTTP/1.1 200 "):
                self.errors[head[9:12].decode()] += 1


async def load(url: str, rate: float) -> None:
    """Generate load until standard input ends; then write latencies and errors as JSON."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, stop.set)
    print("loading", flush=True)
    found = LoadGenerator(url)
    await found.run(rate, stop)
    asyncio.get_running_loop().remove_reader(sys.stdin)
    print(orjson.dumps({"latencies": found.latencies, "errors": found.errors}).decode())


@asynccontextmanager
async def loading(url: str, rate: float, found: list[dict[str, Any]]) -> AsyncIterator[Process]:
    """Run `load` in a process of its own; its results are appended to `found` at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.bench.api", "load", url, "--rate", str(rate)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**26,
    )
    assert process.stdin
    assert process.stdout
    try:
        assert await process.stdout.readline() == b"loading\n"
        yield process
        process.stdin.close()
        found.append(orjson.loads(await process.stdout.readline()))
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def tell(what: str, found: list[dict[str, Any]]) -> None:
    """Print the latencies and the errors of all loads together."""
    latencies = sorted(each for load in found for each in load["latencies"])
    errors = sum((Counter(load["errors"]) for load in found), Counter())
    if not latencies:
        print(f"{what}: no answers; errors: {dict(errors)}")
        return
    p99 = latencies[int(0.99 * len(latencies))]
    print(
        f"{what}: {len(latencies)} answers, p50 {statistics.median(latencies):.2f} ms, p99 {p99:.2f} ms, "
        f"max {latencies[-1]:.2f} ms; errors: {dict(errors) if errors else 0}"
    )


# Measurements


@asynccontextmanager
async def mining_daemon(folder: Path, seq_len: int) -> AsyncIterator[Running]:
    """Run a daemon that mines without a receiver, while the context lasts."""
    async with AsyncExitStack() as stack:
        chain = await stack.enter_async_context(started(folder, "devchain", "--port", "0", "--block-seconds", "5"))
        config = folder / "pocd.toml"
        config.write_text(
            CONFIG.format(
                chain=chain.url,
                r_target=r_target_for(VALID_RATE, RANDOM_HEAD_DIM),
                seq_len=seq_len,
                receivers="",
                store=folder / "outbox.db",
            )
        )
        daemon = await stack.enter_async_context(started(folder, "run", "--config", str(config)))
        yield daemon
        await daemon.end()


async def status(options: argparse.Namespace, daemon: Running) -> None:
    """Measure latencies of the status, and how much they slow mining down."""
    found: list[dict[str, Any]] = []
    pid = daemon.process.pid
    quiet, loaded = MeasuredDaemon(daemon, [pid]), MeasuredDaemon(daemon, [pid])
    await quiet.mine(min(options.seconds, 2), options.warm_up)
    del quiet.rates[:], quiet.loads[:]
    for turn in range(options.rounds):
        for miner in (quiet, loaded) if turn % 2 else (loaded, quiet):
            if miner is quiet:
                await miner.mine(options.seconds, options.warm_up)
                continue
            async with loading(daemon.url, options.rate, found) as loader:
                miner.pids[1:] = [loader.pid]
                await miner.mine(options.seconds, options.warm_up)
    table = new_table(
        f"mining with and without {options.rate:g} requests/s, {options.rounds} turns of {options.seconds:g} s each",
        *("load", "nonces/s", "min–max", "with/without", "min–max", "daemon's CPU", "loader's"),
    )
    for name, miner in (("none", quiet), ("status", loaded)):
        spread = f"{min(miner.rates):.1f}–{max(miner.rates):.1f}"
        ratios = ("", "") if miner is quiet else ratio(miner.rates, quiet.rates)
        loads = [f"{statistics.median(load):.1%}" for load in zip(*miner.loads, strict=True)]
        table.add_row(name, f"{statistics.median(miner.rates):.1f}", spread, *ratios, *loads)
    show(table)
    tell("status while mining", found)


def is_open(client: socket.socket) -> bool:
    """Tell whether the other side has left a silent connection open."""
    with contextlib.suppress(ConnectionError):
        try:
            client.recv(1)
        except BlockingIOError:
            return True
    return False


async def silent(options: argparse.Namespace, daemon: Running) -> None:
    """Measure latencies of the status without and with silent connections."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    await call(daemon.url, "POST", f"{API}/resume")
    while (await call(daemon.url, "GET", f"{API}/status"))["total_checked"] == 0:
        await asyncio.sleep(0.05)
    alone: list[dict[str, Any]] = []
    async with loading(daemon.url, options.rate, alone):
        await asyncio.sleep(options.seconds)
    tell("nobody else", alone)
    parts = urlsplit(daemon.url)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_SECONDS))
            for _ in range(options.connections)
        ]
        for client in clients:
            client.setblocking(False)
        await call(daemon.url, "GET", f"{API}/status")  # it is answered when all of them were taken up
        print(f"silent connections still open: {sum(map(is_open, clients))} of {len(clients)}")
        beset: list[dict[str, Any]] = []
        async with loading(daemon.url, options.rate, beset):
            await asyncio.sleep(options.seconds)
        tell(f"beside {len(clients)} silent connections", beset)


PARTS = {"status": [status], "silent": [silent], "both": [status, silent]}


async def measure(options: argparse.Namespace, folder: Path) -> None:
    """Measure the parts that a command has, of one daemon."""
    async with mining_daemon(folder, options.seq_len) as daemon:
        for part in PARTS[options.command]:
            await part(options, daemon)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, parts in PARTS.items():
        part = commands.add_parser(name)
        part.add_argument("--rate", type=float, default=500.0, help="requests a second")
        part.add_argument("--seconds", type=float, default=20.0, help="of a turn")
        part.add_argument("--seq-len", type=int, default=64)
        if status in parts:
            part.add_argument(
                "--warm-up", type=float, default=2.0, help="seconds of a turn that do not count, at first"
            )
            part.add_argument("--rounds", type=int, default=6)
        if silent in parts:
            part.add_argument("--connections", type=int, default=1000)
    part = commands.add_parser("load")  # what the measurements start as a process of its own
    part.add_argument("url")
    part.add_argument("--rate", type=float, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure, and print."""
    options = parse()
    if options.command == "load":
        asyncio.run(load(options.url, options.rate))
        return
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(options, Path(folder)))


if __name__ == "__main__":
    main()
