"""The bridge between a daemon and a Ray cluster: a process of the daemon's that carries bytes, and decides nothing.

For each worker the daemon passes it one end of a socket, or of one for each rank where the model is split. It has Ray
place an actor for each, and carries what comes from either side to the other, one piece at a time, so that nothing
piles up. When the daemon's end is closed, the actor ends its process, and is killed; when the actor is lost, the daemon
is told why. It ends with the daemon, and Ray ends a driver's actors with the driver.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, NoReturn

import ray

from pocd.cluster.joining import join
from pocd.cluster.room import room_for
from pocd.cluster.serving import Needs, serve
from pocd.worker.frames import encode
from pocd.worker.messages import Room

MOST_RANKS = 64  # of one worker, as many as the configuration allows
REPORT_SECONDS = 3.0  # between two looks at the cluster
ANSWER_SECONDS = 10.0  # for the head to say which machines there are


class Bridge:
    """Carries the messages of all workers, and reports for how many the cluster has room.

    Args:
        requests: Where the daemon passes a socket for each worker.
        reports: To the daemon.
        ranks: How many ranks a worker has.
        needs: What a rank gets.
    """

    def __init__(self, requests: socket.socket, reports: asyncio.StreamWriter, *, ranks: int, needs: Needs) -> None:
        self._requests = requests
        self._reports = reports
        self._ranks = ranks
        self._needs = needs
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
            room = sum(room_for(node, cpus=self._needs.cpus, gpus=self._needs.gpus) for node in nodes)
            self._reports.write(encode(Room(room // self._ranks, sum(node["Alive"] for node in nodes), problem, room)))
            await self._reports.drain()
            await asyncio.sleep(REPORT_SECONDS)

    def _take(self) -> None:
        """Take the sockets of one more worker's ranks from the daemon, or end with it."""
        data, fds, *_ = socket.recv_fds(self._requests, 1, MOST_RANKS)
        if not data:
            os._exit(0)  # Ray's own ending asks the head, which may be away
        task = asyncio.create_task(serve([socket.socket(fileno=fd) for fd in fds], self._needs, self._place))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _place(self, node: str) -> tuple[str, str]:
        """Return name and address of a machine."""
        if node not in self._nodes:  # it came since the last look
            self._nodes = {each["NodeID"]: each for each in await asyncio.to_thread(ray.nodes)}
        found = self._nodes[node]
        return found["NodeName"], found["NodeManagerAddress"]


async def _run(requests: int, reports: int, ranks: int, cpus: int, gpus: int) -> None:
    _, writer = await asyncio.open_connection(sock=socket.socket(fileno=reports))
    await Bridge(socket.socket(fileno=requests), writer, ranks=ranks, needs=Needs(cpus, gpus)).run()


def main() -> None:
    """Run `python -m pocd.cluster.bridge REQUESTS REPORTS ADDRESS RANKS CPUS GPUS`; the first two are descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides
    requests, reports, address, ranks, cpus, gpus = sys.argv[1:]
    join(address)
    with suppress(ConnectionError):  # the daemon is gone
        asyncio.run(_run(int(requests), int(reports), int(ranks), int(cpus), int(gpus)))


if __name__ == "__main__":
    main()
