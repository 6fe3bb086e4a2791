"""Real daemons for tests: started as an operator would, watched through their API and their log."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from pocd.admin.client import AdminError, call
from pocd.dev import chain as devchain
from pocd.dev.processes import entries
from pocd.http.server import listening
from tests.support.forking import Process
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


@dataclass
class Chain:
    """A development chain whose height the test sets, on a real socket."""

    height: int = 1
    polls: int = 0
    answer: Callable[[web.Request], web.Response | None] = lambda _request: None
    url: str = ""
    dev: devchain.DevChain = field(
        default_factory=lambda: devchain.DevChain(seed="test", block_seconds=1.0, genesis=time.time())
    )

    @web.middleware
    async def _intercept(self, request: web.Request, handler: Any) -> web.StreamResponse:  # noqa: ANN401 - aiohttp's own
        self.polls += request.path == "/status"
        response: web.StreamResponse = self.answer(request) or await handler(request)
        return response

    @contextlib.asynccontextmanager
    async def served(self, port: int = 0) -> AsyncIterator[Chain]:
        app = devchain.application(self.dev, clock=lambda: self.dev.genesis + (self.height - 0.5))
        app.middlewares.insert(0, self._intercept)
        async with listening(app, "127.0.0.1", port, shutdown_timeout=1) as self.url:
            yield self


def free_port() -> int:
    """A port that nobody listens on, and that is given to nobody else while this process lives; a test may listen."""
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as of whoever listens there: then both may have it
    keeper.bind(("127.0.0.1", 0))
    atexit.register(keeper.close)
    port: int = keeper.getsockname()[1]
    return port


def config(folder: Path, chain_url: str, receivers: dict[str, str], **changes: Any) -> Path:  # noqa: ANN401 - any setting
    """Write a configuration for small, quick batches; `changes` are SECTION__KEY=value, and None takes a key out."""
    values: dict[str, dict[str, Any]] = {
        "node": {"public_key": "test-key", "node_id": 1, "node_count": 3},
        "chain": {"urls": [chain_url], "poll_interval": 0.2},
        "round": {"every": 1, "duration": 1, "scheme": "poc2", "seq_len": 16, "r_target": 1.414},
        "model": {"name": "bundled:tiny-llama", "dtype": "float32", "device": "cpu"},
        "worker": {"batch_size": 8},
        "delivery": {"batch_seconds": 0.2},
        "admin": {"port": 0},
        "orchestrator": {},
        "validation": {},
        "store": {"path": str(folder / "outbox.db"), "free_space_mib": 0},
        "log": {"format": "json"},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    lines: list[str] = []
    for section, pairs in values.items():
        lines += [
            f"[{section}]",
            *(f"{key} = {orjson.dumps(value).decode()}" for key, value in pairs.items() if value is not None),
        ]
        if section == "delivery":
            entries = ", ".join(f'{{ name = "{name}", url = "{url}" }}' for name, url in receivers.items())
            lines.append(f"receivers = [{entries}]")
    path = folder / "pocd.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class Daemon:
    """A running `pocd run`."""

    process: Process
    url: str
    log: Path

    async def status(self) -> dict[str, Any]:
        return await call(self.url, "GET", "/api/v1/pow/status")

    async def until(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Poll the status until `condition` holds, and return it."""
        body: dict[str, Any] = {}
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition(body := await self.status()):
                    assert self.process.returncode is None, self.log.read_text()
                    await asyncio.sleep(0.05)
        except (TimeoutError, AdminError) as error:
            raise AssertionError(f"{error!r}; last status {body}; log:\n{self.log.read_text()}") from error
        return body

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return await self.process.wait()

    def entries(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return entries(self.log)


def launch(path: Path, log: Path, **environment: str) -> Process:
    """Start `pocd run`, which writes to `log`."""
    with log.open("wb") as sink:
        given = {**os.environ, **environment}
        return Process(
            "-m", "pocd", "run", "--config", str(path), out=sink.fileno(), err=sink.fileno(), environment=given
        )


async def start(path: Path, **environment: str) -> Daemon:
    """Start `pocd run` and wait until its API listens."""
    log = path.with_name(f"daemon-{time.monotonic_ns()}.log")
    process = launch(path, log, **environment)
    async with asyncio.timeout(PATIENCE):
        while True:
            for entry in entries(log):
                if entry["action"] == "listening":
                    return Daemon(process, str(entry["url"]), log)
            assert process.returncode is None, f"daemon ended with {process.returncode}: {log.read_text()}"
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(path: Path, **environment: str) -> AsyncIterator[Daemon]:
    """Start `pocd run`, and kill it at the end where the test has not ended it."""
    daemon = await start(path, **environment)
    try:
        yield daemon
    finally:
        if daemon.process.returncode is None:
            daemon.process.kill()
            await daemon.process.wait()


async def fails(path: Path) -> tuple[int, str]:
    """Run `pocd run` to its early end: exit status and the last line on standard error."""
    log = path.with_name(f"daemon-{time.monotonic_ns()}.log")
    code = await launch(path, log).wait()
    text = log.read_text()
    assert "Traceback" not in text, text
    return code, text.splitlines()[-1]
