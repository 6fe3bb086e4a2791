"""Joining a cluster whose head listens, and says nothing: a process of its own, with Ray."""

from __future__ import annotations

import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'pocd[ray]'")

IMPATIENT = """
from pocd.cluster import joining
joining.CONNECT_SECONDS = joining.JOIN_SECONDS = 0.5
joining.join("127.0.0.1:PORT")
"""


def test_a_head_that_says_nothing_is_not_waited_for_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:  # the kernel accepts connections
        port = head.getsockname()[1]
        program = [sys.executable, "-c", IMPATIENT.replace("PORT", str(port))]
        ended = subprocess.run(program, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"the cluster at 127.0.0.1:{port} cannot be joined: its head listens, but Ray was not done")
