"""Why workers end, as it is counted and told."""

from __future__ import annotations

from enum import StrEnum

from pocd.process import ForeseenError


class Cause(StrEnum):
    """A fixed set, so that each can be counted from the start."""

    CRASH = "crash"
    """Its process ended, by itself or by a signal."""
    SILENT = "silent"
    """It gave no sign of life."""
    HUNG = "hung"
    """It finished no batch in time: its device hangs, or is far too slow."""
    LOADING = "loading"
    """It did not load its model in time."""
    FAULT = "fault"
    """The device or its driver failed, or one rank lost another."""
    MEMORY = "memory"
    """A batch did not fit into its memory."""
    REFUSED = "refused"
    """Its model gave no result, several times."""
    DEVICE = "device"
    """Its device is not there."""
    CONFIGURATION = "configuration"
    """It cannot work as configured."""


class WorkerError(ForeseenError):
    """The worker ended or had to be ended; starting it again may help."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class WorkerRefusedError(WorkerError):
    """The worker cannot work; starting it again will not help. Its cause is DEVICE or CONFIGURATION."""
