"""The whole daemon on a chain with epochs: regular and confirmation rounds, and a kill in each."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from pocd.dev.chain import DevChain
from pocd.dev.epochs import WINDOWS, EpochChain, application
from pocd.http.server import listening
from tests.support.processes import config, running

if TYPE_CHECKING:
    from pathlib import Path

FIRST = 1000
MODEL = "bundled:tiny-qwen3"


def has_checked(count: int, body: dict[str, Any]) -> bool:
    return body["round"] is not None and body["round"]["checked"] > count


async def test_a_whole_epoch_with_a_kill_in_each_round(tmp_path: Path) -> None:
    blocks = DevChain("seed", block_seconds=1.0, genesis=time.time(), first_height=FIRST)
    chain, height = EpochChain(blocks, "some/model", 32, in_schemes=True), FIRST
    batches: dict[str, dict[str, Any]] = {}

    async def receive(request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        batches[request.headers["webhook-id"]] = body
        return web.Response()

    receiver = web.Application(client_max_size=2**26)
    receiver.router.add_post("/generated", receive)
    host = application(chain, lambda: blocks.block_time(height) + 0.5)
    async with (
        listening(host, "127.0.0.1", 0, shutdown_timeout=1) as url,
        listening(receiver, "127.0.0.1", 0, shutdown_timeout=1) as sink,
    ):
        path = config(
            tmp_path,
            url,
            {"one": sink},
            chain__kind="gonka",
            chain__model="some/model",
            model__name=MODEL,
            round__scheme="artifacts",
            round__r_target=None,
            round__every=60,
            round__duration=60,
        )
        rounds = {}
        for stage, offset in ((FIRST, 0), (FIRST + 29, 31)):
            if offset:
                chain.confirm(stage)
            height = FIRST + offset
            async with running(path) as daemon:
                told = await daemon.until(partial(has_checked, 50))
                assert told["round"]["block_height"] == stage
                assert told["chain"]["epoch"]["due"] == stage
                daemon.process.kill()
                await daemon.process.wait()
            height += 3
            async with running(path) as daemon:
                told = await daemon.until(partial(has_checked, told["round"]["checked"] + 50))
                assert told["round"]["block_height"] == stage
                height = FIRST + offset + WINDOWS.generation
                await daemon.until(lambda body: body["round"] is None)
                await daemon.until(lambda body: body["funnel"]["delivered"] == body["funnel"]["checked"] > 0)
                assert await daemon.end() == 0
            rounds[stage] = blocks.block_hash(stage) if not offset else blocks.block_hash(FIRST + 31).lower()
    found: dict[tuple[int, str], Counter[int]] = {}
    for body in batches.values():
        assert (body["model"], body["scheme"], body["seq_len"]) == (MODEL, "artifacts", 32)
        nonces = found.setdefault((body["block_height"], body["block_hash"]), Counter())
        nonces.update(artifact["nonce"] for artifact in body["artifacts"])
    assert found.keys() == set(rounds.items())
    for nonces in found.values():  # of node 1 of 3: dense, and each once
        assert nonces == Counter(range(1, 1 + 3 * len(nonces), 3))
        assert len(nonces) > 100
