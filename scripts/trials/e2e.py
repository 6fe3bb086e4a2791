"""Run the report's 18 end-to-end tests: 2 models x 3 block hashes x 3 public keys, each from a fresh start.

Usage: python -m scripts.trials.e2e [--models qwen llama] [--duration 80] [--r-target 1.4042] [--seq-len 256]
           [--dtype float32] [--device cpu] [--scheme poc2] [--logs logs]

Without `--r-target` it is the report's for schemes that have a head, and with `--scheme poc3` the one that theory gives
one nonce in ten for the model's hidden size.

A model is `qwen` or `llama` (the bundled ones), a hub id or a folder. Each test starts a receiver and a daemon on empty
stores, has the daemon generate by its API (init/generate with a callback_url), stops it after `--duration` seconds, and
then holds what the receiver has against what the daemon's status and store say, nonce by nonce. Of the public keys the
first is mined by node 0, the second by node 1, and so on, so that shares of the nonces are tested too.

The daemon wants a chain, so one development chain runs all the while; by the configuration no round ever starts on it.

In the folder `--logs`, where an earlier run's files of the same names are written over:
e2e_results.jsonl               a line per test, as it is finished; `error` is null where all is consistent. The one
                                of the run before is kept as e2e_results.jsonl.1
test_NN_MODEL_BLOCK_KEY_*       what the daemon (server.log) and the receiver (callback.log) said; both stores, where
                                something was wrong
full_e2e_test_run.log           what this script says, the tables too

Exit status: 0 where every line is consistent, 1 where one is not, 2 for a mistyped command, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import aiohttp
import orjson
from rich.console import Console

from pocd.admin.client import AdminError, call
from pocd.dev.demo import held_by
from pocd.dev.processes import Running, started
from pocd.process import EXIT_CRASH, EndedError
from pocd.protocol.errors import InputError, ModelError
from pocd.protocol.names import DTYPES, check_device, resolve
from pocd.protocol.schemes import DISTANCE_SCHEMES, SCHEMES
from pocd.protocol.theory import r_target_for
from pocd.store.bodies import unpack_body
from scripts.trials.e2e_verdict import Line, Said, StoredProgress, TrialRound, complaints, results_table, spread_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

MODELS = {"qwen": "bundled:tiny-qwen3", "llama": "bundled:tiny-llama"}
BLOCKS = ["block_alpha", "block_beta", "block_gamma"]
KEYS = ["node_A", "node_B", "node_C"]
R_TARGET = 1.4042  # the report's
RESULTS = "e2e_results.jsonl"

API = "/api/v1/pow"
POLL_SECONDS = 0.1
LOAD_SECONDS = 600.0  # for a model to be ready
FIRST_SECONDS = 300.0  # for the first nonces to be checked: what worker.batch_timeout allows one batch
DELIVER_SECONDS = 300.0  # for all that was found to be delivered, once it is stopped

# Rounds of the chain would start at height 2^62, so that nothing is mined but what is asked for.
CONFIG = """\
[node]
public_key = {public_key}
node_id = {node_id}
node_count = {node_count}
[chain]
urls = [{chain}]
[round]
every = 9223372036854775807
offset = 4611686018427387904
duration = 1
r_target = {r_target}
seq_len = {seq_len}
scheme = {scheme}
[model]
name = {model}
dtype = {dtype}
device = {device}
[delivery]
batch_seconds = 1.0
[admin]
port = 0
callback_origins = [{receiver}]
[store]
path = {store}
[log]
format = "json"
"""


@dataclass(frozen=True, slots=True)
class Test:
    """One of the tests: its number from 1, the model's label and name, and the round that is requested."""

    number: int
    label: str
    model: str
    asked: TrialRound

    @property
    def name(self) -> str:
        """Beginning of the names of the test's files."""
        parts = (self.label, self.asked.block_hash, self.asked.public_key)
        return f"test_{self.number:02}_" + "_".join(re.sub("[^A-Za-z0-9._-]+", "-", part) for part in parts)


def tests_of(options: argparse.Namespace) -> list[Test]:
    """Return the tests of all combinations, in the report's order."""
    combinations = itertools.product(options.models, options.blocks, enumerate(options.keys))
    return [
        Test(
            number,
            label_of(model),
            MODELS.get(model, model),
            TrialRound(
                block_hash=block,
                public_key=key,
                r_target=options.r_targets[model],
                seq_len=options.seq_len,
                scheme=options.scheme,
                node_id=node,
                node_count=len(options.keys),
            ),
        )
        for number, (model, block, (node, key)) in enumerate(combinations, start=1)
    ]


def r_target_of(model: str, scheme: str) -> float:
    """Return the r_target for one valid nonce in ten."""
    if SCHEMES[scheme].head != "none":
        return R_TARGET
    from transformers import AutoConfig  # noqa: PLC0415 - it takes seconds, and is needed here alone

    hidden_size: int = AutoConfig.from_pretrained(resolve(model)).get_text_config().hidden_size
    return r_target_for(0.1, hidden_size)


def label_of(model: str) -> str:
    """Return the label of a model: the last part of a hub id or of a folder."""
    return Path(model).name.removeprefix("bundled:")


# One test


async def measure(test: Test, options: argparse.Namespace, chain: Running, folder: Path) -> Line:
    """Run one test with its stores in `folder`, which is empty.

    Raises:
        EndedError, AdminError, aiohttp.ClientError, TimeoutError: It could not be brought to its end.
    """
    asked = test.asked
    async with AsyncExitStack() as processes:
        receiver = await processes.enter_async_context(
            started(
                *(folder, "receiver", "--port", "0", "--store", str(folder / "receiver.db")),
                log=options.logs / f"{test.name}_callback.log",
            )
        )
        config = folder / "pocd.toml"
        config.write_text(configuration(test, options, chain.url, receiver.url, folder / "outbox.db"))
        daemon = await processes.enter_async_context(
            started(folder, "run", "--config", str(config), log=options.logs / f"{test.name}_server.log")
        )
        await until(daemon, lambda status: status["is_model_initialized"], LOAD_SECONDS, "no model was ready")
        round_ = {name: getattr(asked, name) for name in ("block_hash", "public_key", "r_target", "seq_len")}
        body = round_ | {"block_height": 1, "callback_url": receiver.url}
        await call(daemon.url, "POST", f"{API}/init/generate", body=body)
        await until(daemon, lambda status: status["total_checked"], FIRST_SECONDS, "no nonce was checked")
        with suppress(TimeoutError):
            async with asyncio.timeout(options.duration):
                await daemon.process.wait()  # it should not end before its time; `call` will tell
        stopped = (await call(daemon.url, "POST", f"{API}/stop"))["pow_status"]
        status = await until(daemon, is_delivered, DELIVER_SECONDS, "not all was delivered")
        await daemon.end()  # it finishes what it is computing
        held = await held_by(receiver.url)
        stats = await call(receiver.url, "GET", "/stats")
    said = said_by(status, folder / "outbox.db")
    found = complaints(asked, said, held, stats)
    checked, valid = (sum(getattr(each, name) for each in said.progress) for name in ("checked", "valid"))
    return Line(
        **blank(test),
        total_checked=checked,
        total_valid=valid,
        valid_rate=100 * valid / checked if checked else 0.0,
        callback_batches=len(held),
        callback_nonces=sum(len(batch["nonces"]) for batch in held),
        rate_per_second=stopped["rate_per_second"],
        error="; ".join(found) or None,
    )


def configuration(test: Test, options: argparse.Namespace, chain: str, receiver: str, store: Path) -> str:
    """Return the daemon's configuration, as TOML."""
    asked = test.asked
    values = {"model": test.model, "dtype": options.dtype, "device": options.device, "chain": chain}
    values |= {"receiver": receiver, "store": str(store)} | asdict(asked)
    # TOML's strings and numbers are written as JSON's (toml.io, v1.0.0).
    return CONFIG.format(**{name: orjson.dumps(value).decode() for name, value in values.items()})


def blank(test: Test) -> dict[str, Any]:
    """The fields that a line has whatever comes of its test."""
    asked = test.asked
    return {
        "test": test.number,
        "model": test.label,
        "block_hash": asked.block_hash,
        "public_key": asked.public_key,
        "r_target": asked.r_target,
    }


def is_delivered(status: dict[str, Any]) -> bool:
    """Tell whether all valid nonces are in batches that were accepted."""
    funnel = status["funnel"]
    return bool(funnel["delivered"] == funnel["valid"])


async def until(
    daemon: Running, reached: Callable[[dict[str, Any]], object], limit: float, otherwise: str
) -> dict[str, Any]:
    """Poll the status until it is as wanted, and return it."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        status = await call(daemon.url, "GET", f"{API}/status")
        if reached(status):
            return status
        if status["worker"]["restarts"]:  # a fresh start, with nobody else: there is nothing to wait for
            raise EndedError(EXIT_CRASH, f"{otherwise}: {status['worker']['last_error']}; see {daemon.log}")
        await asyncio.sleep(POLL_SECONDS)
    raise EndedError(EXIT_CRASH, f"{otherwise} within {limit:.0f} s; see {daemon.log}")


def said_by(status: dict[str, Any], path: Path) -> Said:
    """Read the store of a daemon that has ended."""
    with closing(sqlite3.connect(path)) as store:
        progress = store.execute("SELECT node_id, node_count, cursor, islands, checked, valid FROM progress")
        batches = store.execute("SELECT state = 'delivered', body FROM batches ORDER BY number")
        (waiting,) = store.execute("SELECT coalesce(sum(size), 0) FROM proofs").fetchone()
        return Said(
            status,
            [StoredProgress(*row) for row in progress],
            [(bool(delivered), orjson.loads(unpack_body(body))) for delivered, body in batches],
            waiting,
        )


# All of them


class Teller:
    """Prints to the terminal and to the run's log, whole on both."""

    def __init__(self, log: TextIO) -> None:
        width = max(150, Console().width)  # as wide as the table of all tests
        self._consoles = [Console(highlight=False, width=width), Console(highlight=False, width=width, file=log)]

    def say(self, what: str | Table) -> None:
        """Print a line or a table."""
        for console in self._consoles:
            console.print(what, markup=False, soft_wrap=isinstance(what, str))


async def run(options: argparse.Namespace, say: Callable[[str | Table], None], results: TextIO) -> list[Line]:
    """Run all tests, one after another, and write a line for each as it is finished."""
    tests, lines = tests_of(options), list[Line]()
    say(f"{len(tests)} tests, {options.duration:g} s of generating each; files in {options.logs}")
    async with started(
        *(options.logs, "devchain", "--port", "0", "--block-seconds", "60"), log=options.logs / "devchain.log"
    ) as chain:
        for test in tests:
            line = await one(test, options, chain)
            results.write(orjson.dumps(asdict(line)).decode() + "\n")
            results.flush()
            lines.append(line)
            say(
                f"Test {line.test:2}: {line.model:5} | {line.block_hash:12} | {line.public_key:6} | "
                f"rate={line.valid_rate:5.1f}% | {line.total_valid} of {line.total_checked} valid, "
                f"{line.callback_nonces} received | {line.error or 'consistent'}"
            )
    say(results_table(lines))
    say(spread_table(lines))
    wrong = sum(line.error is not None for line in lines)
    say(f"{wrong} of {len(lines)} tests are not consistent" if wrong else f"all {len(lines)} tests are consistent")
    return lines


async def one(test: Test, options: argparse.Namespace, chain: Running) -> Line:
    """Run one test in a folder of its own, which is kept where something is wrong: its line's error says what."""
    kept = options.logs / f"{test.name}_stores"
    shutil.rmtree(kept, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="pocd-e2e-") as folder:
        try:
            line = await measure(test, options, chain, Path(folder))
        except AdminError as error:
            log = options.logs / f"{test.name}_server.log"
            words = log.read_text(errors="replace").splitlines() or ["nothing"]
            line = Line(**blank(test), error=f"{error}; {log} ends with: {words[-1]}")
        except (EndedError, aiohttp.ClientError, TimeoutError) as error:
            line = Line(**blank(test), error=str(error) or type(error).__name__)
        if line.error is not None:
            shutil.copytree(folder, kept)
    return line


async def until_interrupted(options: argparse.Namespace, say: Callable[[str | Table], None], results: TextIO) -> int:
    """Run all tests, or end in good order at a signal; returns the exit status."""
    task = asyncio.ensure_future(run(options, say, results))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A second one changes nothing: the processes are being ended, each within a limit.
        asyncio.get_running_loop().add_signal_handler(number, lambda: task.cancelling() or task.cancel())
    try:
        lines = await task
    except asyncio.CancelledError:
        say(f"interrupted; {results.name} has the tests that were finished")
        return 130
    return int(any(line.error is not None for line in lines))


def parse() -> argparse.Namespace:
    """Parse the command line; options that cannot work are refused before anything starts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="qwen, llama, hub ids, folders")
    parser.add_argument("--blocks", nargs="+", default=BLOCKS, help="block hashes")
    parser.add_argument("--keys", nargs="+", default=KEYS, help="public keys; each is a node")
    parser.add_argument("--duration", type=float, default=80.0, help="seconds of generating per test")
    parser.add_argument("--r-target", type=float, help="by default for one valid nonce in ten")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N")
    parser.add_argument("--scheme", choices=DISTANCE_SCHEMES, default="poc2")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="the folder for all files")
    options = parser.parse_args()
    for name in ("models", "blocks", "keys"):
        values = [label_of(value) if name == "models" else value for value in getattr(options, name)]
        if repeated := {value for value in values if values.count(value) > 1}:
            parser.error(f"argument --{name}: must differ, but {', '.join(repeated)} is there more than once")
        if not all(values):
            parser.error(f"argument --{name}: must not be empty")
    if options.r_target is not None and not 0 < options.r_target <= 2:
        parser.error("argument --r-target: must be above 0 and at most 2")
    if not 0 < options.duration < 1e6:
        parser.error("argument --duration: must be above 0 and below a million seconds")
    if options.seq_len < (least := SCHEMES[options.scheme].least_seq_len):
        parser.error(f"argument --seq-len: must be at least {least}")
    try:
        check_device(options.device)
        for model in options.models:
            resolve(MODELS.get(model, model))
        options.r_targets = {
            model: options.r_target or r_target_of(MODELS.get(model, model), options.scheme) for model in options.models
        }
        options.logs.mkdir(parents=True, exist_ok=True)
    except (InputError, ModelError, OSError) as error:
        parser.error(str(error))
    return options


def main() -> int:
    """Run the tests and return the exit status."""
    options = parse()
    path = options.logs / RESULTS
    if path.exists():
        path.rename(options.logs / f"{RESULTS}.1")
    with path.open("w") as results, (options.logs / "full_e2e_test_run.log").open("w") as log:
        return asyncio.run(until_interrupted(options, Teller(log).say, results))


if __name__ == "__main__":
    sys.exit(main())
