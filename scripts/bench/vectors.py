"""Measure what vectors cost the daemon at a given rate: its share of a core, bytes on the disk, deliveries.

Usage: python -m scripts.bench.vectors [--rate 5000] [--seconds 60] [--batch 32] [--folder FOLDER]

Everything of the daemon is real but the worker and the API: a miner that commits in groups, the store, the batcher, and
a dispatcher that delivers to a receiver in a process of its own. A worker's messages, as they come over its socket, are
made beforehand and decoded here, at the pace that the rate asks for.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from base64 import b64decode
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import structlog
import uvloop

from pocd.clock import SYSTEM
from pocd.delivery.batcher import Batcher
from pocd.delivery.dispatcher import Dispatcher
from pocd.delivery.posting import Receiver
from pocd.delivery.receivers import Receivers
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.protocol.schemes import VECTOR_SIZE
from pocd.protocol.vectors import encode_vectors
from pocd.store.outbox import Work
from pocd.store.proofs import Weights
from pocd.store.thread import OutboxThread
from pocd.store.upkeep import used_bytes
from pocd.worker import frames, messages
from scripts.bench.delivery import SILENT, fast_receiver
from scripts.bench.measuring import new_table, show

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

ROUND = Round("9F" * 32, 1, "bench", None, "poc4", "bench", 256)
WEIGHTS = Weights("f00d" * 8, "bfloat16")
MESSAGES = 64  # of random vectors, again and again


@dataclass(frozen=True, slots=True)
class Found:
    """What a run used and did."""

    proofs: int
    delivered: int
    seconds: float
    core_seconds: float
    bytes: int


async def run(outbox: OutboxThread, url: str, options: argparse.Namespace) -> Found:
    """Feed a miner for so many seconds, and deliver what it finds."""
    log: FilteringBoundLogger = structlog.wrap_logger(None, wrapper_class=SILENT)
    events, miner = Events(SYSTEM), Miner(outbox, Changes(), clock=SYSTEM)

    def dispatcher(receiver: Receiver) -> Dispatcher:
        return Dispatcher(
            receiver, outbox, expire_after=86_400, clock=SYSTEM, jitter=lambda: 0.0, log=log, events=events
        )

    receivers = Receivers(
        [Receiver("fast", url, None)], dispatcher, outbox, origins=[], at_work=miner.rounds_at_work, log=log
    )
    batcher = Batcher(
        miner,
        outbox,
        receivers,
        size=1000,
        age=5.0,
        withdraw=False,
        clock=SYSTEM,
        jitter=lambda: 1.0,
        events=events,
    )
    await miner.set_round(Work(ROUND, Node(0, 1)))
    tasks = [asyncio.create_task(each) for each in (batcher.run(), *(each.run() for each in receivers))]
    chance = np.random.default_rng(1)
    answers = [
        frames.encode(messages.Vectors(number, encode_vectors(chance.normal(size=(options.batch, VECTOR_SIZE)))))
        for number in range(MESSAGES)
    ]
    stream = asyncio.StreamReader()
    began, cpu = time.perf_counter(), time.process_time()
    commits: list[asyncio.Task[None]] = []
    for number in range(options.rate * options.seconds // options.batch):
        await asyncio.sleep(began + number * options.batch / options.rate - time.perf_counter())
        lease = await miner.lease(options.batch)
        stream.feed_data(answers[number % MESSAGES])
        message = await frames.receive(stream)
        assert isinstance(message, messages.Vectors)
        commits = [*commits[-1:], miner.complete(lease, b64decode(message.vectors), WEIGHTS)]
    await commits[-1]
    seconds, core = time.perf_counter() - began, time.process_time() - cpu
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    totals = outbox.view.totals
    return Found(totals.valid, totals.delivered, seconds, core, await outbox(used_bytes))


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=int, default=5000, help="proofs per second")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32, help="nonces in a worker's batch")
    parser.add_argument("--folder", type=Path, help="where the store is made, on the disk that is meant; default: /tmp")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        fast_receiver() as url,
        closing(OutboxThread(Path(folder) / "outbox.db")) as outbox,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        found = runner.run(run(outbox, url, options))
    title = f"vectors at {options.rate:,} proofs/s for {options.seconds} s, batches of {options.batch}"
    table = new_table(title, "what")
    table.add_column("", justify="right")
    table.add_row("proofs/s committed", f"{found.proofs / found.seconds:,.0f}")
    table.add_row("proofs/s delivered", f"{found.delivered / found.seconds:,.0f}")
    table.add_row("share of a core", f"{found.core_seconds / found.seconds:.1%}")
    table.add_row("bytes per proof on disk", f"{found.bytes / found.proofs:.1f}")
    show(table)


if __name__ == "__main__":
    main()
