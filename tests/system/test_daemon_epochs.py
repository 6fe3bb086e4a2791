"""The whole daemon on a chain with epochs: regular and confirmation rounds, and a kill in each."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
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


@dataclass
class Sink:
    """A receiver of batches by their ids, which takes none while it is closed."""

    open: bool = True
    refused: int = 0
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def receive(self, request: web.Request) -> web.Response:
        if not self.open:
            self.refused += 1
            return web.Response(status=503)
        self.batches[request.headers["webhook-id"]] = orjson.loads(await request.read())
        return web.Response()

    def application(self) -> web.Application:
        receiver = web.Application(client_max_size=2**26)
        receiver.router.add_post("/generated", self.receive)
        return receiver

    @property
    def nonces(self) -> dict[tuple[int, str], Counter[int]]:
        found: dict[tuple[int, str], Counter[int]] = {}
        for body in self.batches.values():
            assert (body["model"], body["scheme"], body["seq_len"]) == (MODEL, "artifacts", 32)
            nonces = found.setdefault((body["block_height"], body["block_hash"]), Counter())
            nonces.update(artifact["nonce"] for artifact in body["artifacts"])
        return found


def by_epoch(folder: Path, url: str, sink: str) -> Path:
    return config(
        folder,
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


async def test_a_whole_epoch_with_a_kill_in_each_round(tmp_path: Path) -> None:
    blocks = DevChain("seed", block_seconds=1.0, genesis=time.time(), first_height=FIRST)
    chain, height = EpochChain(blocks, "some/model", 32, in_schemes=True), FIRST
    sink = Sink()
    host = application(chain, lambda: blocks.block_time(height) + 0.5)
    async with (
        listening(host, "127.0.0.1", 0, shutdown_timeout=1) as url,
        listening(sink.application(), "127.0.0.1", 0, shutdown_timeout=1) as place,
    ):
        path = by_epoch(tmp_path, url, place)
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
    found = sink.nonces
    assert found.keys() == set(rounds.items())
    for nonces in found.values():  # of node 1 of 3: dense, and each once
        assert nonces == Counter(range(1, 1 + 3 * len(nonces), 3))
        assert len(nonces) > 100


async def test_what_is_late_by_the_chains_height_is_set_aside_and_told(tmp_path: Path) -> None:
    blocks = DevChain("seed", block_seconds=1.0, genesis=time.time(), first_height=FIRST)
    chain, height, sink = EpochChain(blocks, "some/model", 32), FIRST, Sink()
    host = application(chain, lambda: blocks.block_time(height) + 0.5)
    async with (
        listening(host, "127.0.0.1", 0, shutdown_timeout=1) as url,
        listening(sink.application(), "127.0.0.1", 0, shutdown_timeout=1) as place,
    ):
        path = by_epoch(tmp_path, url, place)
        async with running(path) as daemon:
            await daemon.until(partial(has_checked, 50))
            sink.open = False
            height = FIRST + WINDOWS.generation  # generation is over, and artifacts are accepted at this last height
            await daemon.until(lambda body: body["round"] is None and sink.refused > 1)
            daemon.process.kill()
            await daemon.process.wait()
        async with running(path) as daemon:
            refused = sink.refused
            told = await daemon.until(lambda _: sink.refused > refused)
            assert told["funnel"]["expired"] == 0
            sink.open = True
            told = await daemon.until(lambda body: body["funnel"]["delivered"] == body["funnel"]["checked"])
            assert told["chain"]["epoch"]["accepted_through"] == height
            (nonces,) = sink.nonces.values()
            assert nonces == Counter(range(1, 1 + 3 * told["funnel"]["checked"], 3)), "nothing of a live round is lost"

            chain.confirm(FIRST + 29)
            sink.open, height = False, FIRST + 31
            await daemon.until(partial(has_checked, 50))
            height += WINDOWS.generation - 1
            told = await daemon.until(lambda body: body["chain"]["epoch"]["accepted_through"] == height)
            assert told["funnel"]["expired"] == 0
            height += 1
            await daemon.until(lambda body: body["round"] is None)
            daemon.process.kill()
            await daemon.process.wait()
        async with running(path) as daemon:
            told = await daemon.until(is_told_late)
            assert told["chain"]["epoch"]["accepted_through"] is None
            (receiver,) = told["receivers"]
            assert receiver["expired_nonces"] == told["funnel"]["expired"] > 50
            assert f"pocd_nonces_expired {told['funnel']['expired']}.0" in await text_of(f"{daemon.url}/metrics")
            assert any(entry["action"] == "late" for entry in daemon.entries())
            sink.open = True
            await daemon.end()
    assert len(sink.nonces) == 1, "what is late is not sent"


def is_told_late(body: dict[str, Any]) -> bool:
    funnel = body["funnel"]
    return bool(funnel["checked"] == funnel["delivered"] + funnel["expired"] and funnel["expired"])


async def text_of(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()
