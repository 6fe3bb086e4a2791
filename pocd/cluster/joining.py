"""Joining a Ray cluster as a driver, from a process of its own."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from typing import NoReturn

import ray
from ray.exceptions import RayError

from pocd.cluster.tls import mismatch

CONNECT_SECONDS = 5.0  # to the cluster's head
JOIN_SECONDS = 60.0  # for Ray, which goes on for ever where the head does not answer it


def join(address: str) -> None:
    """Join the cluster whose head is at HOST:PORT; ends the process with the reason where that is not possible."""
    name, _, port = address.rpartition(":")
    host = name.strip("[]")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        sys.exit(f"the cluster's head at {address} cannot be reached: {error.strerror or error}")
    if reason := mismatch(host, int(port), os.environ, CONNECT_SECONDS):
        sys.exit(f"the cluster at {address} cannot be joined: {reason}")
    limit = threading.Timer(JOIN_SECONDS, _give_up, [address])
    limit.daemon = True
    limit.start()
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (RayError, RuntimeError, OSError, ValueError) as error:  # such as another version of Ray or Python
        first = " ".join(str(error).split())
        sys.exit(f"the cluster at {address} cannot be joined: {first[:500]}{_hint()}")
    finally:
        limit.cancel()


def _hint() -> str:
    """Return what Ray leaves out of its reason: that the head may not accept the token."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return " (is the token of RAY_AUTH_TOKEN_PATH the head's?)"
    return " (if the head wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH)"


def _give_up(address: str) -> NoReturn:
    """End the process, whatever Ray is waiting for in the main thread."""
    print(  # noqa: T201 - as sys.exit does in the main thread
        f"the cluster at {address} cannot be joined: its head listens, but Ray was not done in {JOIN_SECONDS:.0f} s; "
        "the head's logs, in session_latest/logs below its --temp-dir, may say why",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
