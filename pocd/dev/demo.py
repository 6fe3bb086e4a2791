"""`pocd demo`: development chain, receiver and daemon as separate processes, watched live.

At the end the daemon is stopped as a service manager would stop it, and what the receiver holds is
compared with what the daemon's store says, nonce by nonce. A sample is recomputed by `pocd compute`.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sqlite3
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from rich.console import Console
from rich.live import Live
from rich.table import Table

from pocd.admin.client import AdminError, call
from pocd.admin.text import funnel_text, percent, progress, rates_text, valid_rate_text
from pocd.dev.processes import started
from pocd.process import EXIT_CONFIG, EXIT_CRASH, EXIT_OK, EndedError
from pocd.protocol.proof import results_in
from pocd.protocol.vectors import decode_vectors
from pocd.store.bodies import unpack_body

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.dev.processes import Running

RECOMPUTE_SECONDS = 600.0  # for `pocd compute`
REFRESH_SECONDS = 0.5
STALLED_SECONDS = 120.0  # without a nonce checked
LINE_SECONDS = 2.0  # between two lines where there is no terminal
RECOMPUTED = 8  # proofs that are computed again
TOLERANCE = 0.005  # of vectors' numbers: they are rounded to float16
SCHEME = "poc4"
SEQ_LEN = 64
CONFIG_NAME = "pocd.toml"

CONFIG = """\
[node]
public_key = "demo-key"
node_id = 1
node_count = 4

[chain]
urls = ["{chain}"]
poll_interval = 0.5

[round]
every = 1
duration = 1
scheme = "{scheme}"
seq_len = {seq_len}

[model]
name = "{model}"
dtype = "float32"
device = "cpu"

[delivery]
receivers = [{{ name = "demo", url = "{receiver}" }}]
batch_seconds = 1.0

[admin]
port = 0

[store]
path = "{store}"

[log]
format = "json"
"""


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """Options of the demo: `blocks` = 0 runs it until it is interrupted; `folder` is emptied first."""

    blocks: int
    block_seconds: float
    model: str
    folder: Path


@dataclass(frozen=True, slots=True)
class DemoVerdict:
    """Result of the comparison at the end: complaints, none when all is well, and the numbers of proofs and rounds."""

    proofs: int
    rounds: int
    complaints: list[str] = field(default_factory=list)


async def run(plan: DemoPlan) -> int:
    """Run the demo and return its exit status: 0 only when proofs were delivered and all of them match.

    Raises:
        EndedError: A process did not start, or ended before its time; the message names its log.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    _empty(plan.folder)
    console = Console(highlight=False)
    console.print(
        f"pocd demo: {plan.model}, a block every {plan.block_seconds:g} s; logs and stores in {plan.folder}",
        soft_wrap=True,
    )
    async with contextlib.AsyncExitStack() as processes:
        chain = await processes.enter_async_context(
            started(plan.folder, "devchain", "--port", "0", "--block-seconds", str(plan.block_seconds))
        )
        receiver = await processes.enter_async_context(
            started(plan.folder, "receiver", "--port", "0", "--store", str(plan.folder / "receiver.db"))
        )
        config = plan.folder / CONFIG_NAME
        config.write_text(
            CONFIG.format(
                chain=chain.url,
                receiver=receiver.url,
                model=plan.model,
                seq_len=SEQ_LEN,
                scheme=SCHEME,
                store=plan.folder / "outbox.db",
            )
        )
        daemon = await processes.enter_async_context(started(plan.folder, "run", "--config", str(config)))
        interrupted = await _watch(plan, daemon, console, stop)
        console.print("stopping the daemon (SIGTERM); it finishes its batches and delivers what is left")
        await daemon.end()
        held = await held_by(receiver.url)
    verdict = await _compare(plan, held)
    return _report(plan, verdict, console, interrupted=interrupted)


def _empty(folder: Path) -> None:
    """Make `folder`, or empty it where it holds an earlier demo; never delete anything else."""
    if folder.exists():
        if any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
            raise EndedError(EXIT_CONFIG, f"{folder} is not empty and holds no earlier demo; choose another --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


async def _watch(plan: DemoPlan, daemon: Running, console: Console, stop: asyncio.Event) -> bool:
    """Show progress until the blocks are mined; returns whether somebody interrupted it."""
    mined: set[int] = set()
    printed_at, checked, moved_at = 0.0, 0, time.monotonic()
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    with live or contextlib.nullcontext():
        while not stop.is_set():
            body = await _status(daemon)
            now, height = time.monotonic(), body["round"]["block_height"] if body["round"] else None
            if body["total_checked"] and height is not None:
                mined.add(height)
            finished = len(mined - {height})
            if live:
                live.update(_table(plan, body, finished), refresh=True)
            elif now - printed_at >= LINE_SECONDS:
                printed_at = now
                console.print(_line(body), soft_wrap=True)
            if plan.blocks and finished >= plan.blocks:
                return False
            if body["funnel"]["checked"] > checked:
                checked, moved_at = body["funnel"]["checked"], now
            if now - moved_at > STALLED_SECONDS:
                raise EndedError(EXIT_CRASH, f"no nonce was checked for {STALLED_SECONDS:.0f} s; see {daemon.log}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_SECONDS):
                    await stop.wait()
    return True


async def _status(daemon: Running) -> dict[str, Any]:
    try:
        return await call(daemon.url, "GET", "/api/v1/pow/status")
    except AdminError as error:
        raise EndedError(EXIT_CRASH, f"the daemon does not answer: {error}; see {daemon.log}") from error


def _line(body: dict[str, Any]) -> str:
    round_ = body["round"]
    height = round_["block_height"] if round_ else None
    line = progress(body["state"], height, body["rates"]["checked_per_second_1m"], body["funnel"])
    return f"{line}; valid rate {valid_rate_text(round_)}" if round_ else line


def _table(plan: DemoPlan, body: dict[str, Any], finished: int) -> Table:
    round_, chain = body["round"], body["chain"]
    overall = percent(body["funnel"]["valid"] / body["funnel"]["checked"] if body["funnel"]["checked"] else None)
    loading = "  (the worker loads torch and the model)" if body["state"] == "LOADING" else ""
    table = Table(show_header=False, title="pocd demo", title_justify="left", min_width=70)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("state", body["state"] + loading)
    table.add_row("block", f"{chain['height'] or '–'}   {(chain['hash'] or '–')[:32]}…")
    if round_:
        table.add_row("round", round_["id"])
        table.add_row("valid rate", f"{valid_rate_text(round_)}; {overall} in all")
    table.add_row("finished", f"{finished} rounds" + (f" of {plan.blocks}" if plan.blocks else ""))
    table.add_row("rate", rates_text(body["rates"]))
    table.add_row("funnel", funnel_text(body["funnel"]))
    table.add_row("end", f"after {plan.blocks} blocks, or Ctrl-C" if plan.blocks else "Ctrl-C")
    return table


async def held_by(url: str) -> list[dict[str, Any]]:
    """Fetch every batch that the receiver holds, page by page."""
    batches: list[dict[str, Any]] = []
    after: int | None = 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        while after is not None:
            async with session.get(f"{url}/batches", params={"after": str(after), "limit": "1000"}) as response:
                page = orjson.loads(await response.read())
            batches += [entry["batch"] for entry in page["batches"]]
            after = page["next"]
    return batches


def _proofs(batches: list[dict[str, Any]]) -> list[tuple[str, str, int, str]]:
    """List (block hash, public key, nonce, vector in base64) of all proofs in `batches`."""
    return [
        (batch["block_hash"], batch["public_key"], nonce, str(vector))
        for batch in batches
        for nonce, vector in results_in(batch)
    ]


async def _compare(plan: DemoPlan, held: list[dict[str, Any]]) -> DemoVerdict:
    """Compare the receiver's proofs with the daemon's store, and a sample with `pocd compute`."""
    with contextlib.closing(sqlite3.connect(plan.folder / "outbox.db")) as store:
        stored = [orjson.loads(unpack_body(body)) for (body,) in store.execute("SELECT body FROM batches")]
        progress = store.execute("SELECT cursor, islands, checked FROM progress").fetchall()
    complaints = []
    theirs, ours = _proofs(held), _proofs(stored)
    if sorted(theirs) != sorted(ours):
        complaints.append(f"the receiver holds {len(theirs)} proofs, the daemon stored {len(ours)}, and they differ")
    if len({proof[:3] for proof in theirs}) != len(theirs):
        complaints.append("a nonce was delivered twice")
    if any(islands != "[]" or checked != cursor for cursor, islands, checked in progress):
        complaints.append("the nonces of a round are not dense")
    complaints += await _recompute(plan, theirs[-RECOMPUTED:])
    return DemoVerdict(len(theirs), len({proof[0] for proof in theirs}), complaints)


async def _recompute(plan: DemoPlan, proofs: list[tuple[str, str, int, str]]) -> list[str]:
    """Recompute those of `proofs` that are of the last one's block, by the command that anyone can run."""
    if not proofs:
        return []
    block_hash, public_key = proofs[-1][:2]
    claimed = {nonce: vector for block, _, nonce, vector in proofs if block == block_hash}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pocd", "compute", "--json", "--model", plan.model, "--seq-len", str(SEQ_LEN)),
        *("--scheme", SCHEME),
        *("--block-hash", block_hash, "--public-key", public_key, "--nonces", ",".join(map(str, claimed))),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    async with asyncio.timeout(RECOMPUTE_SECONDS):
        output, _ = await process.communicate()
    computed = {entry["nonce"]: entry["vector_b64"] for entry in map(orjson.loads, output.splitlines())}
    return [
        f"nonce {nonce} was delivered with {vector} and recomputes to {computed.get(nonce)}"
        for nonce, vector in claimed.items()
        if nonce not in computed or abs(decode_vectors(vector) - decode_vectors(computed[nonce])).max() > TOLERANCE
    ]


def _report(plan: DemoPlan, verdict: DemoVerdict, console: Console, *, interrupted: bool) -> int:
    for complaint in verdict.complaints:
        console.print(f"[red]wrong:[/red] {complaint}", soft_wrap=True)
    if verdict.complaints:
        return EXIT_CRASH
    status = 130 if interrupted and plan.blocks else EXIT_OK
    if not verdict.proofs:
        console.print("no proof was found")
        return status if interrupted else EXIT_CRASH
    console.print(
        f"[green]all is well:[/green] {verdict.proofs} proofs of {verdict.rounds} rounds delivered; the receiver holds "
        "exactly what the daemon stored, no nonce twice or left out, and the last ones recompute",
        soft_wrap=True,
    )
    console.print(f"look again: pocd receiver --store {plan.folder / 'receiver.db'}", soft_wrap=True)
    return status
