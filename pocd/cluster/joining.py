"""Joining a Ray cluster as a driver, from a process of its own."""

from __future__ import annotations

import logging
import socket
import sys

import ray
from ray.exceptions import RayError

CONNECT_SECONDS = 5.0  # to the cluster's head


def join(address: str) -> None:
    """Join the cluster whose head is at HOST:PORT; ends the process with the reason where that is not possible."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        sys.exit(f"the cluster's head at {address} cannot be reached: {error.strerror or error}")
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (RayError, RuntimeError, OSError, ValueError) as error:  # such as another version of Ray or Python
        first = " ".join(str(error).split())
        sys.exit(f"the cluster at {address} cannot be joined: {first[:500]}")
