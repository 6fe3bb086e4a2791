"""Processes of tests without their imports: each is forked from one that has done them.

To import torch and transformers takes three of the four seconds that a small worker costs, to import what a daemon
needs most of its own start, and the tests start hundreds of both. What runs is the program that was to run, in a
process of its own, with the environment, files, limits and signals that it is given. A worker's parent starts Python as
ever, and at_start/sitecustomize.py hands over; tests start daemons by `Process`. One that differs in what a fork
has from its parent, or in a variable that a library may have read at its import, imports for itself; and so does every
process if the tests are run with FORKING set to nothing.
"""

from __future__ import annotations

import ctypes
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
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pocd.worker.environment import ALLOCATOR
from tests.support.at_start import sitecustomize
from tests.support.at_start.sitecustomize import FOLDER, NAMESPACES, STANDS_FOR, WANTED, ask, belonging
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest

AT_START = Path(sitecustomize.__file__).parent

# Variables that are read when what they are for is used, not when it is imported; and those of tests and of pocd.
LATE = frozenset(
    {
        *("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_VISIBLE_DEVICES", *ALLOCATOR),
        *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NOTIFY_SOCKET", "JOURNAL_STREAM", WANTED),
        *("PWD", "OLDPWD", "TERM", "COLUMNS", "LINES"),
        *("PYTHONBREAKPOINT", "SPT_NOENV"),  # Ray sets them
    }
)
LATE_PREFIXES = ("PYTEST_", "POCD_", "RAY_", "WATCHDOG_", "_TORCHINDUCTOR_")


# What processes to fork from import, by the names of their sockets.
IMPORTS = {
    "torch": ("pocd.worker.process",),
    "pocd": ("pocd.cli.main", "pocd.daemon.daemon", "pocd.observe.notify", "uvloop"),
}


def offer(config: pytest.Config) -> None:
    """Let processes that tests start from now on be forked; each process to fork from starts when one first is."""
    if FOLDER in os.environ:  # by the process that started this one, or by who wants none
        return
    folder = tempfile.TemporaryDirectory(prefix="pocd-forking-")
    os.environ[FOLDER] = folder.name
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(AT_START), os.environ.get("PYTHONPATH"))))
    config.add_cleanup(folder.cleanup)
    for name in IMPORTS:
        _listen(config, name)


def _listen(config: pytest.Config, name: str) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{os.environ[FOLDER]}/{name}")
    listener.listen(1000)
    lifeline, held = os.pipe()  # its end tells the server that the tests have ended, however they did
    servers: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        select.select([listener], [], [])
        options = ("-W", "error") if name == "pocd" else ()  # as tests start daemons, and daemons start workers
        program = [sys.executable, *options, "-m", __name__, name, str(listener.fileno()), str(lifeline)]
        with suppress(OSError):  # closed below: all tests have ended
            servers.append(subprocess.Popen(program, pass_fds=(listener.fileno(), lifeline), cwd=config.rootpath))

    def end() -> None:
        os.close(held)
        listener.close()
        for server in servers:
            server.wait()

    threading.Thread(target=start, daemon=True).start()
    config.add_cleanup(end)


class Process:
    """A running `python -W error PROGRAM`, which reads nothing. It is killed where the tests end before it.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, *program: str, out: int, err: int, environment: Mapping[str, str] = os.environ) -> None:
        self._code: int | None = None
        self._own: subprocess.Popen[bytes] | None = None
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        answer = ""
        with Path(os.devnull).open() as nothing:
            if os.environ[FOLDER]:
                self._link.settimeout(PATIENCE)
                self._link.connect(f"{os.environ[FOLDER]}/pocd")
                ask(self._link, list(program), dict(environment), {0: nothing.fileno(), 1: out, 2: err})
                answer = self._link.recv(1 << 16).decode()
            if answer.isdecimal():
                self.pid = int(answer)
            else:
                self._link.close()
                command = [sys.executable, "-W", "error", *program]
                self._own = subprocess.Popen(command, stdin=nothing, stdout=out, stderr=err, env=environment)
                self.pid = self._own.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, as of `asyncio.subprocess.Process`; None while it runs."""
        if self._own:
            return self._own.poll()
        if self._code is None and select.select([self._link], [], [], 0)[0]:
            self._code = int(self._link.recv(16))
            self._link.close()
        return self._code

    def send_signal(self, number: int) -> None:
        assert self.returncode is None, "it has ended"
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        await until(lambda: self.returncode is not None)
        code = self.returncode
        assert code is not None
        return code


def at_work(pid: int) -> int:
    """The process that does the work of the one that was started: its double, where that stands in for one."""
    name = Path(f"/proc/{pid}/comm").read_text()
    return int(name.removeprefix(STANDS_FOR)) if name.startswith(STANDS_FOR) else pid


class Start:
    """How a process is started.

    Attributes:
        given: All that decides how its program runs, as at_start/sitecustomize.py says it.
        files: Its open files, then its namespaces, as numbers of this process.
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
        return ", ".join([*unlike, *(name for name in here if here[name] != self.given["belonging"][name])])

    def take_over(self) -> None:
        """Make this process as that one is."""
        given = self.given
        self._enter_namespaces()
        above = 1 + max(given["files"], default=0)
        apart = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in self.files[: len(given["files"])]]
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
        for number in signal.valid_signals():
            if number in given["ignored"]:
                signal.signal(number, signal.SIG_IGN)
            elif signal.getsignal(number) is signal.SIG_IGN:  # as SIGINT is where the tests run in the background
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, given["blocked"])

    def _enter_namespaces(self) -> None:
        system = ctypes.CDLL(None, use_errno=True)
        for kind, file in zip(NAMESPACES, self.files[len(self.given["files"]) :], strict=True):
            if os.fstat(file).st_ino != Path(f"/proc/self/ns/{kind}").stat().st_ino and system.setns(file, 0):
                raise OSError(ctypes.get_errno(), f"no way into another namespace ({kind})")

    def run(self) -> None:
        """Run the program: a module (-m) or a text (-c)."""
        sys.path[0] = self.given["folder"]
        given = self.given["program"]
        if given[:2] == ["-W", "error"]:
            warnings.simplefilter("error")
            given = given[2:]
        option, program, *sys.argv[1:] = given
        if option == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = option
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(program, main.__dict__)


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
                for one in (self._listener, self._ended, self._wakes, *self._links.values()):
                    one.close()
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
    """Import what such processes import, and serve."""
    from pocd.process import importing

    name, listener, lifeline = sys.argv[1:]
    with importing():
        for module in IMPORTS[name]:
            import_module(module)
    assert threading.active_count() == 1, "else a fork is not whole"
    start = Server(socket.socket(fileno=int(listener)), int(lifeline)).serve()
    if start:
        start.take_over()
        start.run()


if __name__ == "__main__":
    main()
