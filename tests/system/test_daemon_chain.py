"""The whole daemon against chains that reorganise, lie, go back and are set up anew."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import TYPE_CHECKING

import aiohttp
import orjson
from aiohttp import web

from pocd.dev import chain as devchain
from pocd.http.server import listening
from tests.support.anvil import needs_anvil, running_anvil
from tests.support.processes import Chain, Daemon, config, fails, running
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path


async def reasons(daemon: Daemon) -> list[str]:
    """What keeps the chain from being followed."""
    async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}/readyz") as response:
        problems = orjson.loads(await response.read())["problems"]
        return [problem["reason"] for problem in problems if problem["part"] == "chain"]


@needs_anvil
async def test_a_real_reorganisation_ends_the_round_and_what_is_unsent_stays_here(tmp_path: Path) -> None:
    """A receiver that is down, a block that is replaced, and then the receiver comes up."""
    status, seen = 503, list[dict[str, object]]()

    async def receive(request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        if status == 200:
            seen.append(body)
        return web.Response(status=status)

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/generated", receive)
    async with running_anvil() as node, listening(app, "127.0.0.1", 0, shutdown_timeout=1) as url:
        await node.mine(5)
        path = config(
            tmp_path,
            node.url,
            {"one": url},
            chain__kind="evm",
            chain__confirmations=1,
            round__every=4,
            round__duration=4,
        )
        async with running(path) as daemon:
            body = await daemon.until(lambda body: body["round"] and body["receivers"][0]["pending_batches"] > 1)
            old = body["round"]
            assert (body["chain"]["chain_id"], body["chain"]["height"], old["block_height"]) == ("31337", 4, 4)
            block = await node.call("eth_getBlockByNumber", "0x4", False)
            assert isinstance(block, dict)
            assert old["block_hash"] == block["hash"]

            await node.reorganise(3)
            body = await daemon.until(lambda body: body["round"] and body["round"]["block_hash"] != old["block_hash"])
            new = body["round"]
            assert new["block_height"] == 4
            assert any(entry["action"] == "round_replaced" for entry in daemon.entries())
            body = await daemon.until(lambda body: body["receivers"][0]["withdrawn_batches"] > 0)
            status = 200
            await daemon.until(lambda body: body["receivers"][0]["delivered_batches"] > 0)
            assert {batch["block_hash"] for batch in seen} == {new["block_hash"]}
            assert await daemon.end() == 0
        # The same node, the next round: nothing of the old one comes back.
        await node.mine(4)
        async with running(path) as daemon:
            await daemon.until(lambda body: body["round"] and body["round"]["block_height"] == 8)
            body = await daemon.status()
            assert body["receivers"][0]["withdrawn_batches"] > 0
        assert old["block_hash"] not in {batch["block_hash"] for batch in seen}


async def test_of_three_nodes_two_lie_and_what_is_known_outlives_a_restart(tmp_path: Path) -> None:
    honest = Chain(height=7)
    other_chain = Chain(height=9, dev=devchain.DevChain("test", 1.0, honest.dev.genesis, chain_id="other"))
    other_hashes = Chain(height=8, dev=devchain.DevChain("fork", 1.0, honest.dev.genesis))
    async with contextlib.AsyncExitStack() as stack:
        for chain in (honest, other_chain, other_hashes):
            await stack.enter_async_context(chain.served())
        every = {"round__every": 5, "round__duration": 5}
        async with running(config(tmp_path, honest.url, {}, chain__id="elsewhere", **every)) as daemon:
            body = await daemon.until(lambda body: "elsewhere" in (body["chain"]["problem"] or ""))
            assert "pocd-dev" in body["chain"]["problem"]
            assert body["round"] is None
            await daemon.end()
        path = config(tmp_path, honest.url, {}, **every)
        async with running(path) as daemon:
            await daemon.until(lambda body: body["round"])
            await daemon.end()
        # The store belongs to the chain.
        code, line = await fails(config(tmp_path, honest.url, {}, chain__id="elsewhere", **every))
        assert (code, "belongs to chain pocd-dev" in line) == (78, True)
        # Now the liars stand first. The store knows the chain's id and the hash of block 5, where the round began.
        urls = [other_chain.url, other_hashes.url, honest.url]
        path = config(tmp_path, "", {}, chain__urls=urls, **every)
        other_hashes.height = 5
        async with running(path) as daemon:
            body = await daemon.until(lambda body: body["round"] and body["chain"]["height"] == 7)
            assert (body["round"]["block_hash"], body["chain"]["chain_id"]) == (honest.dev.block_hash(5), "pocd-dev")
            assert await reasons(daemon) == []
            log = daemon.log.read_text()
            assert "expected pocd-dev" in log
            assert "was seen before" in log
            honest.height = 10
            await daemon.until(lambda body: body["round"] and body["round"]["block_hash"] == honest.dev.block_hash(10))
            assert other_chain.polls < honest.polls, "a node that was refused is left alone for a while"


async def test_a_round_is_found_again_by_its_start_and_a_head_that_goes_back_starts_none_also_after_a_kill(
    tmp_path: Path,
) -> None:
    """With each fifth block from block 1 on three blocks of a round; a killed daemon's worker ends with it."""
    async with Chain(height=17).served() as chain:
        path = config(tmp_path, chain.url, {}, round__every=5, round__offset=1, round__duration=3)
        async with running(path) as daemon:
            body = await daemon.until(lambda body: body["round"])
            assert (body["round"]["block_height"], body["round"]["block_hash"]) == (16, chain.dev.block_hash(16))
            chain.height = 19
            await daemon.until(lambda body: body["chain"]["height"] == 19 and body["round"] is None)
            assert (await daemon.status())["state"] in {"IDLE", "LOADING"}
            chain.height = 12  # where a round would run
            await daemon.until(lambda body: body["chain"]["height"] == 12 and body["chain"]["problem"])
            assert "is below 19" in (await daemon.status())["chain"]["problem"]
            assert (await daemon.status())["round"] is None
            # No round is active, so the worker waits, and nothing that it sends can fail.
            worker = (await daemon.until(lambda body: body["worker"]["ready"]))["worker"]["pid"]
            ended = os.pidfd_open(worker)
            await daemon.end(signal.SIGKILL)
        try:
            assert select.select([ended], [], [], PATIENCE)[0], "the worker outlived its daemon"
        finally:
            os.close(ended)
        async with running(path) as daemon:
            body = await daemon.until(lambda body: body["chain"]["height"] == 12)
            assert body["round"] is None
            assert any("is below 19" in reason for reason in await reasons(daemon))
            chain.height = 21
            await daemon.until(lambda body: body["round"] and body["round"]["block_height"] == 21)
