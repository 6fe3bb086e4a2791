"""One worker on a machine of the cluster: a Ray actor that starts a worker's process there, and carries its messages.

Ray makes the actor from this module as the machine has it installed. Nothing of the daemon's environment comes here:
the process gets that of its own machine.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

import ray

from pocd.cluster.versions import versions
from pocd.worker.environment import environment
from pocd.worker.messages import Placed, encode, receive_frame


class WorkerActor:
    """Starts one worker's process and carries bytes: whole frames from it, anything to it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._last_line = ""

    async def start(self) -> bytes:
        """Start the process; returns the frame of what the daemon is to know of its place."""
        ours, theirs = socket.socketpair()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # as Ray has assigned them
        cards = tuple(name for name in visible.split(",") if name) if ray.get_gpu_ids() else ()
        with theirs:
            self._process = subprocess.Popen(  # noqa: ASYNC220, S603 - it takes milliseconds; our own module
                [sys.executable, "-m", "pocd.worker", str(theirs.fileno())],
                env=environment(os.environ, cards=cards, cache=_cache_folder()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        assert self._process.stdout is not None
        threading.Thread(target=self._read_lines, args=[self._process.stdout], name="output", daemon=True).start()
        context = ray.get_runtime_context()
        return encode(Placed(context.get_node_id(), "", self._process.pid, cards, versions()))

    async def send(self, data: bytes) -> None:
        """Give the process bytes, and wait until it has room for more."""
        if self._writer.is_closing():  # it ended; whoever receives finds out how
            return
        with suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    async def receive(self) -> bytes:
        """Wait for the process's next frame; empty once it has ended."""
        try:
            return await receive_frame(self._reader)
        except (EOFError, ConnectionError):
            return b""

    async def end(self) -> str:
        """Wait for the end of the process, whose socket is closed; returns how it ended, in words."""
        assert self._process is not None, "it was started"
        code = await asyncio.to_thread(self._process.wait)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        text = f"worker process {self._process.pid} {how}"
        return f"{text}: {self._last_line}" if code > 0 and self._last_line else text

    def _read_lines(self, stream: IO[bytes]) -> None:
        """Pass what the process writes to this actor's own log, which Ray keeps, and remember the last line."""
        while line := stream.readline(4096):
            text = line.decode(errors="replace").rstrip()
            if text:
                self._last_line = text.strip()
                print(f"worker says: {text}", file=sys.stderr, flush=True)  # noqa: T201 - Ray's log of the actor


def _cache_folder() -> Path:
    """Return the folder for what compilers make: systemd's CacheDirectory= of the unit, or a temporary one."""
    given = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else Path(tempfile.gettempdir()) / f"pocd-{os.getuid()}"
