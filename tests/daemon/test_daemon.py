"""The daemon's end: in order at the first signal, at once at the second."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING

import orjson
import pytest

from pocd.admin.client import AdminError, call
from pocd.process import EXIT_SIGNALLED
from tests.support.delivering import serving
from tests.support.processes import Chain, config, running
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.delivering import Server
    from tests.support.processes import Daemon


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


async def test_a_daemon_that_is_stopped_before_its_model_is_ready_ends(tmp_path: Path) -> None:
    async with Chain().served() as chain, running(config(tmp_path, chain.url, {})) as daemon:
        assert await daemon.end() == 0  # a worker takes seconds to load torch
    assert "worker_ready" not in [entry["action"] for entry in daemon.entries()]


REQUESTED = {"block_hash": "9F2E", "block_height": 7, "public_key": "key", "r_target": 1.414}
PROBLEM = (
    "the requested round at height 7 is of model.name 'bundled:tiny-llama', but this daemon runs model.name "
    "'bundled:tiny-qwen3', so it is not mined: POST /api/v1/pow/init with another round, or /api/v1/pow/resume"
)


async def test_a_requested_round_is_not_mined_by_another_model_after_a_restart(
    tmp_path: Path,
) -> None:
    async with Chain().served() as chain, serving() as server:
        urls = {"one": server.url}
        async with running(config(tmp_path, chain.url, urls, delivery__batch_seconds=60)) as daemon:
            await call(daemon.url, "POST", "/api/v1/pow/init/generate", body=REQUESTED)
            await daemon.until(lambda body: body["total_valid"] > 5)
            await daemon.end(signal.SIGKILL)  # what was found is in no batch yet
        other = config(tmp_path, chain.url, urls, model__name="bundled:tiny-qwen3")
        async with running(other) as daemon:
            body = await daemon.until(lambda body: body["worker"]["ready"] and body["round"])
            assert body["state"] == "STOPPED"
            assert body["problems"] == [{"part": "miner", "reason": PROBLEM}]
            assert body["round"]["model"] == "bundled:tiny-qwen3"  # the chain's, which is shown
            with pytest.raises(AdminError, match="there is no round to go on with"):
                await call(daemon.url, "POST", "/api/v1/pow/phase/generate")
            with pytest.raises(AdminError):
                await call(daemon.url, "GET", "/readyz")
            checked = body["funnel"]["checked"]
            # What the other model found goes out, under its name.
            body = await daemon.until(lambda body: body["funnel"]["delivered"] == body["funnel"]["valid"])
            assert body["funnel"]["checked"] == checked
            sent = [orjson.loads(server.requests.get_nowait().body) for _ in range(server.requests.qsize())]
            assert {(batch["model"], batch["block_hash"]) for batch in sent} == {("bundled:tiny-llama", "9F2E")}
            warnings = [entry for entry in daemon.entries() if entry["action"] == "round_not_restored"]
            assert [entry["event"] for entry in warnings] == [PROBLEM]
            body = await call(daemon.url, "POST", "/api/v1/pow/resume")
            assert (body["state"], body["pow_status"]["problems"]) == ("GENERATING", [])
            await a_signal_after_a_shutdown_by_the_api_changes_nothing(daemon, server)


async def a_signal_after_a_shutdown_by_the_api_changes_nothing(daemon: Daemon, server: Server) -> None:
    server.then(*[503] * 1000)  # so that the last deliveries take all the time that they are given
    await daemon.until(lambda body: body["funnel"]["valid"] > body["funnel"]["delivered"])
    await call(daemon.url, "POST", "/shutdown")
    assert await daemon.end(signal.SIGTERM) == 0
    assert daemon.entries()[-1]["action"] == "stopped"
