"""Workers from a Ray cluster: the bridge's process, the room that the cluster has, and the link to each worker.

A cluster that is away is a state with a reason, never the daemon's end: workers wait until there is room for them.
"""

from __future__ import annotations

import asyncio
import dataclasses
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
from pocd.tasks import within
from pocd.worker import messages
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
        gpus: int,
        environment: Mapping[str, str],
        changed: Callable[[], None],
        log: FilteringBoundLogger,
    ) -> None:
        self.most = 0 if settings.workers == "auto" else settings.workers
        self.pid: int | None = None
        self._settings = settings
        self._gpus = gpus
        self._environment = environment
        self._tell = changed
        self._log = log
        self._room = Room(0, 0, "")
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
            return (
                f"the cluster has {self._room.machines} machines, and room for {self._room.workers} of "
                f"{max(1, self.most)} workers"
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

    async def start(self, load: Load, log: FilteringBoundLogger) -> RemoteProcess:  # noqa: ARG002 - Ray logs its lines
        """Have the cluster start a worker, and send it what to load.

        Raises:
            WorkerError: The cluster did not start it.
            WorkerRefusedError: The machine has other versions than this one.
        """
        requests = self._requests
        if requests is None:
            raise WorkerError(Cause.CLUSTER, self._reason or "there is no bridge to the cluster")
        ours, theirs = socket.socketpair()
        with theirs:
            link = RankLink(*await asyncio.open_connection(sock=ours))
            try:
                socket.send_fds(requests, [b"w"], [theirs.fileno()])
                theirs.close()  # else its end would not be seen here
                placed = await link.receive(PLACE_SECONDS)
                assert isinstance(placed, Placed), f"unexpected {placed}"
                check_versions(placed)
                cards = placed.cards if self._gpus else ()
                await link.send(dataclasses.replace(load, cards=cards))
            except (EOFError, OSError):
                link.close()
                raise WorkerError(Cause.CLUSTER, "the bridge to the cluster ended") from None
            except BaseException:
                link.close()
                raise
        return RemoteProcess(link, placed)

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
                    self._set_room(Room(0, 0, ""))
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
                room = await within(limit, messages.receive(bridge.reports))
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
                *map(str, [*fds, self._settings.address, self._settings.cpus, self._gpus]),
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


class RemoteProcess:
    """The process of one worker on a machine of the cluster, at the other end of the bridge."""

    def __init__(self, link: RankLink, placed: Placed) -> None:
        self.pids = [placed.pid]
        self.links = [link]
        self.place: Place | None = Place(placed.node, placed.address)

    async def end(self, limit: float) -> Ended:  # noqa: ARG002 - the bridge kills at once what this closes
        """Have the bridge end the process."""
        self.links[0].close()
        return Ended("the bridge to the cluster ended", cause=Cause.CLUSTER)
