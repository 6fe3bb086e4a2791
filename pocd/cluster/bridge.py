"""The bridge between a daemon and a Ray cluster: a process of the daemon's that carries bytes, and decides nothing.

For each worker the daemon passes it one end of a socket. It has Ray place an actor, and carries what comes from either
side to the other, one piece at a time, so that nothing piles up. When the socket closes, the actor is killed; when the
actor is lost, the daemon is told why. It ends with the daemon, and Ray ends a driver's actors with the driver.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, cast

import ray
from ray.exceptions import RayError

from pocd.cluster.actor import WorkerActor
from pocd.cluster.joining import join
from pocd.cluster.room import room_for
from pocd.tasks import cancel
from pocd.worker.messages import Gone, Placed, Room, decode_frame, encode

if TYPE_CHECKING:
    from ray.actor import ActorHandle

PLACE_SECONDS = 120.0  # for Ray to start an actor where there is room
REPORT_SECONDS = 3.0  # between two looks at the cluster
ANSWER_SECONDS = 10.0  # for the head to say which machines there are
CHUNK = 65536  # bytes carried at a time towards a worker


class Bridge:
    """Carries the messages of all workers, and reports for how many the cluster has room.

    Args:
        requests: Where the daemon passes a socket for each worker.
        reports: To the daemon.
        cpus: Cores that a worker gets.
        gpus: GPUs that a worker gets.
    """

    def __init__(self, requests: socket.socket, reports: asyncio.StreamWriter, *, cpus: int, gpus: int) -> None:
        self._requests = requests
        self._reports = reports
        self._cpus = cpus
        self._gpus = gpus
        self._make = ray.remote(WorkerActor).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self._nodes: dict[str, dict[str, Any]] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def run(self) -> NoReturn:
        """Serve until the daemon is gone."""
        asyncio.get_running_loop().add_reader(self._requests, self._take)
        asked: asyncio.Future[list[dict[str, Any]]] | None = None
        while True:
            asked = asked or asyncio.ensure_future(asyncio.to_thread(ray.nodes))
            await asyncio.wait([asked], timeout=ANSWER_SECONDS)
            problem = f"the cluster's head has not answered for {ANSWER_SECONDS:.0f} s"
            if asked.done():
                problem = ""
                self._nodes = {node["NodeID"]: node for node in asked.result()}
                asked = None
            nodes = self._nodes.values()
            room = sum(room_for(node, cpus=self._cpus, gpus=self._gpus) for node in nodes)
            self._reports.write(encode(Room(room, sum(node["Alive"] for node in nodes), problem)))
            await self._reports.drain()
            await asyncio.sleep(REPORT_SECONDS)

    def _take(self) -> None:
        """Take the socket of one more worker from the daemon, or end with it."""
        data, fds, *_ = socket.recv_fds(self._requests, 1, 1)
        if not data:
            os._exit(0)  # Ray's own ending asks the head, which may be away
        for fd in fds:
            task = asyncio.create_task(self._serve(socket.socket(fileno=fd)))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _serve(self, connection: socket.socket) -> None:
        """Give the daemon a worker, until either is gone."""
        reader, writer = await asyncio.open_connection(sock=connection)
        actor = cast("ActorHandle[WorkerActor]", self._make.remote())  # as the class is wrapped when it is made
        tasks = {asyncio.create_task(self._up(actor, writer)), asyncio.create_task(_down(reader, actor))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if isinstance(error := task.exception(), RayError | TimeoutError):
                    writer.write(encode(Gone(is_lost=True, message=_reason(error))))
                elif error and not isinstance(error, OSError):  # of the daemon, which closed the socket
                    raise error
        finally:
            await cancel(tasks)
            with suppress(RayError):
                ray.kill(actor)
            writer.close()

    async def _up(self, actor: ActorHandle[WorkerActor], writer: asyncio.StreamWriter) -> None:
        """Carry from the worker to the daemon: where it is, its messages, and how its process ended."""
        placed = decode_frame(await asyncio.wait_for(actor.start.remote(), PLACE_SECONDS))
        assert isinstance(placed, Placed), f"unexpected {placed}"
        name, address = await self._place(placed.node)
        writer.write(encode(Placed(name, address, placed.pid, placed.cards, placed.versions)))
        while frame := await actor.receive.remote():
            writer.write(frame)
            await writer.drain()
        writer.write(encode(Gone(is_lost=False, message=await actor.end.remote())))

    async def _place(self, node: str) -> tuple[str, str]:
        """Return name and address of a machine."""
        if node not in self._nodes:  # it came since the last look
            self._nodes = {each["NodeID"]: each for each in await asyncio.to_thread(ray.nodes)}
        found = self._nodes[node]
        return found["NodeName"], found["NodeManagerAddress"]


async def _down(reader: asyncio.StreamReader, actor: ActorHandle[WorkerActor]) -> None:
    """Carry from the daemon to the worker, until the daemon wants it no more."""
    while data := await reader.read(CHUNK):
        await actor.send.remote(data)


def _reason(error: BaseException | None) -> str:
    """Return why an actor is lost, in one line: Ray's texts are several, and say it in the last one."""
    if isinstance(error, TimeoutError):
        return f"Ray started no actor within {PLACE_SECONDS:.0f} s: its machines are busy, slow or gone (`ray status`)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"Ray lost the worker's actor: {lines[-1][:500]}"


async def _run(requests: int, reports: int, cpus: int, gpus: int) -> None:
    _, writer = await asyncio.open_connection(sock=socket.socket(fileno=reports))
    await Bridge(socket.socket(fileno=requests), writer, cpus=cpus, gpus=gpus).run()


def main() -> None:
    """Run the bridge: `python -m pocd.cluster.bridge REQUESTS REPORTS ADDRESS CPUS GPUS`, the first two descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides
    requests, reports, address, cpus, gpus = sys.argv[1:]
    join(address)
    with suppress(ConnectionError):  # the daemon is gone
        asyncio.run(_run(int(requests), int(reports), int(cpus), int(gpus)))


if __name__ == "__main__":
    main()
