"""Check of the Ray cluster that workers come from: it is joined as the daemon joins it, and left again."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

import structlog

from pocd.check.finding import Finding, green, red, yellow
from pocd.config.model import check_engine
from pocd.config.settings import ConfigError
from pocd.pool.cluster import STARTING, Cluster
from pocd.tasks import cancel

if TYPE_CHECKING:
    from pocd.config.settings import Settings

SILENT = structlog.wrap_logger(
    structlog.PrintLogger(), wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
)


async def check_cluster(settings: Settings) -> Finding:
    """Check that the cluster can be joined, has the same Ray and Python, and has room for the workers."""
    try:
        check_engine(settings)
    except ConfigError as error:
        return red("cluster", str(error), "install it, or set worker.engine = 'local'")
    told = asyncio.Event()
    gpus = 0 if settings.model.device == "cpu" else 1
    cluster = Cluster(settings.ray, gpus=gpus, environment=os.environ, changed=told.set, log=SILENT)
    joining = asyncio.create_task(cluster.run(), name="joining the cluster")
    try:
        while cluster.problem == STARTING:
            await told.wait()
            told.clear()
    finally:
        await cancel([joining])
    return judge(cluster.problem, cluster.machines, cluster.most, settings.ray.address)


def judge(problem: str | None, machines: int, workers: int, address: str) -> Finding:
    """Return what follows from what a cluster has.

    Args:
        problem: Why not all workers have room; None where all have.
        machines: How many machines it has; 0 where it was not joined.
        workers: For how many workers there is room.
        address: The address of its head.
    """
    if problem is None:
        return green("cluster", f"{machines} machines at {address}, with room for {workers} workers")
    if machines == 0:
        return red(
            "cluster",
            problem,
            "start Ray on this machine too, with the daemon's versions of Ray and Python, and check ray.address",
        )
    return yellow("cluster", problem, "add machines, or change ray.workers, ray.cpus or model.device")
