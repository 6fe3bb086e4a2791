"""Shared by all our processes: exit statuses, the exception that carries one, and how torch's threads wait."""

from __future__ import annotations

import os
import sys

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_UNUSABLE = 2  # of `pocd validate`: nothing was judged; also a mistyped command
EXIT_FRAUD = 3  # of `pocd validate`
EXIT_NO_DEVICE = 75  # EX_TEMPFAIL of sysexits.h: the device may come back
EXIT_TEMPORARY = 75  # the same: what fails now may pass, and is worth another try
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h
EXIT_SIGNALLED = 128  # plus the number of the signal that ended the process at once, as shells have it


class ForeseenError(Exception):
    """A failure whose message says all that there is to say: it is logged without a traceback."""


class EndedError(ForeseenError):
    """The process cannot go on.

    Attributes:
        code: Exit status of the process.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def open_standard_streams() -> None:
    """Open what the caller closed of descriptors 0, 1 and 2 on /dev/null: else the next file, the store, has one."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            mode = "w" if descriptor else "r"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for good


# GNU OpenMP's threads spin while they wait for each other, by default for so long that one other busy
# process makes them tens of times slower (docs/architecture.md). It counts when torch is imported.
WAITING = {"GOMP_SPINCOUNT": "1000"}
