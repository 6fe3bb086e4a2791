"""Measure delivery: beside dead receivers, over growing backlogs, and what it costs mining.

Usage: python -m scripts.bench.delivery throughput [--batches 1000] [--nonces 20 1000] [--rounds 7]
       python -m scripts.bench.delivery backlog [--batches 100 10000 100000] [--nonces 20] [--rounds 3]
       python -m scripts.bench.delivery mining [--seconds 20] [--rounds 6] [--seq-len 64]

throughput: batches from a filled store to one fast receiver, a process of its own that answers 200; alone, and with a
second receiver that refuses connections, or accepts them and never answers. In turns, each on a fresh copy. What the
second one does not take stays pending, which is less to write than marking all of it delivered: so there is also its
queue without anybody who sends from it.
backlog: what depends on how much is pending, in a process of its own for each size and round.
mining: two real daemons, one with the reference receiver and one with none, of which one at a time mines; beside the
rates stands the CPU time of daemon and receiver, in cores, which tells more where other programs run.

Rates are medians over the rounds. Ratios are medians too, each of two samples taken one after the other, so that a
machine that others use too distorts them least; beside them stand the smallest and the greatest.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import structlog
import uvloop
from aiohttp import web

from pocd.clock import SYSTEM
from pocd.delivery.dispatcher import Dispatcher
from pocd.delivery.posting import Receiver
from pocd.http.server import listening
from pocd.observe.events import Events
from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs, Round
from pocd.store import deliveries, upkeep
from pocd.store.batches import form_batches
from pocd.store.outbox import Outbox, Work
from pocd.store.proofs import CheckedSpan, Weights, commit_spans
from pocd.store.thread import OutboxThread
from scripts.bench.measuring import in_turns, new_table, ratio, resident, show
from scripts.bench.mining import mining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from structlog.typing import FilteringBoundLogger

NODE = Node(0, 1)
FAST, DEAD = "fast", "dead"
BATCHES_OF_ROUND = 10
AGAIN = ("-m", "scripts.bench.delivery")  # this program, in a process of its own
FIRST = 1000  # batches whose delivery is timed in `backlog`
MIB = 2**20
SILENT = structlog.make_filtering_bound_logger("critical")


# Stores


def fill(path: Path, receivers: list[str], batches: int, nonces: int) -> None:
    """Make a store with pending batches, as the daemon would, but without waiting for the disk."""
    with closing(Outbox.open(path)) as outbox:
        outbox.db.execute("PRAGMA synchronous = OFF")
        for height, begin in enumerate(range(0, batches, BATCHES_OF_ROUND)):
            count = nonces * min(BATCHES_OF_ROUND, batches - begin)
            round_ = Round(f"{height:064X}", height, "bench", 1.4, "poc2", "bench", 256)
            outbox.begin_round(Work(round_, NODE), time.time())
            proofs = Proofs.of_distances((nonce, 1.25 + nonce / 7e6) for nonce in range(count))
            span = CheckedSpan(round_, NODE, Span(0, count), proofs, Weights("bench", "float32"))
            commit_spans(outbox, [span], time.time())
            while form_batches(outbox, receivers, size=nonces, age=0, now=time.time(), current=None).due:
                pass
        assert all(outbox.queues[name].pending_batches == batches for name in receivers)


def copied(store: Path, copy: Path) -> Path:
    """Copy a store and wait for the disk, else the first commits would wait for it."""
    shutil.copy(store, copy)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    return copy


# Receivers


async def answer() -> None:
    """Take every POST and answer 200, until killed; the first line on standard output is the URL."""

    async def take(request: web.Request) -> web.Response:
        await request.read()
        return web.Response()

    app = web.Application(client_max_size=64 * MIB)
    app.router.add_post("/{path:.*}", take)
    async with listening(app, "127.0.0.1", 0, shutdown_timeout=1) as url:
        print(url, flush=True)
        await asyncio.Event().wait()


@contextmanager
def fast_receiver() -> Iterator[str]:
    """Run `answer` in a process of its own, and give its URL."""
    process = subprocess.Popen([sys.executable, *AGAIN, "answer"], stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
    with process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def dead_receiver(*, stalls: bool) -> Iterator[str]:
    """Give the URL of a port where connections are refused, or one where they are made and nobody reads or writes."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if stalls:
            bound.listen()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


# Delivering


def milliseconds(began: float) -> float:
    """Return the milliseconds since `began`, a time of `time.perf_counter`."""
    return 1e3 * (time.perf_counter() - began)


async def delivering(outbox: OutboxThread, urls: dict[str, str], count: int) -> float:
    """Deliver to all of `urls` until the fast one has `count` batches; returns its batches per second."""
    log: FilteringBoundLogger = structlog.wrap_logger(None, wrapper_class=SILENT)
    dispatchers = [
        Dispatcher(
            Receiver(name, url, None),
            outbox,
            expire_after=7 * 86400,
            clock=SYSTEM,
            jitter=lambda: 0.0,
            log=log,
            events=Events(SYSTEM),
        )
        for name, url in urls.items()
    ]
    tasks = [asyncio.create_task(dispatcher.run()) for dispatcher in dispatchers]

    async def until(least: int) -> tuple[int, float]:
        while (delivered := outbox.view.queues[FAST].delivered_batches) < least:
            await asyncio.sleep(0.002)
            assert not any(task.done() for task in tasks)
        return delivered, time.perf_counter()

    before, began = await until(1)
    after, ended = await until(count)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return (after - before) / (ended - began)


def deliver_copy(store: Path, urls: dict[str, str], batches: int) -> float:
    """Deliver all batches of a fresh copy of `store`; returns batches per second."""
    with tempfile.TemporaryDirectory(dir=store.parent) as folder:
        copy = copied(store, Path(folder) / store.name)
        with closing(OutboxThread(copy)) as outbox, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(delivering(outbox, urls, batches))


def throughput(options: argparse.Namespace, folder: Path) -> None:
    """Measure the rate alone and beside dead receivers."""
    table = new_table(
        f"delivery of {options.batches} batches to one fast receiver, {options.rounds} rounds",
        *("beside it", "nonces each", "batches/s", "nonces/s", "of alone", "min–max", "of queue only", "min–max"),
    )
    with ExitStack() as stack:
        fast = {FAST: stack.enter_context(fast_receiver())}
        urls = {
            "alone": fast,
            "queue only": fast,
            "refuses": fast | {DEAD: stack.enter_context(dead_receiver(stalls=False))},
            "stalls": fast | {DEAD: stack.enter_context(dead_receiver(stalls=True))},
        }
        for nonces in options.nonces:
            one, two = folder / f"one-{nonces}.db", folder / f"two-{nonces}.db"
            fill(one, [FAST], options.batches, nonces)
            fill(two, [FAST, DEAD], options.batches, nonces)
            rates = in_turns(
                options.rounds,
                {
                    name: partial(deliver_copy, one if name == "alone" else two, urls[name], options.batches)
                    for name in urls
                },
            )
            for name, found in rates.items():
                rate = statistics.median(found)
                ratios = [*ratio(found, rates["alone"]), *ratio(found, rates["queue only"])]
                table.add_row(name, str(nonces), f"{rate:.0f}", f"{rate * nonces:,.0f}", *ratios)
    show(table)


# Backlog


def opened(store: Path, url: str) -> dict[str, float]:
    """Open a store with a backlog, look at it as the keeper does, deliver the first batches; returns the figures."""
    found: dict[str, float] = {"empty MB": resident(os.getpid())}
    began = time.perf_counter()
    outbox = OutboxThread(store)
    found["open ms"] = milliseconds(began)
    found["open MB"] = resident(os.getpid())
    count = min(FIRST, outbox.view.queues[FAST].pending_batches)
    with closing(outbox), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        def timed(method: Callable[..., object], *args: object, **kwargs: object) -> float:
            began = time.perf_counter()
            runner.run(outbox(method, *args, **kwargs))
            return milliseconds(began)

        found["clamp ms"] = timed(upkeep.clamp_times, time.time())

        def look() -> float:
            return (
                timed(upkeep.prune_delivered, time.time() - 86400)
                + timed(upkeep.prune_rounds)
                + timed(upkeep.used_bytes)
                + timed(deliveries.expire, FAST, queued_before=0.0, now=time.time())
            )

        found["look ms"] = statistics.median(look() for _ in range(5))
        found["batches/s"] = runner.run(delivering(outbox, {FAST: url}, count))
        found["delivering MB"] = resident(os.getpid())
        found["prune ms"] = timed(upkeep.prune_delivered, time.time() + 1)
        found["expire ms"] = timed(deliveries.expire, FAST, queued_before=time.time() + 1, now=time.time())
    return found


def backlog(options: argparse.Namespace, folder: Path) -> None:
    """Measure steps that should not depend on the number of pending batches."""
    stores = {count: folder / f"{count}.db" for count in options.batches}
    for count, store in stores.items():
        fill(store, [FAST], count, options.nonces)
    samples: dict[int, list[dict[str, float]]] = {count: [] for count in stores}
    with fast_receiver() as url:
        for _ in range(options.rounds):
            for count, store in stores.items():
                command = [sys.executable, *AGAIN, "opened", str(copied(store, folder / "copy.db")), url]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # noqa: S603 - ourselves
                samples[count].append(orjson.loads(done.stdout))
    rows = {
        "Outbox.open": "open ms",
        "memory before": "empty MB",
        "memory, opened": "open MB",
        f"memory, {FIRST:,} delivered": "delivering MB",
        f"first {FIRST:,}: batches/s": "batches/s",
        "keeper's look, nothing due": "look ms",
        f"prune {FIRST:,} delivered": "prune ms",
        f"expire {deliveries.CHUNK:,}": "expire ms",
        "clamp (start, clock set back)": "clamp ms",
    }
    table = new_table(f"batches of {options.nonces} nonces pending, {options.rounds} rounds", "what")
    for count, store in stores.items():
        table.add_column(f"{count:,}\n{store.stat().st_size / MIB:.0f} MiB", justify="right")
    for name, key in rows.items():
        unit = key.partition(" ")[2]
        middle = [statistics.median(sample[key] for sample in found) for found in samples.values()]
        table.add_row(name, *(f"{value:.{0 if value >= 20 else 1}f} {unit}".strip() for value in middle))
    show(table)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where stores are made, on the disk that is meant; default: /tmp")
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("throughput", help="beside dead receivers")
    part.add_argument("--batches", type=int, default=1000)
    part.add_argument("--nonces", type=int, nargs="+", default=[20, 1000], help="of a batch")
    part.add_argument("--rounds", type=int, default=7)
    part = commands.add_parser("backlog", help="over growing backlogs")
    part.add_argument("--batches", type=int, nargs="+", default=[100, 10_000, 100_000])
    part.add_argument("--nonces", type=int, default=20, help="of a batch")
    part.add_argument("--rounds", type=int, default=3)
    part = commands.add_parser("mining", help="beside mining")
    part.add_argument("--seconds", type=float, default=20.0, help="of a turn")
    part.add_argument("--warm-up", type=float, default=2.0, help="seconds at a turn's beginning that do not count")
    part.add_argument("--rounds", type=int, default=6)
    part.add_argument("--seq-len", type=int, default=64)
    # What the measurements start as processes of their own.
    commands.add_parser("answer")
    part = commands.add_parser("opened")
    part.add_argument("store", type=Path)
    part.add_argument("url")
    return parser.parse_args()


def main() -> None:
    """Measure, and print."""
    options = parse()
    if options.command == "answer":
        asyncio.run(answer())
    elif options.command == "opened":
        print(orjson.dumps(opened(options.store, options.url)).decode())
    else:
        parts: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
            "throughput": throughput,
            "backlog": backlog,
            "mining": mining,
        }
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            parts[options.command](options, Path(folder))


if __name__ == "__main__":
    main()
