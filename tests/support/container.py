"""A container that boots systemd over this machine's own root; what it writes stays in memory, and ends with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PROGRAMS = ("systemd-nspawn", "unshare", "nsenter", "mount")
BOOT_SECONDS = 120.0
# The root is this machine's, with what is written above it. Of this machine's services it starts none: its target is
# below those that they belong to.
SCRIPT = """
mount -t tmpfs -o mode=755 tmpfs "$FOLDER"
mkdir "$FOLDER/upper" "$FOLDER/work" "$ROOT"
mount -t overlay overlay -o "lowerdir=/,upperdir=$FOLDER/upper,workdir=$FOLDER/work" "$ROOT"
rm -rf "$ROOT"/etc/systemd/system/*.wants "$ROOT"/etc/fstab "$ROOT"/etc/machine-id  # sockets and timers too
rm -rf "$ROOT"/opt/pocd "$ROOT"/etc/pocd "$ROOT"/var/lib/pocd "$ROOT"/var/cache/pocd
for group in $GROUPS_OF_ITS_OWN; do mkdir "$group"; echo $$ >"$group/cgroup.procs"; done
exec systemd-nspawn --boot --quiet --directory="$ROOT" --register=no --keep-unit --private-network --console=pipe \
  --machine=pocd-test --link-journal=no "$@" systemd.unit=basic.target
"""


class CannotBootError(Exception):
    """No container can be booted here; the message says why."""


class Container:
    """A booted container.

    Args:
        init: Id of its first process, as this machine sees it.
        environment: Environment of what is run in it, beside PATH.
    """

    def __init__(self, init: int, environment: Mapping[str, str]) -> None:
        self._init = init
        self._environment = environment

    def run(self, *command: str, user: str = "root", text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in it and return how it ended.

        Args:
            command: The program and its arguments.
            user: The user that runs it, with all groups.
            text: Standard input.
        """
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        assigned = [f"{name}={value}" for name, value in self._environment.items()]
        enter = ["nsenter", f"--target={self._init}", "--all", "env", "--ignore-environment", f"PATH={path}", *assigned]
        become = [] if user == "root" else ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        return subprocess.run(
            [*enter, *become, *command], capture_output=True, text=True, input=text, timeout=PATIENCE, check=False
        )

    def shell(self, script: str) -> str:
        """Run a script that has to succeed, as root, and return what it prints."""
        done = self.run("bash", "-euc", script)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def until(self, script: str) -> None:
        """Wait until a script succeeds."""
        deadline = time.monotonic() + PATIENCE
        while (done := self.run("bash", "-euc", script)).returncode:
            assert time.monotonic() < deadline, script + done.stdout + done.stderr
            time.sleep(0.2)


@contextlib.contextmanager
def booted(folder: Path, bound: Mapping[Path, str], environment: Mapping[str, str]) -> Iterator[Container]:
    """Boot a container, and end it with all that runs in it.

    Args:
        folder: An empty folder to mount on.
        bound: Folders of this machine, and where the container sees them, read-only.
        environment: Environment of what is run in it.

    Raises:
        CannotBootError: No container can be booted here.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid():
        raise CannotBootError(f"booting systemd needs {', '.join(missing) or 'root'} (Debian: systemd-container)")
    groups = own_groups(f"pocd-test-{os.getpid()}")
    told = folder.with_suffix(".log")
    with told.open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "bash", "-euc", SCRIPT, "boot"]
            + [f"--bind-ro={source}:{target}" for source, target in bound.items()],
            env=os.environ
            | {"FOLDER": str(folder), "ROOT": f"{folder}/root", "GROUPS_OF_ITS_OWN": " ".join(map(str, groups))},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with _init_of(process, told) as init:
            yield Container(init, environment)
    finally:
        process.kill()  # and with it the container's first process, and all others
        process.wait()
        for group in groups:
            _remove(group)


def own_groups(name: str) -> list[Path]:
    """Return a control group for the container in each hierarchy that systemd uses: one, or two of the hybrid kind."""
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.controllers").exists():
        return [top / name]
    return [each / name for each in (top / "systemd", top / "unified") if each.is_dir()]


@contextlib.contextmanager
def _init_of(process: subprocess.Popen[bytes], told: Path) -> Iterator[int]:
    """Wait until the container is up, and give the id of its first process."""
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with contextlib.suppress(OSError, IndexError):
            init = int(children.read_text().split()[0])
            up = Container(init, {}).run("systemctl", "is-system-running").stdout.strip()
            if up in {"running", "degraded"}:
                break
        if process.poll() is not None or time.monotonic() > deadline:
            raise CannotBootError(f"systemd does not boot in a container here: {told.read_text()[-500:].strip()}")
        time.sleep(0.1)
    try:
        yield init
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL)


def _remove(group: Path) -> None:
    """Remove a control group and those in it; the kernel takes a moment until their last processes are gone."""
    deadline = time.monotonic() + PATIENCE
    while group.exists():
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        assert time.monotonic() < deadline, f"{group} is still in use"
        time.sleep(0.02)
