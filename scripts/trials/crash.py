"""Kill the daemon again and again on one store, then count: is any proof lost, or any doubled?

Usage: .venv/bin/python -m scripts.trials.crash [--runs 300] [--seed 1] [--scheme poc2] [--folder FOLDER]

Development chain, receiver and daemon are real processes. The daemon mines a bundled model, every nonce of which is
valid; each run ends it with SIGKILL, from outside at a random moment or inside at a fail point (failpoints.py). What
is to happen follows from the seed; when it happens, from the machine. At the end the daemon runs once more, delivers
what is left and is ended well, and crash_verdict.py holds its store against what the receiver holds.

SIGTERM or Ctrl-C ends the run under way and leaves out the others: what was done is delivered and judged all the same,
and the exit status is 1. A second one ends everything at once, without a verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from pocd.admin.client import AdminError, call
from pocd.dev.processes import Running, launch, started
from pocd.process import EXIT_OK, EndedError
from pocd.protocol.schemes import SCHEMES
from pocd.tasks import cancel
from scripts.trials.crash_verdict import CrashVerdict, judge
from scripts.trials.failpoints import MINING, Point

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Coroutine

CONFIG = """\
[node]
public_key = "crash-key"
node_id = 1
node_count = 3
[chain]
urls = ["{chain}"]
poll_interval = 0.2
[round]
every = 1
duration = 1
scheme = "{scheme}"{r_target}
seq_len = 16
[model]
name = "bundled:tiny-llama"
dtype = "float32"
device = "cpu"
[worker]
batch_size = 8
[delivery]
receivers = [{{ name = "witness", url = "{receiver}", secret_file = "{folder}/secret" }}]
batch_nonces = 3
batch_seconds = 0.1
[admin]
port = 0
[store]
path = "{folder}/outbox.db"
free_space_mib = 0
[log]
format = "json"
"""
SECRET = "whsec_Y3Jhc2ggcnVucyBuZWVkIG5vIHNlY3JldCB3b3J0aCBrZWVwaW5n"  # noqa: S105 - of this receiver only
STATUS = "/api/v1/pow/status"
BLOCK_SECONDS = 0.7
LIFE_SECONDS = 600.0  # until a daemon that did not pass its fail point is killed from outside
STALLED_SECONDS = 300.0  # without a delivery, at the end: more than the longest wait between two attempts

Service = Literal["up", "frozen", "down"]
"""State of the receiver while the daemon runs; a frozen one accepts connections and is silent (SIGSTOP)."""


@dataclass(frozen=True, slots=True)
class Run:
    """One life of the daemon.

    Attributes:
        point: Point at which the daemon is killed; None for a random moment.
        passing: Number of passes of the point until the kill.
        mining: Whether passes and seconds count from the first nonces on, else from the daemon's start.
        after: Seconds until the random moment.
        service: State of the receiver meanwhile.
    """

    point: Point | None
    passing: int
    mining: bool
    after: float
    service: Service


def plan(runs: int, seed: int) -> list[Run]:
    """Draw the runs: each kind of kill equally often, every point among the first five."""
    chance = random.Random(seed)  # noqa: S311 - it has to be repeatable, not secret
    services: list[Service] = []
    while len(services) < runs:
        kind: Service = chance.choices(("up", "frozen", "down"), (6, 2, 2))[0]
        services += [kind] * chance.randint(1, 2 if kind == "down" else 6)  # a long outage makes long waits
    planned: list[Run] = []
    kinds: list[Point | None] = []
    for service in services[:runs]:
        if not kinds:
            kinds = [*Point, None]
            chance.shuffle(kinds)
        point = kinds.pop()
        mining = point is Point.AFTER_FORMING or chance.random() < 0.35  # the others are over in a second
        planned.append(
            Run(
                point,
                passing=chance.randint(1, 40 if mining else 8),
                mining=mining,
                after=chance.uniform(0, 1.0 if mining else 3.0),
                service="up" if point is Point.AFTER_POST else service,
            )
        )
    return planned


@dataclass(slots=True)
class Witness:
    """The receiver, which can be frozen, or ended and started again on its port."""

    folder: Path
    port: int
    service: Service = "down"
    _process: Running | None = None
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def url(self) -> str:
        """URL of the receiver, whenever it is up."""
        return f"http://127.0.0.1:{self.port}"

    async def be(self, service: Service) -> None:
        """Bring the receiver into a state."""
        if self._process and self.service == "frozen":
            self._process.process.send_signal(signal.SIGCONT)
        if self._process and service == "down":
            await self._process.end()
            await self._stack.aclose()
            self._process = None
        if not self._process and service != "down":
            options = ("--port", str(self.port), "--store", str(self.folder / "receiver.db"))
            secret = ("--secret-file", str(self.folder / "secret"))
            self._process = await self._stack.enter_async_context(started(self.folder, "receiver", *options, *secret))
        if self._process and service == "frozen":
            self._process.process.send_signal(signal.SIGSTOP)
        self.service = service


@contextlib.asynccontextmanager
async def _witness(folder: Path) -> AsyncIterator[Witness]:
    """Give a receiver while the context lasts; it is down at first."""
    with socket.socket() as keeper:  # keeps the port from others while nobody listens there
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        witness = Witness(folder, keeper.getsockname()[1])
        try:
            yield witness
        finally:
            await witness.be("down")


@dataclass(slots=True)
class Crash:
    """The runs so far: how they ended, and in how many the daemon mined."""

    folder: Path
    config: Path
    kills: Counter[str] = field(default_factory=Counter)
    mined: int = 0

    async def run(self, run: Run, number: int) -> None:
        """Start the daemon and wait until it is killed."""
        log = self.folder / f"run-{number}.log"
        point = run.point.value if run.point else "before commit"
        passing, begin = (run.passing, "mining" if run.mining else "start") if run.point else (0, "mining")  # 0: never
        command = ("-m", "scripts.trials.failpoints", point, str(passing), begin, "run", "--config", str(self.config))
        daemon = await launch(log, *command)
        try:
            ended_by = await self._killed(daemon, run, log)
        finally:
            if daemon.returncode is None:
                daemon.kill()
                await daemon.wait()
        if daemon.returncode != -signal.SIGKILL:
            raise EndedError(1, f"run {number} ({run}) ended with {daemon.returncode}; see {log}")
        self.kills[ended_by] += 1
        self.mined += MINING in log.read_text()
        log.unlink()

    async def _killed(self, daemon: Process, run: Run, log: Path) -> str:
        if run.point is None:
            if run.mining:
                await _until_mining(daemon, log)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(daemon.wait(), run.after)
            daemon.kill()
            await daemon.wait()
            return "at a random moment"
        try:
            await asyncio.wait_for(daemon.wait(), LIFE_SECONDS)
        except TimeoutError:
            daemon.kill()
            await daemon.wait()
            return "point not passed, killed from outside"
        return run.point.value


async def _until_mining(daemon: Process, log: Path) -> None:
    """Wait until the daemon commits nonces."""
    deadline = time.monotonic() + LIFE_SECONDS
    while daemon.returncode is None and time.monotonic() < deadline:
        if MINING in log.read_text():
            return
        await asyncio.sleep(0.05)


async def _drain(folder: Path, config: Path) -> None:
    """Run the daemon as usual: stop mining, deliver everything, end it with SIGTERM."""
    async with started(folder, "run", "--config", str(config)) as daemon:
        await call(daemon.url, "POST", "/api/v1/pow/stop")
        delivered, moved_at = -1, time.monotonic()
        while time.monotonic() - moved_at < STALLED_SECONDS:
            funnel: dict[str, int] = (await call(daemon.url, "GET", STATUS))["funnel"]
            if funnel["delivered"] == funnel["valid"]:
                break
            if funnel["delivered"] > delivered:
                delivered, moved_at = funnel["delivered"], time.monotonic()
            await asyncio.sleep(0.1)
        await daemon.end()


def _asked_to_stop() -> asyncio.Event:
    """Return an event that the first SIGTERM or SIGINT sets; a second one cancels the current task."""
    stop, task, loop = asyncio.Event(), asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None, "called from a task"

    def heed() -> None:
        if stop.is_set():
            task.cancel()  # not an end by the signal itself: no process is to be left behind
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, heed)
    return stop


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do `work`, which is cancelled when `stop` is set; returns whether it was done."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        await cancel((task, stopped))


async def crash(folder: Path, runs: list[Run], console: Console, scheme: str = "poc2") -> tuple[Table, bool]:
    """Do all runs and the last one, which delivers what is left. `judge` compares the stores afterwards.

    Returns:
        A table of the kills and starts, and whether all runs were done.
    """
    stop, done = _asked_to_stop(), 0
    (folder / "secret").write_text(SECRET + "\n")
    config = folder / "pocd.toml"
    options = ("--port", "0", "--block-seconds", str(BLOCK_SECONDS))
    began = time.monotonic()
    async with started(folder, "devchain", *options) as chain, _witness(folder) as witness:
        r_target = "\nr_target = 2.0" if SCHEMES[scheme].output == "distance" else ""
        names = {"chain": chain.url, "receiver": witness.url, "folder": folder}
        config.write_text(CONFIG.format(**names, scheme=scheme, r_target=r_target))
        state = Crash(folder, config)
        for number, run in enumerate(runs, start=1):
            await witness.be(run.service)
            if not await _unless(stop, state.run(run, number)):
                console.print("stopped: what was done is delivered and judged")
                break
            done = number
            if number % 25 == 0:
                console.print(f"{number} of {len(runs)} runs, {time.monotonic() - began:.0f} s")
        await witness.be("up")
        await _drain(folder, config)
    table = Table("what", "count", title=f"crash runs, {time.monotonic() - began:.0f} s")
    for kind in [*(point.value for point in Point), "at a random moment", "point not passed, killed from outside"]:
        table.add_row(f"killed {kind}", str(state.kills[kind]))
    table.add_row("runs", str(done) if done == len(runs) else f"{done} of {len(runs)}")
    table.add_row("of which mined before they were killed", str(state.mined))
    return table, done == len(runs)


def report(table: Table, verdict: CrashVerdict, console: Console) -> int:
    """Print what happened and what was found; returns the exit status."""
    table.add_row("rounds mined", str(verdict.rounds))
    table.add_row("batches stored", str(verdict.batches))
    table.add_row("proofs at the receiver", str(verdict.proofs))
    table.add_row("batches that came to the receiver again", str(verdict.duplicates))
    table.add_row("proofs lost", str(verdict.lost))
    table.add_row("proofs doubled", str(verdict.doubled))
    table.add_row("verdict", "all is well" if not verdict.complaints else "WRONG")
    console.print(table)
    for complaint in verdict.complaints:
        console.print(f"wrong: {complaint}", soft_wrap=True)
    return 1 if verdict.complaints else EXIT_OK


def main() -> int:
    """Run, judge and print."""
    parser = argparse.ArgumentParser(description="Kill the daemon again and again, and count what is lost.")
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scheme", choices=list(SCHEMES), default="poc2", help="that is mined")
    parser.add_argument("--folder", type=Path, help="an empty or missing folder that is kept")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    console.print(f"seed {arguments.seed}, {arguments.runs} runs, scheme {arguments.scheme}")
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            table, complete = asyncio.run(
                crash(folder, plan(arguments.runs, arguments.seed), console, arguments.scheme)
            )
        except (EndedError, AdminError) as error:
            console.print(f"wrong: {error}", soft_wrap=True)
            return 1
        except asyncio.CancelledError:
            console.print("ended before its time")
            return 1
        status = report(table, judge(folder / "outbox.db", folder / "receiver.db"), console)
        return status if complete else 1


if __name__ == "__main__":
    sys.exit(main())
