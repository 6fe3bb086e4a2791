"""The daemon's end: in order at the first signal, at once at the second."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING

from pocd.admin.client import call
from pocd.process import EXIT_SIGNALLED
from tests.support.delivering import serving
from tests.support.processes import Chain, config, running
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_second_signal_ends_the_daemon_at_once(tmp_path: Path) -> None:
    async with Chain().served() as chain, serving() as server:
        server.then(*[503] * 1000)  # so that the last deliveries take all the time that they are given
        async with running(config(tmp_path, chain.url, {"one": server.url})) as daemon:
            body = await daemon.until(lambda body: body["receivers"][0]["pending_batches"] > 0)
            worker = os.pidfd_open(body["worker"]["pid"])
            daemon.process.send_signal(signal.SIGTERM)
            assert await daemon.end(signal.SIGINT) in {EXIT_SIGNALLED + signal.SIGTERM, EXIT_SIGNALLED + signal.SIGINT}
            actions = [entry["action"] for entry in daemon.entries()]
        try:
            assert select.select([worker], [], [], PATIENCE)[0], "the worker outlived its daemon"
        finally:
            os.close(worker)
    assert actions[-1] == "forced"
    assert "stopped" not in actions


async def test_a_signal_after_a_shutdown_by_the_api_changes_nothing(tmp_path: Path) -> None:
    async with Chain().served() as chain, serving() as server:
        server.then(*[503] * 1000)
        async with running(config(tmp_path, chain.url, {"one": server.url})) as daemon:
            await daemon.until(lambda body: body["receivers"][0]["pending_batches"] > 0)
            await call(daemon.url, "POST", "/shutdown")
            assert await daemon.end(signal.SIGTERM) == 0
            assert daemon.entries()[-1]["action"] == "stopped"
