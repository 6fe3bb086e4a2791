"""What Python runs first in each process that the tests start: workers are forked from one that has torch imported.

See tests/support/forking.py. The process stays its parent's child and stands in for its double, to which it passes
signals on, and like which it ends; where it is killed, so is the double. It cannot pass on SIGSTOP: `at_work` there
finds the double.
"""

import os
import sys

TYPE_CHECKING = False  # typing's own is dear at every start
if TYPE_CHECKING:
    import socket

# Programs whose start is little but torch's import, and the variable by which a test wants another one forked.
PROGRAMS, WANTED = ("-m pocd.worker", "-m pocd.check.child", "-m pocd compute"), "FORKED"
FOLDER = "FORKING"  # names the folder with the sockets of the processes to fork from; empty: every process is its own
STANDS_FOR = "for "  # before the double's process id, in the name of a stand-in's process
NAMESPACES = ("ipc", "net", "uts", "mnt")  # those that a fork can enter


def go_on_elsewhere(server: str) -> None:
    """Let a fork of the server's process go on, and end as it does; returns where this one differs from the server's.

    Raises:
        TimeoutError: The server neither forks nor refuses.
    """
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        try:
            link.connect(server)
        except OSError:  # of another container, or at the end of all tests
            return
        link.settimeout(300.0)
        files = _open_files(link.fileno())
        ask(link, sys.orig_argv[1:], dict(os.environ), {file: file for file in files})
        answer = link.recv(1 << 16).decode()
        if answer.isdecimal():
            link.settimeout(None)
            _stand_in(link, int(answer))


def _open_files(besides: int) -> list[int]:
    listed = (int(name) for name in os.listdir("/proc/self/fd"))
    return [number for number in listed if number != besides and os.path.exists(f"/proc/self/fd/{number}")]


def ask(link: "socket.socket", program: list[str], environment: dict[str, str], files: dict[int, int]) -> None:
    """Say all that decides how a program runs: as this process would, but for its files, which are given by number."""
    import json
    import resource
    import signal
    import socket

    limits = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
    umask = os.umask(0o77)
    os.umask(umask)
    description = {
        "program": program,
        "environment": environment,
        "files": list(files),
        "folder": os.getcwd(),
        "umask": umask,
        "limits": {number: resource.getrlimit(number) for number in limits.values()},
        "processors": sorted(os.sched_getaffinity(0)),
        "niceness": os.nice(0),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "ignored": [one for one in signal.valid_signals() if signal.getsignal(one) is signal.SIG_IGN],
        "belonging": belonging(),
    }
    namespaces = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in NAMESPACES]
    socket.send_fds(link, [json.dumps(description).encode()], [*files.values(), *namespaces])
    for file in namespaces:
        os.close(file)


def belonging() -> dict[str, object]:
    """What a fork has from its parent, and cannot change."""
    kinds = ("cgroup", "pid", "user")
    with open("/proc/self/cgroup", encoding="ascii") as file:
        cgroup = file.read()
    return {
        "python": [sys.prefix, sys.version],
        "user": [*os.getresuid(), *os.getresgid(), *os.getgroups()],
        "namespaces": [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds],
        "cgroup": cgroup,
    }


def _stand_in(link: "socket.socket", double: int) -> None:
    """Pass signals on to the double, and end as it does."""
    import resource
    import signal

    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        number = signal.Signals[name]
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: os.kill(double, received))
    for file in _open_files(link.fileno()):  # so that nobody waits for this process's ends of sockets
        os.close(file)
    with open("/proc/self/comm", "w", encoding="ascii") as own_name:
        own_name.write(f"{STANDS_FOR}{double}")
    code = int(link.recv(16) or b"-9")
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    os._exit(code)


if os.environ.get(FOLDER) and (" ".join(sys.orig_argv[1:4]).startswith(PROGRAMS) or WANTED in os.environ):
    go_on_elsewhere(f"{os.environ[FOLDER]}/torch")
