"""The processes of one worker and the sockets to them: one process (a rank) for each device of the worker."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import socket
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from pocd.pool.causes import Cause, WorkerError
from pocd.pool.output import Output
from pocd.tasks import within
from pocd.worker import frames, messages
from pocd.worker.frames import find_gone
from pocd.worker.messages import Failed, Gone

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

    from pocd.worker.messages import FailureKind, Load


KILL_SECONDS = 30.0  # for the kernel to end what was killed; a driver that hangs can keep it from that


class FailedError(Exception):
    """A worker's process reports that it cannot go on.

    Attributes:
        kind: What kind of failure the process reports.
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RankLink:
    """The socket to the process of one rank, and the messages over it.

    Attributes:
        name: Which rank of a worker it is, and on which machine; empty where messages need not say it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.name = ""
        self._reader = reader
        self._writer = writer

    async def send(self, message: messages.Message) -> None:
        """Send one message.

        Raises:
            OSError: The process is gone.
        """
        if self._writer.is_closing():  # else uvloop raises RuntimeError
            raise ConnectionResetError("the process is gone")
        self._writer.write(frames.encode(message))
        await self._writer.drain()

    async def receive(self, limit: float) -> messages.Message:
        """Read one message.

        Raises:
            WorkerError: None came within `limit` seconds, or a cluster reports how the process ended.
            FailedError: The process reports that it ends, and why.
            asyncio.IncompleteReadError: The process is gone.
            OSError: The process is gone.
        """
        try:
            message = await within(limit, frames.receive(self._reader))
        except TimeoutError:
            text = f"{self.name or 'worker'} gave no sign of life for {limit:.0f} s, killed"
            raise WorkerError(Cause.SILENT, text) from None
        if isinstance(message, Failed):
            raise FailedError(message.kind, self._told(message.message))
        if isinstance(message, Gone):
            raise WorkerError(Cause.CLUSTER if message.is_lost else Cause.CRASH, self._told(message.message))
        return message

    async def read_end(self) -> Ended | None:
        """Let a cluster end the process; returns how it ended where the cluster says that something else ended it."""
        if not self._writer.is_closing():
            self._writer.write_eof()
        with suppress(OSError):
            gone = find_gone(await self._reader.read())
            if gone and (gone.is_lost or gone.is_killed):
                cause = Cause.CLUSTER if gone.is_lost else Cause.CRASH
                return Ended(self._told(gone.message), by_force=True, cause=cause)
        return None

    def _told(self, text: str) -> str:
        return f"{self.name}: {text}" if self.name else text

    def close(self) -> None:
        """Close the socket, which ends the process."""
        self._writer.close()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a worker's processes ended.

    Attributes:
        text: How the first process ended that ended by itself.
        by_force: Whether the process of that rank was killed by a signal that this daemon did not send, or a cluster
            lost it: then errors of other ranks follow from that.
        cause: Why the worker's life ended where the process is gone and has not said why.
    """

    text: str
    by_force: bool = False
    cause: Cause = Cause.CRASH


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a cluster a worker runs.

    Attributes:
        node: The machine's name in the cluster; of several, whose ranks run one model, the names joined by "+".
        address: The machine's address in the cluster; of several the addresses, in the order of the names.
    """

    node: str
    address: str


class Running(Protocol):
    """The processes of one life of a worker, here or on another machine."""

    @property
    def pids(self) -> list[int]:
        """Process ids of all ranks."""

    @property
    def links(self) -> list[RankLink]:
        """Links to all ranks, the leading one first."""

    @property
    def place(self) -> Place | None:
        """Where in a cluster they run; None on this machine."""

    async def end(self, limit: float) -> Ended:
        """End all processes, by force after `limit` seconds; returns how the first one ended that ended by itself."""


@dataclass(frozen=True, slots=True)
class _Rank:
    process: Process
    link: RankLink
    output: Output


class Processes:
    """The processes of one worker. Rank 0 leads: it alone is given work, and passes it on to the others."""

    place: Place | None = None

    def __init__(self, ranks: list[_Rank], rendezvous: tempfile.TemporaryDirectory[str] | None) -> None:
        self._ranks = ranks
        self._rendezvous = rendezvous

    @classmethod
    async def start(cls, load: Load, environment: Mapping[str, str], log: FilteringBoundLogger) -> Self:
        """Start a process for each rank, and send each what to load.

        Args:
            load: What to load.
            environment: The environment of the processes; TMPDIR is the folder in which the ranks find one another.
            log: Receives what the processes write.

        Raises:
            OSError: A process could not be started.
        """
        rendezvous = None
        if load.is_split:
            folder = environment["TMPDIR"]
            rendezvous = tempfile.TemporaryDirectory(prefix="pocd-", dir=folder, ignore_cleanup_errors=True)
            load = dataclasses.replace(load, rendezvous=f"file://{rendezvous.name}/ranks")
        processes = cls([], rendezvous)
        with ExitStack() as theirs:
            try:
                # A pair of sockets between the leader and each of the others.
                pairs = [tuple(map(theirs.enter_context, socket.socketpair())) for _ in load.devices[1:]]
                ends = [[leader for leader, _ in pairs], *([follower] for _, follower in pairs)]
                for rank, peers in enumerate(ends):
                    processes._ranks.append(await _start(peers, environment, log))
                    with suppress(ConnectionError):  # it ended at once; whoever waits for its messages finds out why
                        await processes.links[rank].send(dataclasses.replace(load, rank=rank))
            except BaseException:
                await processes.end(0.0)
                raise
        return processes

    @property
    def pids(self) -> list[int]:
        """Process ids of all ranks."""
        return [rank.process.pid for rank in self._ranks]

    @property
    def links(self) -> list[RankLink]:
        """Links to all ranks, the leading one first."""
        return [rank.link for rank in self._ranks]

    async def end(self, limit: float) -> Ended:
        """End all processes, by force after `limit` seconds; returns how the first one ended that ended by itself."""
        for rank in self._ranks:
            rank.link.close()
        try:
            await self._wait(limit)
        finally:
            codes = [rank.process.returncode for rank in self._ranks]
            for rank in self._ranks:
                if rank.process.returncode is None:
                    rank.process.kill()
            if self._rendezvous:
                self._rendezvous.cleanup()
        await self._wait(KILL_SECONDS)
        await asyncio.gather(*(rank.output.close() for rank in self._ranks))
        stuck = [number for number, rank in enumerate(self._ranks) if rank.process.returncode is None]
        if stuck:
            name = self._name(stuck[0])
            return Ended(f"{name} does not end even when it is killed: its driver holds it (nvidia-smi)")
        first = find_first(codes)
        if first is not None:
            return self._ended(first)
        return Ended(f"{self._name(0)} was killed, as it did not end" if self._ranks else "none was started")

    async def _wait(self, limit: float) -> None:
        """Wait until all processes have ended, at most `limit` seconds."""
        with suppress(TimeoutError):
            await within(limit, self._all_ended())

    async def _all_ended(self) -> None:
        for rank in self._ranks:
            await rank.process.wait()

    def _name(self, number: int) -> str:
        name = f"worker process {self._ranks[number].process.pid}"
        return f"{name}, rank {number} of {len(self._ranks)}," if len(self._ranks) > 1 else name

    def _ended(self, number: int) -> Ended:
        code = self._ranks[number].process.returncode
        assert code is not None, "it has ended"
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        last = self._ranks[number].output.last
        if last and code not in {0, -signal.SIGKILL, -signal.SIGTERM}:  # by which others end it, whatever it does
            how = f"{how}: {last}"
        return Ended(f"{self._name(number)} {how}", by_force=code < 0)


def find_first(codes: Sequence[int | None]) -> int | None:
    """Return the number of the process because of which the others ended; None where none has ended by itself.

    Args:
        codes: How each process ended, as `subprocess` has it; None where it has not. One that a signal killed is before
            one that failed, and that is before one that ended well.
    """
    ended = [(code >= 0, code == 0, number) for number, code in enumerate(codes) if code is not None]
    return min(ended)[2] if ended else None


async def _start(peers: list[socket.socket], environment: Mapping[str, str], log: FilteringBoundLogger) -> _Rank:
    """Start a process, with sockets to the daemon and to its peers.

    Raises:
        OSError: The system lacks what a process needs, or has no Python any more.
    """
    with ExitStack() as theirs, ExitStack() as undo:  # all streams before there is a process, which nobody would end
        messages_in, messages_out, inbox = await connected(theirs)
        undo.callback(messages_out.close)
        lines, unused, output = await connected(theirs)
        undo.callback(unused.close)
        fds = [end.fileno() for end in (inbox, *peers)]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pocd.worker",
            *map(str, fds),
            env=environment,
            pass_fds=fds,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output.fileno(),
            stderr=output.fileno(),
        )
        undo.pop_all()
    return _Rank(process, RankLink(messages_in, messages_out), Output(lines, unused, log))


async def connected(theirs: ExitStack) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, socket.socket]:
    """Return streams over a new pair of sockets, and the other end, which is a process's and which `theirs` closes."""
    ours, other = socket.socketpair()
    theirs.enter_context(other)
    try:
        return (*await asyncio.open_connection(sock=ours), other)
    except BaseException:
        ours.close()
        raise
