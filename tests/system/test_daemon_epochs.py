"""The whole daemon on a chain with epochs: regular and confirmation rounds, and a kill in each phase."""

from __future__ import annotations

import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np
import orjson
from aiohttp import web

from pocd.dev.chain import DevChain
from pocd.dev.epochs import WINDOWS, EpochChain, application
from pocd.http.server import listening
from pocd.lab.command import ComputeRequest, vectors
from pocd.protocol.epochs import Phase
from pocd.protocol.vectors import decode_vectors
from tests.support.processes import config, running

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

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

    @property
    def count(self) -> int:
        return sum(map(Counter.total, self.nonces.values()))

    def vectors(self, block_hash: str) -> dict[int, NDArray[np.float32]]:
        bodies = [body for body in self.batches.values() if body["block_hash"] == block_hash]
        return {each["nonce"]: decode_vectors(each["vector_b64"])[0] for body in bodies for each in body["artifacts"]}


def has_sent(sink: Sink, before: int, _body: dict[str, Any]) -> bool:
    return sink.count > before


def is_in(phase: Phase, body: dict[str, Any]) -> bool:
    epoch = body["chain"]["epoch"]
    return epoch is not None and epoch["phase"] == phase


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


# Of the development chain: 10 blocks of generation, 2, 15 of validation; a confirmation round announced at block 29.
VISITS = {
    Phase.GENERATE: 0,
    Phase.GENERATE_WIND_DOWN: 8,
    Phase.VALIDATE: 12,
    Phase.VALIDATE_WIND_DOWN: 24,
    Phase.INFERENCE: 28,
    Phase.ANNOUNCED: 29,
    Phase.CONFIRM: 31,
    Phase.CONFIRM_CLOSED: 41,
    Phase.CONFIRM_VALIDATE: 43,
}
"""Block of each phase, after the first, at which the daemon is looked at and killed."""

ROUNDS = {Phase.GENERATE: FIRST, Phase.CONFIRM: FIRST + 29}
"""Rounds that are mined, by their phase."""


async def test_a_whole_epoch_with_a_kill_in_each_phase(tmp_path: Path) -> None:
    blocks = DevChain("seed", block_seconds=1.0, genesis=time.time(), first_height=FIRST)
    chain, height, sink = EpochChain(blocks, "some/model", 32, in_schemes=True), FIRST, Sink()
    host = application(chain, lambda: blocks.block_time(height) + 0.5)
    async with (
        listening(host, "127.0.0.1", 0, shutdown_timeout=1) as url,
        listening(sink.application(), "127.0.0.1", 0, shutdown_timeout=1) as place,
    ):
        path = by_epoch(tmp_path, url, place)
        for phase, offset in VISITS.items():
            if phase is Phase.ANNOUNCED:
                chain.confirm(FIRST + offset)
            height = FIRST + offset
            checked = 0
            for _ in range(2 if phase in ROUNDS else 1):  # a round is gone on with
                async with running(path) as daemon:
                    told = await daemon.until(partial(is_in, phase))
                    assert told["chain"]["epoch"]["due"] == ROUNDS.get(phase)
                    if phase in ROUNDS:
                        checked = (await daemon.until(partial(has_checked, checked + 50)))["round"]["checked"]
                        sent = sink.count
                        await daemon.until(partial(has_sent, sink, sent))
                    else:
                        assert told["round"] is None
                    if phase is Phase.GENERATE_WIND_DOWN:  # when what was found is still accepted
                        await daemon.until(lambda body: body["funnel"]["delivered"] == body["funnel"]["checked"] > 100)
                    assert await daemon.end(signal.SIGKILL) == -signal.SIGKILL
        async with running(path) as daemon:
            told = await daemon.until(has_nothing_left)
            assert await daemon.end() == 0
    hashes = {FIRST: blocks.block_hash(FIRST), FIRST + 29: blocks.block_hash(FIRST + 31).lower()}
    found = sink.nonces
    assert found.keys() == set(hashes.items())
    regular, confirmation = (found[key] for key in hashes.items())
    assert regular == Counter(range(1, 1 + 3 * len(regular), 3)), "of node 1 of 3: dense, and each once"
    assert set(confirmation.values()) == {1}
    assert confirmation.total() + told["funnel"]["expired"] == told["funnel"]["checked"] - regular.total()
    for (_, block_hash), nonces in found.items():
        some = [*sorted(nonces)[:8], *sorted(nonces)[-8:]]  # found before a kill, and after it
        asked = ComputeRequest(MODEL, "artifacts", block_hash, "test-key", 32, "float32", "cpu", 8)
        theirs = sink.vectors(block_hash)
        assert all(np.linalg.norm(theirs[nonce] - vector) < 1e-2 for nonce, vector in vectors(asked, some))


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
            told = await daemon.until(lambda body: is_told_late(body) and body["chain"]["epoch"])
            assert told["chain"]["epoch"]["accepted_through"] is None
            (receiver,) = told["receivers"]
            assert receiver["expired_nonces"] == told["funnel"]["expired"] > 50
            assert f"pocd_nonces_expired {told['funnel']['expired']}.0" in await text_of(f"{daemon.url}/metrics")
            assert any(entry["action"] == "late" for entry in daemon.entries())
            sink.open = True
            await daemon.end()
    assert len(sink.nonces) == 1, "what is late is not sent"


def has_nothing_left(body: dict[str, Any]) -> bool:
    funnel = body["funnel"]
    return bool(funnel["checked"] == funnel["delivered"] + funnel["expired"])


def is_told_late(body: dict[str, Any]) -> bool:
    funnel = body["funnel"]
    return bool(funnel["checked"] == funnel["delivered"] + funnel["expired"] and funnel["expired"])


async def text_of(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()
