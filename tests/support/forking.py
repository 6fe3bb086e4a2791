"""Worker processes of tests without their imports: each is forked from one process that has imported torch.

To import torch and transformers takes three of the four seconds that a small worker costs, and the tests start a
hundred of them. What is run is a worker's own program in a process of its own, with the environment, files, limits and
signals that its parent gave it; at_start/sitecustomize.py is the parent's side. A worker that differs in what a fork
has from its parent, or in a variable that a library may have read at its import, imports for itself, and so does every
worker if the tests are run with FORKED_WORKERS set to nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocd.worker.environment import ALLOCATOR
from tests.support.at_start import sitecustomize
from tests.support.at_start.sitecustomize import SERVER, belonging

if TYPE_CHECKING:
    import pytest

AT_START = Path(sitecustomize.__file__).parent

# Variables that are read when what they are for is used, not when it is imported; and those of tests and of pocd.
LATE = frozenset(
    {
        *("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_VISIBLE_DEVICES", *ALLOCATOR),
        *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NOTIFY_SOCKET", "PWD", "OLDPWD", "COLUMNS", "LINES"),
    }
)
LATE_PREFIXES = ("PYTEST_", "POCD_")


def offer(config: pytest.Config) -> None:
    """Let workers that tests start from now on be forked; the process to fork from starts when one first is."""
    if SERVER in os.environ:  # by the process that started this one, or by who wants none
        return
    folder = tempfile.TemporaryDirectory(prefix="pocd-forking-")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.environ[SERVER] = f"{folder.name}/socket"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(AT_START), os.environ.get("PYTHONPATH"))))
    listener.bind(os.environ[SERVER])
    listener.listen(1000)
    lifeline, held = os.pipe()  # its end tells the server that the tests have ended, however they did

    def start() -> None:
        select.select([listener], [], [])
        program = [sys.executable, "-m", __name__, str(listener.fileno()), str(lifeline)]
        with suppress(OSError):  # closed below: all tests have ended
            servers.append(subprocess.Popen(program, pass_fds=(listener.fileno(), lifeline), cwd=config.rootpath))

    def end() -> None:
        os.close(held)
        listener.close()
        folder.cleanup()
        for server in servers:
            server.wait()

    servers: list[subprocess.Popen[bytes]] = []
    threading.Thread(target=start, daemon=True).start()
    config.add_cleanup(end)


class Start:
    """How a process is started.

    Attributes:
        given: All that decides how its program runs, as at_start/sitecustomize.py says it.
        files: Its open files, as numbers of this process.
    """

    def __init__(self, given: dict[str, Any], files: list[int]) -> None:
        self.given = given
        self.files = files

    def differs(self) -> str:
        """What in this process is not as in that one, and cannot be changed; empty if nothing."""
        mine, theirs = dict(os.environ), self.given["environment"]
        names = {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}
        unlike = sorted(name for name in names - LATE if not name.startswith(LATE_PREFIXES))
        here = json.loads(json.dumps(belonging()))
        return ", ".join([*unlike, *(name for name in here if here[name] != self.given["same"][name])])

    def take_over(self) -> None:
        """Make this process as that one is."""
        given = self.given
        above = 1 + max(given["files"], default=0)
        apart = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in self.files]
        for file, number in zip(apart, given["files"], strict=True):
            os.dup2(file, number)
        for file in (int(entry.name) for entry in Path("/proc/self/fd").iterdir()):
            if file not in given["files"]:
                with suppress(OSError):  # the file of this listing is closed already
                    os.close(file)
        os.environ.clear()
        os.environ.update(given["environment"])
        time.tzset()
        tempfile.tempdir = None
        os.chdir(given["folder"])
        os.umask(given["umask"])
        os.nice(given["niceness"] - os.nice(0))
        os.sched_setaffinity(0, given["processors"])
        for number, limits in given["limits"].items():
            resource.setrlimit(int(number), limits)
        for number in given["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, given["blocked"])

    def run(self) -> None:
        """Run the program."""
        sys.path[0] = self.given["folder"]
        module, *sys.argv[1:] = self.given["arguments"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


class Server:
    """Forks processes, and says to each one's stand-in how it ended."""

    def __init__(self, listener: socket.socket, lifeline: int) -> None:
        self._listener = listener
        self._lifeline = lifeline
        self._links: dict[int, socket.socket] = {}  # to the stand-ins, by the process ids of the doubles
        self._ended, self._wakes = socket.socketpair()

    def serve(self) -> Start | None:
        """Serve until the tests have ended: None. In each child: how it was to be started."""
        self._wakes.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakes.fileno())
        while True:
            watched: list[Any] = [self._listener, self._lifeline, self._ended, *self._links.values()]
            ready, _, _ = select.select(watched, [], [])
            if self._lifeline in ready:
                return None
            if self._ended in ready:
                self._ended.recv(4096)
                self._reap()
            for pid, link in [*self._links.items()]:
                if link in ready:  # its stand-in was killed
                    os.kill(pid, signal.SIGKILL)
                    self._links.pop(pid).close()
            if self._listener in ready:
                start = self._answer(self._listener.accept()[0])
                if start:
                    return start

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                link = self._links.pop(ended[0], None)
                if link:
                    with suppress(OSError), link:
                        link.send(str(os.waitstatus_to_exitcode(ended[1])).encode())

    def _answer(self, link: socket.socket) -> Start | None:
        message, files, _, _ = socket.recv_fds(link, 1 << 20, 250)
        start = Start(json.loads(message), files) if message else None
        differs = start.differs() if start else "it is gone"
        if not differs:
            pid = os.fork()
            if pid == 0:
                self._leave(link)
                return start
            self._links[pid] = link
        with suppress(OSError):
            link.send((differs or str(pid)).encode())
        for file in files:
            os.close(file)
        if differs:
            link.close()
        return None

    def _leave(self, link: socket.socket) -> None:
        """Forget the server's sockets, whose numbers will be other files'."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in (link, self._listener, self._ended, self._wakes, *self._links.values()):
            one.detach()


def main() -> None:
    """Import what a worker imports, and serve."""
    from pocd.process import importing

    with importing():
        import pocd.worker.process  # noqa: F401
    assert threading.active_count() == 1, "else a fork is not whole"
    listener, lifeline = map(int, sys.argv[1:])
    start = Server(socket.socket(fileno=listener), lifeline).serve()
    if start:
        start.take_over()
        start.run()


if __name__ == "__main__":
    main()
