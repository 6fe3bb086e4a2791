"""Shared by all our processes: exit statuses and what decides them, how each begins, and how torch's threads wait."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_UNUSABLE = 2  # of `pocd validate`: nothing was judged; also a mistyped command
EXIT_FRAUD = 3  # of `pocd validate`, and of `pocd verify` where a proof does not verify
EXIT_NO_DEVICE = 75  # EX_TEMPFAIL of sysexits.h: the device may come back
EXIT_TEMPORARY = 75  # the same: what fails now may pass, and is worth another try
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h
EXIT_SIGNALLED = 128  # plus the number of the signal that ended the process at once, as shells have it

SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN})
"""Errors of a host that is short of files, memory or processes just now."""

PASSING = SHORT | frozenset(
    {
        # No room on a disk just now; a call that a signal ended.
        *(errno.ENOSPC, errno.EDQUOT, errno.EINTR),
        # A disk, a mount or a device that fails, hangs, or is not there yet.
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.EBUSY, errno.ETXTBSY),
        *(errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN),
        # An address that another program has, that just ended, or that this host does not have yet.
        *(errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET),
    }
)
"""Errors of the system that pass, or are mended without a change to the configuration."""

SQLITE_PASSING = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_NOMEM")


def may_pass(error: BaseException | None) -> bool:
    """Tell whether what failed may work at another try, though nobody changes the configuration.

    Names are looked up on the network, so an unknown one may be known later. An error may have been raised from others.
    """
    while error is not None:
        if isinstance(error, (TimeoutError, socket.gaierror)):
            return True
        if isinstance(error, OSError) and error.errno in PASSING:
            return True
        if getattr(error, "sqlite_errorname", "").startswith(SQLITE_PASSING):
            return True
        error = error.__cause__
    return False


def exit_status(error: BaseException) -> int:
    """Return the status of a process that ends by `error`: whether it may pass, or a person has to change something."""
    return EXIT_TEMPORARY if may_pass(error) else EXIT_CONFIG


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


HELD = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGTERM})


def hold_signals() -> None:
    """Let signals that end a process wait until `release_signals`: in the middle of an import they give a traceback."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release_signals() -> None:
    """Heed signals, also those that came since `hold_signals`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


PASSED_ON = HELD | {signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


def begin() -> None:
    """Make the process one like any other, however it was started, before anything slow is imported.

    Its standard streams are open, signals wait, and as process 1, which containers have, it leaves the work to a child.
    """
    open_standard_streams()
    if os.getpid() == 1:
        stand_by()
    hold_signals()


def stand_by() -> None:
    """Return in a child; this process passes signals on to it, reaps all others, and ends as the child does.

    The kernel gives process 1 no signal that it does not handle, and makes it the parent of every process that lost its
    own. A terminal's signals reach the child by themselves, so only those are passed on that a process sent.
    """
    heeded = PASSED_ON | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heeded)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    while True:
        received = signal.sigwaitinfo(heeded)
        if received.si_signo == signal.SIGCHLD:
            code = _reap(child)
            if code is not None:
                os._exit(code if code >= 0 else EXIT_SIGNALLED - code)
        elif received.si_code <= 0:
            os.kill(child, received.si_signo)


def _reap(child: int) -> int | None:
    """Reap the children that ended; returns how `child` did, as `os.waitstatus_to_exitcode`, or None where it runs."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return None
        if pid == child:
            return os.waitstatus_to_exitcode(status)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage in what is imported, neither now nor later: it stays to the end.

    Looking through it takes a fifth of the time of the imports, half a second at the first look after them, and a
    second when the process ends.
    """
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:  # else all that there is now would stay, and nothing is gained
            gc.freeze()
        gc.enable()


# GNU OpenMP's threads spin while they wait for each other, by default for so long that one other busy
# process makes them tens of times slower (docs/architecture.md). It counts when torch is imported.
WAITING = {"GOMP_SPINCOUNT": "1000"}
