"""A Ray cluster on this machine: each of its "machines" is a raylet of its own, where possible with a network."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.support.waiting import until

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from tests.support.networks import Network

RAY = Path(sys.executable).with_name("ray")
MEMORY = 80_000_000  # bytes for objects, of which pocd makes none: the least that Ray takes
QUICK = {  # so that what is gone counts as gone within seconds
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else any other process of a busy machine goes first
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}


class Machines:
    """Machines by name; the first one that is started is the head, and on this machine's own network.

    Args:
        network: The network of the others; None for loopback.

    Attributes:
        variables: Environment of all machines, beside this process's.
    """

    def __init__(self, network: Network | None) -> None:
        self.network = network
        self.variables = QUICK
        self._places: dict[str, str] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # the path of a socket is short, so not a test's folder
        self._running: dict[str, psutil.Popen] = {}
        self._host = network.address if network else "127.0.0.1"
        with socket.create_server((self._host, 0)) as free:
            self.address = f"{self._host}:{free.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in list(self._running):
            self.kill(name)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def start(self, name: str, cpus: int = 1) -> None:
        """Start a machine, and wait until it is one of the cluster."""
        place = [f"--address={self.address}"]
        own = self._place(name)
        inside = self.network.inside(own) if self.network else []
        if not self._running:
            port = self.address.partition(":")[2]
            place = ["--head", f"--port={port}", f"--temp-dir={self._folder}", "--include-dashboard=false"]
            place += ["--no-monitor"]  # which would start machines by itself
        what = [f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={MEMORY}", f"--node-name={name}"]
        what += ["--include-log-monitor=false", "--disable-usage-stats"]  # nobody reads what it would send
        log = self._folder / f"{name}.log"
        with log.open("w") as output:
            process = psutil.Popen(
                [*inside, RAY, "start", *place, *what, f"--node-ip-address={own}", "--block"],
                env=os.environ | self.variables,
                stdout=output,
                stderr=output,
            )
        self._running[name] = process
        await until(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()

    def _place(self, name: str) -> str:
        """Return a machine's address."""
        if self.network is None or not self._running:
            return self._host
        if name not in self._places:
            self._places[name] = self.network.free.pop()
        return self._places[name]

    def cut(self, name: str) -> None:
        """Drop all packets to a machine and from it."""
        assert self.network is not None
        self.network.cut(self._places[name])

    def heal(self, name: str) -> None:
        """Let them pass again."""
        assert self.network is not None
        self.network.heal(self._places[name])

    def kill(self, name: str) -> None:
        """Kill all processes of a machine at once, as a failure of its power would."""
        process = self._running.pop(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()

    def kill_raylet(self, name: str) -> None:
        """Kill a machine's raylet alone."""
        (raylet,) = [each for each in self._running[name].children() if each.name() == "raylet"]
        raylet.kill()
