"""Notify the service manager of the daemon's state: the sd_notify protocol (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Self

from pocd.observe.mask import clean

if TYPE_CHECKING:
    from collections.abc import Mapping

PATIENCE_SECONDS = 1.0  # with a manager whose queue is full: READY=1 is said once, and must not get lost


class Notifier:
    """Sends state to the service manager's datagram socket; silent where there is none, or where it is gone."""

    def __init__(self, address: str | None, watchdog_seconds: float | None) -> None:
        self._address = address
        self.watchdog_seconds = watchdog_seconds

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read NOTIFY_SOCKET, and WATCHDOG_USEC where it is meant for this process."""
        usec = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        seconds = int(usec) / 1e6 if usec.isdecimal() and ours else 0
        return cls(environment.get("NOTIFY_SOCKET"), seconds or None)

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(PATIENCE_SECONDS)
            channel.sendto(text.encode(errors="replace"), address)

    def ready(self) -> None:
        """Send READY=1: the service is up."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """Send one line for `systemctl status`: STATUS=…."""
        self._send(f"STATUS={clean(text.replace(chr(10), ' '))}")

    def alive(self) -> None:
        """Send WATCHDOG=1: the event loop turns."""
        self._send("WATCHDOG=1")

    def reloading(self, monotonic: float) -> None:
        """Send RELOADING=1, with the time by CLOCK_MONOTONIC in seconds: the configuration is being read again."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={int(monotonic * 1e6)}")

    def stopping(self) -> None:
        """Send STOPPING=1: the service is going down."""
        self._send("STOPPING=1")
