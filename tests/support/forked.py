"""Processes of `pocd` without their imports, which take most of a second: each is forked from one that has done them.

What runs is the command line, in a process of its own with the arguments, the files, the environment and the limits
that it is given. What Python reads at its start is as in the process to fork from, in which warnings are errors.
"""

from __future__ import annotations

import atexit
import functools
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from pocd.__main__ import main as command_line
from pocd.process import importing
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Mapping

LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


class Process:
    """A running `pocd ARGUMENTS…`, which reads nothing.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, *arguments: str, out: int, err: int, environment: Mapping[str, str] = os.environ) -> None:
        ours, theirs = os.pipe()
        request = {
            "arguments": arguments,
            "environment": dict(environment),
            "folder": str(Path.cwd()),
            "limits": [(number, resource.getrlimit(number)) for number in LIMITS],
        }
        socket.send_fds(server(), [orjson.dumps(request)], [out, err, theirs])
        os.close(theirs)
        self._told = os.fdopen(ours, "rb", buffering=0)
        self._code: int | None = None
        self.pid = int(self._told.readline())

    @property
    def returncode(self) -> int | None:
        """How it ended, as of `asyncio.subprocess.Process`; None while it runs."""
        if self._code is None and select.select([self._told], [], [], 0)[0]:
            self._code = int(self._told.readline())
            self._told.close()
        return self._code

    def send_signal(self, number: int) -> None:
        assert self.returncode is None, "it has ended"
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        await until(lambda: self.returncode is not None)
        assert self._code is not None
        return self._code


@functools.cache
def server() -> socket.socket:
    """The socket of the process to fork from, which lives until the tests have ended."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-W", "error", "-m", __name__, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def go_on_as(request: bytes, out: int, err: int, told: int) -> None:
    """Return in a child that is as the request says; this process tells its id and how it ended."""
    child = os.fork()
    if child:
        os.close(out)  # whoever reads there waits for the child's end
        os.close(err)
        os.write(told, b"%d\n" % child)
        _, status = os.waitpid(child, 0)
        with suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(told, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for file in (out, err, told):
        os.close(file)
    given = orjson.loads(request)
    os.environ.clear()
    os.environ.update(given["environment"])
    os.chdir(given["folder"])
    for number, limits in given["limits"]:
        resource.setrlimit(number, limits)
    sys.argv[1:] = given["arguments"]


def serve(requests: socket.socket) -> bool:
    """Fork what is asked for until the tests have ended; returns whether this process is one of those."""
    while True:
        request, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if request and os.fork() == 0:
            requests.close()
            go_on_as(request, *files)
            return True
        for file in files:
            os.close(file)
        with suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG if request else 0)[0]:
                pass
        if not request:
            return False


def main() -> None:
    """Import what a daemon imports, and serve; go on as `pocd` in each child."""
    with importing():
        for name in ("pocd.cli.main", "pocd.daemon.daemon", "pocd.observe.notify", "uvloop"):
            import_module(name)
    assert threading.active_count() == 1, "else a fork is not whole"
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        is_child = serve(requests)
    if is_child:
        command_line()


if __name__ == "__main__":
    main()
