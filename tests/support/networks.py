"""A network of machines on this one: each but the first has a network namespace, and a cable that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


class Network:
    """A bridge of this machine, at its first address, and machines at the next ones.

    Attributes:
        address: Address of this machine.
        free: Addresses of machines that nobody has taken yet.
    """

    def __init__(self) -> None:
        self._name = f"pocd{os.getpid()}"
        self._net = f"10.213.{os.getpid() % 250}"
        self.address = f"{self._net}.1"
        self.free: list[str] = []

    def make(self, machines: int) -> None:
        """Make the bridge and the machines."""
        _ip(f"link add {self._name} type bridge")
        _ip(f"address add {self.address}/24 dev {self._name}")
        _ip(f"link set {self._name} up")
        for number in range(2, machines + 2):
            address = f"{self._net}.{number}"
            namespace = self._namespace(address)
            _ip(f"netns add {namespace}")
            self.free.append(address)
            _ip(f"link add {namespace} type veth peer name eth0 netns {namespace}")
            _ip(f"link set {namespace} master {self._name} up")
            _ip(f"-n {namespace} address add {address}/24 dev eth0")
            _ip(f"-n {namespace} link set eth0 up")
            _ip(f"-n {namespace} link set lo up")

    def inside(self, address: str) -> list[str]:
        """Return the words before a command that is to run on a machine."""
        return [] if address == self.address else ["ip", "netns", "exec", self._namespace(address)]

    def cut(self, address: str) -> None:
        """Drop whatever goes to a machine and comes from it, without a word to either side."""
        _ip(f"link set {self._namespace(address)} down")

    def heal(self, address: str) -> None:
        """Let it pass again."""
        _ip(f"link set {self._namespace(address)} up")

    def remove(self, machines: int) -> None:
        """Remove what was made of it."""
        namespaces = [self._namespace(f"{self._net}.{number}") for number in range(2, machines + 2)]
        for words in [*(f"netns delete {each}" for each in namespaces), f"link delete {self._name}"]:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(words)

    def _namespace(self, address: str) -> str:
        """Return the name of a machine's namespace, and of its cable's end here."""
        return f"{self._name}-{address.rpartition('.')[2]}"


@contextlib.contextmanager
def network(machines: int) -> Iterator[Network | None]:
    """A network with so many machines beside this one; None where there can be none, for want of root or of `ip`."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        yield None
        return
    made = Network()
    try:
        try:
            made.make(machines)
        except subprocess.CalledProcessError:  # such as in a container without bridges or namespaces
            yield None
        else:
            yield made
    finally:
        made.remove(machines)
