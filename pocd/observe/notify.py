"""Tell the service manager how we are: the sd_notify protocol (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping


class Notifier:
    """Sends state to the service manager's datagram socket; silent where there is none."""

    def __init__(self, address: str | None, watchdog_seconds: float | None) -> None:
        self._address = address
        self.watchdog_seconds = watchdog_seconds

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read NOTIFY_SOCKET, and WATCHDOG_USEC where it is meant for this process."""
        usec = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        return cls(environment.get("NOTIFY_SOCKET"), int(usec) / 1e6 if usec.isdecimal() and ours else None)

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
            try:
                channel.sendto(text.encode(), address)
            except OSError:
                return  # the manager is busy or gone; it will miss this one, and its watchdog judges

    def ready(self) -> None:
        """The service is up: READY=1."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`: STATUS=…."""
        self._send(f"STATUS={text.replace(chr(10), ' ')}")

    def alive(self) -> None:
        """The event loop turns: WATCHDOG=1."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The service is going down: STOPPING=1."""
        self._send("STOPPING=1")
