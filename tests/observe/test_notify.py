"""The service manager's notification protocol (sd_notify(3)), over real datagram sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from pocd.observe import notify
from pocd.observe.notify import Notifier
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A NOTIFY_SOCKET, as systemd writes it."""
    return str(tmp_path / "notify") if request.param == "path" else f"@pocd-test-{os.getpid()}-{tmp_path.name}"


@contextlib.contextmanager
def managing(address: str) -> Iterator[socket.socket]:
    """A service manager that listens at `address`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        manager.settimeout(PATIENCE)
        yield manager


def heard(manager: socket.socket) -> str:
    return manager.recv(4096).decode()


def test_each_state_is_one_datagram(address: str) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
    with managing(address) as manager:
        notifier.status("loading\nthe model → soon")
        notifier.ready()
        notifier.alive()
        notifier.reloading(12.5)
        notifier.stopping()
        texts = [heard(manager) for _ in range(5)]
    reloading = "RELOADING=1\nMONOTONIC_USEC=12500000"
    assert texts == ["STATUS=loading the model → soon", "READY=1", "WATCHDOG=1", reloading, "STOPPING=1"]


def test_text_that_is_not_unicode_does_no_harm(address: str) -> None:
    with managing(address) as manager:
        Notifier(address, None).status("\udcff")
        assert heard(manager) == "STATUS=\ufffd"


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/" + 200 * "x"}])
def test_without_a_manager_it_is_silent(environment: dict[str, str]) -> None:
    notifier = Notifier.from_environment(environment)
    notifier.ready()
    notifier.status("x")
    notifier.alive()
    notifier.stopping()
    assert notifier.watchdog_seconds is None


def test_a_manager_that_goes_does_no_harm(address: str) -> None:
    notifier = Notifier(address, None)
    with managing(address) as manager:
        notifier.ready()
        assert heard(manager) == "READY=1"
    notifier.alive()
    with contextlib.suppress(FileNotFoundError):  # abstract addresses have no file
        os.unlink(address)  # noqa: PTH108 - an address is a string
    notifier.stopping()


def test_readiness_waits_for_a_busy_manager(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "PATIENCE_SECONDS", PATIENCE)
    with managing(address) as manager:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.connect(manager.getsockname())
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    other.send(b"X=1")
        speaker = threading.Thread(target=Notifier(address, None).ready)
        speaker.start()
        texts = iter(lambda: heard(manager), "READY=1")
        assert set(texts) == {"X=1"}
        speaker.join()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getppid())}, None),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "x"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "1e6"}, None),
        ({"WATCHDOG_USEC": ""}, None),
    ],
)
def test_the_watchdog_is_read_where_it_is_meant_for_us(environment: dict[str, str], seconds: float | None) -> None:
    assert Notifier.from_environment(environment).watchdog_seconds == seconds
