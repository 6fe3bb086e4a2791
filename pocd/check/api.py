"""Check of the admin API's address: is it free, or does our own daemon have it?"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import TYPE_CHECKING

from pocd.admin.client import AdminError, call
from pocd.check.finding import Finding, green, in_thread, red, yellow
from pocd.http.unix_socket import left_behind

if TYPE_CHECKING:
    from pocd.config.settings import AdminSettings

NAME = "admin API"


async def check_api(admin: AdminSettings, *, runs: bool, limit: float) -> Finding:
    """Try to take the address, and give it back at once.

    Args:
        admin: Settings with the address that the API is to listen on.
        runs: Whether a daemon holds the configured store.
        limit: Seconds for the program at the address to identify itself.
    """
    if admin.socket:
        where, url, key = str(admin.socket), f"unix://{admin.socket}", "admin.socket"
    else:
        host = f"[{admin.host}]" if ":" in admin.host else admin.host
        where, key = f"{host}:{admin.port}", "admin.host and admin.port"
        url = f"http://{where}"
    error = await in_thread(lambda: _try_socket(admin) if admin.socket else _try_port(admin))
    if error is None:
        if runs and admin.port and not admin.socket:
            return yellow(NAME, f"{where} is free, though pocd runs", "it was started with another address: restart it")
        return green(NAME, f"{where} is free" if admin.port or admin.socket else f"{where}: any free port is taken")
    if error.errno != errno.EADDRINUSE:
        return red(NAME, f"cannot listen on {where}: {error.strerror or error}", f"change {key}")
    if not await _is_pocd(url, limit):
        return red(NAME, f"another program has {where}", f"end it (ss -lptn lists it), or change {key}")
    if not runs:
        return red(
            NAME,
            f"a pocd has {where}, but not the one of this store",
            f"each instance needs its own store.path, {key}; stop the other one, or change them here",
        )
    return green(NAME, f"{where} is answered by pocd, which runs")


def _try_port(admin: AdminSettings) -> OSError | None:
    """Bind the port as the daemon would."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            admin.host, admin.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do not count
                trial.bind(address)
    except OSError as error:
        return error
    return None


def _try_socket(admin: AdminSettings) -> OSError | None:
    """Check that a Unix socket can be made; a stale one does not matter, as the daemon replaces it."""
    assert admin.socket is not None
    path = admin.socket
    if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
        return PermissionError(errno.EACCES, f"{path.parent} is missing, or closed to user {os.geteuid()}")
    try:
        left_behind(path)
    except OSError as error:
        return error
    return None


async def _is_pocd(url: str, limit: float) -> bool:
    try:
        async with asyncio.timeout(limit):
            return await call(url, "GET", "/healthz") == {"status": "ok"}
    except (AdminError, TimeoutError):
        return False
