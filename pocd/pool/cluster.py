"""Workers from a Ray cluster: the bridge's process, the room that the cluster has, and the link to each worker.

A cluster that is away is a state with a reason, never the daemon's end: workers wait until there is room for them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import socket
import sys
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from pocd.cluster.versions import differences, versions
from pocd.config.types import MOST_DEVICES
from pocd.pool.causes import Cause, WorkerError, WorkerRefusedError
from pocd.pool.output import Output
from pocd.pool.processes import KILL_SECONDS, Ended, Place, RankLink, connected
from pocd.tasks import cancel, within
from pocd.worker import frames
from pocd.worker.messages import Placed, Room

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Callable, Mapping

    from structlog.typing import FilteringBoundLogger

    from pocd.config.ray import RaySettings
    from pocd.worker.messages import Load

JOIN_SECONDS = 120.0  # from the start of the bridge to its first report
SILENCE_SECONDS = 30.0  # between two of its reports
END_SECONDS = 1.0  # for the bridge to end by itself
PLACE_SECONDS = 150.0  # for a worker's place; the bridge itself gives up before
GONE_SECONDS = 10.0  # for the cluster to say how a worker's ranks ended, once it has ended them
LONGEST_BACKOFF = 30.0  # seconds until a bridge that ended is started again
STARTING = "the bridge to the cluster is being started"
KEPT = ("PATH", "HOME", "LANG", "TZ", "LD_LIBRARY_PATH", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")


def bridge_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the bridge: Ray's own variables (RAY_…, its token and TLS), and nothing of pocd's."""
    return {name: value for name, value in given.items() if name in KEPT or name.startswith("RAY_")} | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_event_log_reporter_enabled": "0",  # in a folder that only Ray's own user can write
    }


class Cluster:
    """Starts the bridge again and again, knows for how many workers there is room, and starts them.

    Attributes:
        most: How many workers there may be: as configured, or for how many there ever was room.
        pid: Process id of the bridge; None while there is none.
    """

    def __init__(
        self,
        settings: RaySettings,
        *,
        ranks: int = 1,
        gpus: int,
        environment: Mapping[str, str],
        changed: Callable[[], None],
        log: FilteringBoundLogger,
    ) -> None:
        self.most = 0 if settings.workers == "auto" else settings.workers
        self.pid: int | None = None
        self._settings = settings
        self._ranks = ranks
        self._gpus = gpus
        self._environment = environment
        self._tell = changed
        self._log = log
        self._room = Room(0, 0, "", 0)
        self._reason: str | None = STARTING
        self._used = 0
        self._changed = asyncio.Event()
        self._requests: socket.socket | None = None

    @property
    def problem(self) -> str | None:
        """Why fewer workers than there may be have room now; None where all have."""
        if self._reason is not None:
            return self._reason
        if self._room.problem:
            return self._room.problem
        if self._room.workers < max(1, self.most):
            ranks = f" of {self._ranks} ranks, and for {self._room.ranks} ranks in all" if self._ranks > 1 else ""
            return (
                f"the cluster has {self._room.machines} machines, and room for {self._room.workers} of "
                f"{max(1, self.most)} workers{ranks}"
            )
        return None

    @asynccontextmanager
    async def room(self, number: int) -> AsyncIterator[None]:
        """Hold the room of one worker, once there is room for it."""
        while number >= self.most or self._used >= self._room.workers:
            await self._changed.wait()
        self._used += 1
        try:
            yield
        finally:
            self._used -= 1
            self._notify()

    async def start(self, load: Load, log: FilteringBoundLogger) -> RemoteProcesses:  # noqa: ARG002 - Ray logs its lines
        """Have the cluster start a worker's ranks, and send each what to load.

        Raises:
            WorkerError: The cluster did not start it.
            WorkerRefusedError: A machine has other versions than this one.
        """
        requests = self._requests
        if requests is None:
            raise WorkerError(Cause.CLUSTER, self._reason or "there is no bridge to the cluster")
        links: list[RankLink] = []
        try:
            with ExitStack() as theirs:
                ends = []
                for _ in load.devices:
                    reader, writer, end = await connected(theirs)
                    links.append(RankLink(reader, writer))
                    ends.append(end.fileno())
                socket.send_fds(requests, [b"w"], ends)
            placed = [await _place(link) for link in links]
            meeting = f"tcp://{placed[0].rendezvous}/{secrets.token_hex(16)}" if load.is_split else None
            for rank, (link, at) in enumerate(zip(links, placed, strict=True)):
                if len(links) > 1:
                    link.name = f"rank {rank} of {len(links)} on {at.node} ({at.address})"
                await link.send(self._load(load, rank, at, meeting))
        except BaseException as error:
            for link in links:
                link.close()
            if isinstance(error, EOFError | OSError):
                raise WorkerError(Cause.CLUSTER, "the bridge to the cluster ended") from None
            raise
        return RemoteProcesses(links, placed)

    def _load(self, load: Load, rank: int, at: Placed, rendezvous: str | None) -> Load:
        """Return what a rank is to load, where the cluster has placed it."""
        return dataclasses.replace(
            load,
            cards=at.cards if self._gpus else (),
            rank=rank,
            rendezvous=rendezvous,
            place=f"{at.node} ({at.address})",
        )

    async def run(self) -> NoReturn:
        """Keep the bridge running until cancelled."""
        failures = 0
        while True:
            joined, reason = False, ""
            try:
                bridge = await self._start()
            except OSError as error:
                reason = f"the bridge to the cluster could not be started: {error}"
            else:
                try:
                    joined, reason = await self._watch(bridge)
                finally:
                    self.pid, self._requests = None, None
                    self._set_room(Room(0, 0, "", 0))
                    ended = await bridge.end()
            failures = 0 if joined else failures + 1
            delay = min(LONGEST_BACKOFF, 2.0 ** max(0, failures - 1))
            self._reason = reason or f"the bridge to the cluster {ended}"
            self._log.error("no bridge to the cluster", action="bridge", reason=self._reason, after_s=delay)
            self._tell()
            await asyncio.sleep(delay)

    async def _watch(self, bridge: _Bridge) -> tuple[bool, str]:
        """Take a bridge's reports until there are none; returns whether there was one, and why it is to be killed."""
        self.pid, self._requests = bridge.process.pid, bridge.requests
        joined, limit = False, JOIN_SECONDS
        try:
            while True:
                room = await within(limit, frames.receive(bridge.reports))
                assert isinstance(room, Room), f"unexpected {room}"
                if not joined:
                    self._log.info("joined the cluster", action="bridge", machines=room.machines, room=room.workers)
                joined, limit, self._reason = True, SILENCE_SECONDS, None
                self._set_room(room)
        except TimeoutError:
            return joined, f"the bridge to the cluster gave no sign of life for {limit:.0f} s, killed"
        except (EOFError, OSError):
            return joined, ""

    async def _start(self) -> _Bridge:
        """Start the bridge.

        Raises:
            OSError: The system lacks what a process needs.
        """
        with ExitStack() as theirs, ExitStack() as undo:
            reports, kept, their_reports = await connected(theirs)
            undo.callback(kept.close)
            lines, closing, output = await connected(theirs)
            undo.callback(closing.close)
            # Packets, each with the socket of one more worker.
            requests, their_requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(requests.close)
            theirs.enter_context(their_requests)
            requests.setblocking(False)
            fds = [their_requests.fileno(), their_reports.fileno()]
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "pocd.cluster.bridge",
                *map(str, [*fds, self._settings.address, self._ranks, self._settings.cpus, self._gpus]),
                env=bridge_environment(self._environment),
                pass_fds=fds,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output.fileno(),
                stderr=output.fileno(),
            )
            undo.pop_all()
        return _Bridge(process, requests, reports, kept, Output(lines, closing, self._log, "bridge"))

    def _set_room(self, room: Room) -> None:
        if self._settings.workers == "auto":
            self.most = min(MOST_DEVICES, max(self.most, room.workers))
        self._room = room
        self._notify()
        self._tell()

    def _notify(self) -> None:
        """Wake whoever waits for room."""
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass(frozen=True, slots=True)
class _Bridge:
    process: Process
    requests: socket.socket
    reports: asyncio.StreamReader
    kept: asyncio.StreamWriter  # of the same socket, which closes with it
    output: Output

    async def end(self) -> str:
        """End the process, by force where it does not end by itself; returns how it ended."""
        self.requests.close()
        self.kept.close()
        for limit in (END_SECONDS, KILL_SECONDS):
            with suppress(TimeoutError):
                await within(limit, self.process.wait())
            if self.process.returncode is None:
                self.process.kill()
        await self.output.close()
        code = self.process.returncode
        return f"was killed by signal {-code}" if code and code < 0 else f"ended: {self.output.last or code}"


def check_versions(placed: Placed) -> None:
    """Check that a worker's machine has what this one has.

    Raises:
        WorkerRefusedError: The machine has other versions.
    """
    if differ := differences(versions(), placed.versions):
        raise WorkerRefusedError(
            Cause.CONFIGURATION,
            f"machine {placed.node} ({placed.address}) has {differ}: install the daemon's versions there",
        )


async def _place(link: RankLink) -> Placed:
    """Wait for the place of a rank, and check its machine's versions."""
    placed = await link.receive(PLACE_SECONDS)
    assert isinstance(placed, Placed), f"unexpected {placed}"
    check_versions(placed)
    return placed


class RemoteProcesses:
    """The processes of one worker on machines of the cluster, a rank each, at the other end of the bridge."""

    def __init__(self, links: list[RankLink], placed: list[Placed]) -> None:
        self.pids = [each.pid for each in placed]
        self.links = links
        machines = sorted({(each.node, each.address) for each in placed})
        self.place: Place | None = Place(*("+".join(parts) for parts in zip(*machines, strict=True)))

    async def end(self, limit: float) -> Ended:
        """Have the bridge end all processes; returns how the first one ended that something else ended."""
        ends = [asyncio.create_task(link.read_end()) for link in self.links]
        try:
            done, _ = await asyncio.wait(ends, timeout=limit + GONE_SECONDS)
        finally:
            await cancel(ends)
            for link in self.links:
                link.close()
        found = [ended for each in ends if each in done and (ended := each.result())]
        return found[0] if found else Ended("the bridge to the cluster ended", cause=Cause.CLUSTER)
