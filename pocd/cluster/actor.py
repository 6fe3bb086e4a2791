"""One rank of a worker on a machine of the cluster: a Ray actor that starts its process, and carries its messages.

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
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import ray
from ray.exceptions import RayError

from pocd.cluster.interfaces import interface_of
from pocd.cluster.versions import versions
from pocd.worker.environment import environment
from pocd.worker.frames import encode, receive_frame
from pocd.worker.messages import Gone, Placed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray.actor import ActorHandle

END_SECONDS = 3.0  # for the process to end by itself once its socket is closed
CHUNK = 65536  # bytes carried at a time towards another rank


class WorkerActor:
    """Starts one rank's process and carries bytes: whole frames from it, anything to it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._last_line = ""
        self._passing: list[asyncio.Task[None]] = []
        self._leader: asyncio.StreamWriter | None = None

    async def start(self, rank: int, size: int, followers: Sequence[ActorHandle[WorkerActor]]) -> bytes:
        """Start the process; returns the frame of what the daemon is to know of its place.

        Args:
            rank: Which of the worker's ranks it is; rank 0 leads.
            size: How many ranks the worker has: several where its model is split.
            followers: The actors of all other ranks, for the leading one.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # as Ray has assigned them
        cards = tuple(name for name in visible.split(",") if name) if ray.get_gpu_ids() else ()
        own: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # of Ray
        rendezvous = ""
        with ExitStack() as theirs:
            self._reader, self._writer, *ends = await _connected(theirs)
            if rank > 0:
                _, self._leader, end = await _connected(theirs)
                ends.append(end)
            elif size > 1:
                for follower in followers:
                    reader, writer, end = await _connected(theirs)
                    ends.append(end)
                    self._passing.append(asyncio.create_task(_pass_on(reader, writer, follower)))
                family = socket.AF_INET6 if ":" in own else socket.AF_INET
                ends.append(theirs.enter_context(socket.create_server((own, 0), family=family)))
                host, port, *_ = ends[-1].getsockname()
                rendezvous = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            interface = os.environ.get("GLOO_SOCKET_IFNAME") or (interface_of(own) if size > 1 else "lo")
            fds = [end.fileno() for end in ends]
            self._process = subprocess.Popen(  # noqa: ASYNC220, S603 - it takes milliseconds; our own module
                [sys.executable, "-m", "pocd.worker", *map(str, fds)],
                env=environment(os.environ, cards=cards, cache=_cache_folder(), interface=interface),
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        assert self._process.stdout is not None
        threading.Thread(target=self._read_lines, args=[self._process.stdout], name="output", daemon=True).start()
        node = ray.get_runtime_context().get_node_id()
        return encode(Placed(node, own, self._process.pid, cards, versions(), rendezvous))

    async def send(self, data: bytes) -> None:
        """Give the process bytes of the daemon, and wait until it has room for more."""
        await _write(self._writer, data)

    async def lead(self, data: bytes) -> None:
        """Give the process bytes of the leading rank, and wait until it has room for more."""
        assert self._leader is not None, "it has a leader"
        await _write(self._leader, data)

    async def receive(self) -> bytes:
        """Wait for the process's next frame; empty once it has ended."""
        try:
            return await receive_frame(self._reader)
        except (EOFError, ConnectionError):
            return b""

    async def end(self) -> bytes:
        """End the process, by force where it does not end by itself; returns the frame that says how it ended."""
        if self._process is None:
            return encode(Gone(is_lost=False, message="no worker process was started"))
        self._writer.close()
        name = f"worker process {self._process.pid}"
        try:
            code = await asyncio.to_thread(self._process.wait, END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return encode(Gone(is_lost=False, message=f"{name} was killed, as it did not end"))
        if code < 0:
            return encode(Gone(is_lost=False, message=f"{name} was killed by signal {-code}", is_killed=True))
        text = f"{name} exited with status {code}"
        return encode(Gone(is_lost=False, message=f"{text}: {self._last_line}" if code and self._last_line else text))

    def _read_lines(self, stream: IO[bytes]) -> None:
        """Pass what the process writes to this actor's own log, which Ray keeps, and remember the last line."""
        while line := stream.readline(4096):
            text = line.decode(errors="replace").rstrip()
            if text:
                self._last_line = text.strip()
                print(f"worker says: {text}", file=sys.stderr, flush=True)  # noqa: T201 - Ray's log of the actor


async def _connected(theirs: ExitStack) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, socket.socket]:
    """Return streams over a new pair of sockets, and the other end, the process's, which `theirs` closes."""
    ours, end = socket.socketpair()
    theirs.enter_context(end)
    return (*await asyncio.open_connection(sock=ours), end)


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if writer.is_closing():  # the process ended; whoever receives finds out how
        return
    with suppress(ConnectionError):
        writer.write(data)
        await writer.drain()


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, follower: ActorHandle[WorkerActor]
) -> None:
    """Carry from the leading rank to another one, until either is gone."""
    with closing(writer), suppress(RayError, ConnectionError):  # whoever watches the other one finds out
        while data := await reader.read(CHUNK):
            await follower.lead.remote(data)


def _cache_folder() -> Path:
    """Return the folder for what compilers make: systemd's CacheDirectory= of the unit, or a temporary one."""
    given = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else Path(tempfile.gettempdir()) / f"pocd-{os.getuid()}"
