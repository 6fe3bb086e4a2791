"""Why lives of workers end."""

from __future__ import annotations

from enum import StrEnum

from pocd.process import ForeseenError


class Cause(StrEnum):
    """Why a life of a worker ended: a fixed set, so that the count of each cause is shown from the start."""

    CRASH = "crash"
    """The worker's process ended, by itself or by a signal."""
    SILENT = "silent"
    """The worker sent no heartbeat."""
    HUNG = "hung"
    """The worker finished no batch in time: its device hangs, or is far too slow."""
    LOADING = "loading"
    """The worker did not load its model in time."""
    FAULT = "fault"
    """The device or its driver failed, or one rank lost another."""
    MEMORY = "memory"
    """A batch did not fit into the memory of the worker's device."""
    REFUSED = "refused"
    """The worker's model gave no result, several times."""
    DEVICE = "device"
    """The worker's device is not there."""
    CONFIGURATION = "configuration"
    """The worker cannot work as configured."""
    CLUSTER = "cluster"
    """The Ray cluster lost the worker, or did not start it."""


class WorkerError(ForeseenError):
    """A life of a worker ended or had to be ended; starting the worker again may help."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class WorkerRefusedError(WorkerError):
    """The worker cannot work, and starting it again will not help. The cause is DEVICE or CONFIGURATION."""
