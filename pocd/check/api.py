"""Checks by the admin API: is its address free, or does our own daemon have it, and what do its workers report?"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import TYPE_CHECKING

from pocd.admin.client import AdminError, call
from pocd.check.finding import Finding, green, in_thread, red, yellow
from pocd.config.secrets import read_token
from pocd.config.settings import ConfigError
from pocd.http.unix_socket import left_behind
from pocd.observe.mask import excerpt

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.config.listeners import AdminSettings

NAME = "admin API"


async def check_api(admin: AdminSettings, *, runs: bool, limit: float) -> Finding:
    """Try to take the address, and give it back at once.

    Args:
        admin: Settings with the address that the API is to listen on.
        runs: Whether a daemon holds the configured store.
        limit: Seconds for the program at the address to identify itself.
    """
    if admin.socket:
        where, key = str(admin.socket), "admin.socket"
    else:
        where, key = _host_and_port(admin), "admin.host and admin.port"
    error = await in_thread(lambda: _try_socket(admin) if admin.socket else _try_port(admin))
    if error is None:
        if runs and admin.port and not admin.socket:
            return yellow(NAME, f"{where} is free, though pocd runs", "it was started with another address: restart it")
        return green(NAME, f"{where} is free" if admin.port or admin.socket else f"{where}: any free port is taken")
    if error.errno != errno.EADDRINUSE:
        return red(NAME, f"cannot listen on {where}: {error.strerror or error}", f"change {key}")
    if not await _is_pocd(_url(admin), limit):
        return red(NAME, f"another program has {where}", f"end it (ss -lptn lists it), or change {key}")
    if not runs:
        return red(
            NAME,
            f"a pocd has {where}, but not the one of this store",
            f"each instance needs its own store.path, {key}; stop the other one, or change them here",
        )
    return green(NAME, f"{where} is answered by pocd, which runs")


async def check_rounding(admin: AdminSettings, config: Path, *, runs: bool, limit: float) -> Finding:
    """Report how far rounding decides results, as the workers of the daemon that runs have measured it.

    Args:
        admin: Settings with the API's address and token.
        config: File of the configuration, beside which the token may be.
        runs: Whether a daemon holds the configured store.
        limit: Seconds for the daemon to answer.
    """
    name, again = "rounding", "ask again once `pocd status` shows a ready worker"
    if not runs:
        return green(name, "each worker measures it when it starts, for the model, the scheme and the dtype")
    try:
        async with asyncio.timeout(limit):
            status = await call(_url(admin), "GET", "/api/v1/pow/status", token=read_token(admin.token_file, config))
    except (AdminError, ConfigError, TimeoutError) as error:
        return yellow(name, f"the daemon does not tell: {excerpt(str(error) or 'no answer', 160)}", again)
    measured = [worker["rounding"] for worker in status["workers"] if worker.get("rounding")]
    if alarm := next((each["alarm"] for each in measured if each["alarm"]), None):
        return red(name, alarm, 'see docs/protocol.md, "Depth"; validators need the same scheme and dtype')
    if not measured:
        return yellow(name, "no worker has measured it yet", again)
    off, own = max(each["error"] for each in measured), min(each["own_share"] for each in measured)
    told = f"results are off by at most {off:.2%} of their scatter; {own:.0%} of the outputs are the nonce's own"
    if turned := [each["turned"] for each in measured if each.get("turned") is not None]:
        told += f"; rounding turns a router's choice in {max(turned):.2%} of nonces"
    return green(name, told)


def _host_and_port(admin: AdminSettings) -> str:
    host = f"[{admin.host}]" if ":" in admin.host else admin.host
    return f"{host}:{admin.port}"


def _url(admin: AdminSettings) -> str:
    return f"unix://{admin.socket}" if admin.socket else f"http://{_host_and_port(admin)}"


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
