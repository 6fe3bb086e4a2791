"""One worker of a Ray cluster, as the bridge serves it to the daemon: an actor for each of its ranks."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pocd.cluster.actor import WorkerActor
from pocd.tasks import cancel
from pocd.worker.frames import decode_frame, encode
from pocd.worker.messages import Gone, Placed

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Sequence

    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

    Find = Callable[[str], Awaitable[tuple[str, str]]]  # name and address of a machine by its id

PLACE_SECONDS = 120.0  # for Ray to find room for a worker, and start its actors
END_SECONDS = 8.0  # for a rank's process to end, by force after some of them
CHUNK = 65536  # bytes carried at a time towards a rank


@dataclass(frozen=True, slots=True)
class Needs:
    """What each rank of a worker gets.

    Attributes:
        cpus: Cores.
        gpus: GPUs.
    """

    cpus: int
    gpus: int


async def serve(connections: Sequence[socket.socket], needs: Needs, find: Find) -> None:
    """Give the daemon a worker, a rank for each connection, until each rank is gone or not wanted any more."""
    streams = [await asyncio.open_connection(sock=each) for each in connections]
    group: PlacementGroup | None = None
    actors: list[ActorHandle[WorkerActor]] = []
    try:
        # In a thread, as all that asks the cluster's head: while that is away, other workers go on.
        group = await asyncio.to_thread(_reserve, needs, len(streams)) if len(streams) > 1 else None
        actors = [_make_actor(needs, group, rank) for rank in range(len(streams))]
        async with asyncio.TaskGroup() as ranks:
            for rank, (reader, writer) in enumerate(streams):
                ranks.create_task(_Rank(rank, actors, group, find).serve(reader, writer))
    except RayError as error:
        for _, writer in streams:
            writer.write(encode(Gone(is_lost=True, message=_reason(error))))
    finally:
        for _, writer in streams:
            writer.close()
        for actor in actors:
            with suppress(RayError):
                ray.kill(actor)
        if group:
            with suppress(RayError):
                await asyncio.to_thread(remove_placement_group, group)


def _reserve(needs: Needs, ranks: int) -> PlacementGroup:
    """Have Ray reserve what a worker's ranks need: on one machine where they fit, else on several."""
    bundle = {name: count for name, count in (("CPU", needs.cpus), ("GPU", needs.gpus)) if count}
    group: PlacementGroup = placement_group([bundle] * ranks, strategy="PACK")
    return group


def _make_actor(needs: Needs, group: PlacementGroup | None, rank: int) -> ActorHandle[WorkerActor]:
    made = ray.remote(WorkerActor).options(
        num_cpus=needs.cpus,
        num_gpus=needs.gpus,
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank) if group else None,
    )
    return cast("ActorHandle[WorkerActor]", made.remote())  # as the class is wrapped when it is made


@dataclass(frozen=True, slots=True)
class _Rank:
    """One rank of a worker, its number, between the daemon and the rank's actor."""

    number: int
    actors: list[ActorHandle[WorkerActor]]
    group: PlacementGroup | None
    find: Find

    @property
    def _actor(self) -> ActorHandle[WorkerActor]:
        return self.actors[self.number]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry messages until the process ends or the daemon wants it no more, and say how it ended."""
        tasks = {asyncio.create_task(self._up(writer)), asyncio.create_task(self._down(reader))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            writer.write(await asyncio.wait_for(self._actor.end.remote(), END_SECONDS))
        except (RayError, TimeoutError) as error:
            writer.write(encode(Gone(is_lost=True, message=_reason(error))))
        except OSError:  # of the daemon, which closed the socket
            pass
        finally:
            await cancel(tasks)
            writer.close()

    async def _up(self, writer: asyncio.StreamWriter) -> None:
        """Carry from the rank to the daemon: where it is, and its messages."""
        followers = self.actors[1:] if self.number == 0 else []
        try:
            async with asyncio.timeout(PLACE_SECONDS):
                frame = await self._actor.start.remote(self.number, len(self.actors), followers)
        except TimeoutError:
            raise TimeoutError(await asyncio.to_thread(self._why_not_placed)) from None
        placed = decode_frame(frame)
        assert isinstance(placed, Placed), f"unexpected {placed}"
        name, address = await self.find(placed.node)
        writer.write(encode(dataclasses.replace(placed, node=name, address=address)))
        while frame := await self._actor.receive.remote():
            writer.write(frame)
            await writer.drain()

    async def _down(self, reader: asyncio.StreamReader) -> None:
        """Carry from the daemon to the rank, until the daemon wants it no more."""
        while data := await reader.read(CHUNK):
            await self._actor.send.remote(data)

    def _why_not_placed(self) -> str:
        """Return why the actors were not started in time."""
        late = f"within {PLACE_SECONDS:.0f} s"
        if self.group is None or placement_group_table(self.group)["state"] == "CREATED":
            return f"Ray started no actor {late}: its machines are busy, slow or gone (`ray status`)"
        free = ray.available_resources()  # type: ignore[no-untyped-call]  # of Ray
        each = " and ".join(f"{count:g} {name}" for name, count in self.group.bundle_specs[0].items())
        return (
            f"Ray found no room for the worker's {self.group.bundle_count} ranks {late}: each needs {each}, and free "
            f"are {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU in all (`ray status`)"
        )


def _reason(error: RayError | TimeoutError) -> str:
    """Return why an actor is lost, in one line: Ray's texts are several, and say it in the last one."""
    if isinstance(error, TimeoutError):
        return str(error) or f"Ray did not say within {END_SECONDS:.0f} s how the worker's process ended"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"Ray lost the worker's actor: {lines[-1][:500]}"
