"""Checks of the Ray cluster that workers come from: a process of its own joins it, and asks its machines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import orjson

from pocd.check.finding import Finding, green, red, yellow
from pocd.cluster.room import room_for
from pocd.cluster.tls import uses_tls
from pocd.cluster.versions import differences, versions
from pocd.config.model import check_engine
from pocd.config.settings import ConfigError
from pocd.observe.mask import excerpt
from pocd.pool.cluster import bridge_environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pocd.config.ray import RaySettings
    from pocd.config.settings import Settings

JOIN = (
    "start Ray on this machine too, with the daemon's versions of Ray and Python, and check ray.address (and RAY_… "
    "where the cluster has a token or TLS)"
)


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine of the cluster.

    Attributes:
        node: Name of the machine.
        address: Address of the machine.
        resources: Cores (CPU) and GPUs of the machine, as Ray was started with.
        versions: Versions of what decides a worker's results; None where it did not tell.
        problem: Why it did not tell; empty where it did.
    """

    node: str
    address: str
    resources: Mapping[str, float]
    versions: dict[str, str] | None = None
    problem: str = ""


async def check_cluster(settings: Settings, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check that the cluster can be joined, and that its machines have this one's versions and room for the workers."""
    try:
        check_engine(settings)
    except ConfigError as error:
        return [red("cluster", str(error), "install it, or set worker.engine = 'local'")]
    found = await _survey(settings.ray.address, environment)
    if isinstance(found, str):
        return [red("cluster", found, JOIN)]
    gpus = 0 if settings.model.device == "cpu" else 1
    room, *machines = judge(found, settings.ray, ranks=settings.model.parallel, gpus=gpus)
    return [replace(room, text=f"{room.text}; {protection(environment)}"), *machines]


def protection(environment: Mapping[str, str]) -> str:
    """Return what keeps others out of the cluster, beside a firewall, by Ray's variables."""
    has_token = environment.get("RAY_AUTH_MODE") == "token"
    if uses_tls(environment):
        return f"encrypted (TLS), {'with' if has_token else 'without'} a token"
    return "with a token, not encrypted" if has_token else "no token and no TLS: a firewall alone keeps others out"


async def _survey(address: str, environment: Mapping[str, str]) -> list[Machine] | str:
    """Return the cluster's machines, or why it cannot be joined."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pocd.cluster.survey", address),
            env=bridge_environment(environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return f"no process can be started: {error.strerror}"
    try:
        said, complaints = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if process.returncode:
        last = complaints.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return excerpt(last or f"exit status {process.returncode}", 500)
    machines: list[dict[str, Any]] = orjson.loads(said.strip().rpartition(b"\n")[2])  # the rest is what Ray has to say
    return [Machine(**each) for each in machines]


def judge(machines: Sequence[Machine], settings: RaySettings, *, ranks: int = 1, gpus: int) -> list[Finding]:
    """Return what follows from the machines that a cluster has.

    Args:
        machines: The cluster's machines.
        settings: How many workers are wanted, and how many cores each of a worker's ranks gets.
        ranks: How many ranks each worker has.
        gpus: GPUs that each rank gets.
    """
    found = []
    for machine in machines:
        if machine.versions is None:
            remedy = "install the daemon's version of pocd there, or look why Ray starts no process on it"
            found.append(red(_name(machine), f"{machine.address}: {machine.problem}", remedy))
        elif differ := differences(versions(), machine.versions):
            remedy = "install the daemon's versions there: no worker is started on it until then"
            found.append(red(_name(machine), f"{machine.address} has {differ}", remedy))
        else:
            told = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
            found.append(green(_name(machine), f"{machine.address} has {told}"))
    return [_judge_room(machines, settings, ranks, gpus), *found]


def _name(machine: Machine) -> str:
    return f"machine {machine.node}"


def _judge_room(machines: Sequence[Machine], settings: RaySettings, ranks: int, gpus: int) -> Finding:
    """Return whether the workers have room: the ranks of each on one machine where they fit, else on several."""
    needs = "a GPU and " * bool(gpus) + f"{settings.cpus} {'core' if settings.cpus == 1 else 'cores'}"
    if ranks > 1:
        needs = f"{ranks} ranks, each of {needs}"
    each = [
        room_for({"Alive": True, "Resources": machine.resources}, cpus=settings.cpus, gpus=gpus) for machine in machines
    ]
    room, alone = sum(each) // ranks, sum(count // ranks for count in each)
    count = f"{len(machines)} {'machine' if len(machines) == 1 else 'machines'}"
    has = f"{count} at {settings.address}, with room for {room} {'worker' if room == 1 else 'workers'} of {needs}"
    if room > alone:
        has += f", {room - alone} of them on several machines, which have to reach one another on all ports"
    if room == 0:
        told = "; ".join(
            f"{machine.node}: {machine.resources['CPU']:g} cores, {machine.resources['GPU']:g} GPUs"
            for machine in machines
        )
        lack = f"; there is room for {sum(each)} ranks in all" if ranks > 1 else ""
        remedy = "lower ray.cpus, change model.device, or start Ray there with --num-cpus and --num-gpus as they are"
        if ranks > 1:
            remedy = f"add machines, lower model.parallel, {remedy}"
        return red(
            "cluster",
            f"{'no machine has' if ranks == 1 else 'the machines have no'} room for a worker of {needs} ({told}){lack}",
            remedy,
        )
    if settings.workers != "auto" and room < settings.workers:
        return yellow("cluster", f"{has}; ray.workers is {settings.workers}", "add machines, or lower ray.workers")
    return green("cluster", has)
