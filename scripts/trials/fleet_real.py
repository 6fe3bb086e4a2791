"""A few real daemons against one chain node and one receiver of this process, seen as the simulation sees its hosts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from pocd.admin.client import call
from pocd.dev.chain import DevChain, application
from pocd.dev.processes import started
from pocd.http.server import listening
from pocd.receiver.app import application as receiver_application
from pocd.receiver.store import Store
from scripts.trials.fleet_world import BLOCK_SECONDS, Plan, Seen, genesis_of, is_within, policy_of

if TYPE_CHECKING:
    from pathlib import Path

    from aiohttp.typedefs import Handler, Middleware

    from pocd.dev.processes import Running

MINING_SECONDS = 300.0  # for all daemons to mine
PLAN = Plan(hosts=3, steady=20.0, new_round=60.0, node_down=(80.0, 110.0), receiver_down=(120.0, 180.0), drained=360.0)

CONFIG = """\
[node]
public_key = "fleet"
node_id = {number}
node_count = {hosts}
[chain]
urls = ["{chain}"]
[round]
every = {every}
duration = {every}
scheme = "poc2"
seq_len = 64
[model]
name = "bundled:tiny-llama"
dtype = "float32"
device = "cpu"
[worker]
batch_size = 8
[delivery]
receivers = [{{ name = "one", url = "{receiver}" }}]
[admin]
port = 0
[store]
path = "{store}"
[log]
format = "json"
"""


class _Watch:
    """Seconds since all daemons mine; before that the chain stands still."""

    def __init__(self) -> None:
        self.made_at = time.time()
        self.began_at: float | None = None

    def passed(self) -> float:
        """Return the seconds since the beginning, 0 before it."""
        return 0.0 if self.began_at is None else time.time() - self.began_at

    def chain(self) -> float:
        """Return the chain's time."""
        return self.made_at + self.passed()


async def observe(plan: Plan, folder: Path) -> tuple[Plan, Seen]:
    """Let real daemons run through a plan.

    Args:
        plan: What happens. How much they find, and how fast the receiver is, is found out.
        folder: Place of their configurations, logs and stores.

    Returns:
        The plan with what they found, and what node and receiver saw.
    """
    seen, watch = Seen(), _Watch()
    chain = DevChain("fleet", BLOCK_SECONDS, genesis_of(plan, watch.made_at))
    node = application(chain, watch.chain)
    node.middlewares.append(_counting(seen, watch, plan.node_down))
    store = await Store.open(folder / "receiver.db")
    receiver = receiver_application(store, None)
    receiver.middlewares.insert(0, _taking(seen, watch, plan.receiver_down))
    try:
        async with AsyncExitStack() as stack:
            chain_url = await stack.enter_async_context(listening(node, "127.0.0.1", 0, shutdown_timeout=1.0))
            receiver_url = await stack.enter_async_context(listening(receiver, "127.0.0.1", 0, shutdown_timeout=1.0))
            daemons = [
                await stack.enter_async_context(_daemon(plan, folder, number, chain_url, receiver_url))
                for number in range(plan.hosts)
            ]
            await asyncio.wait_for(_all_mine(daemons), MINING_SECONDS)
            for counter in (seen.polls, seen.posts, seen.accepted, seen.sent, seen.proofs):
                counter.clear()
            watch.began_at = time.time()
            await asyncio.sleep(plan.receiver_down[1])
            while seen.drained_at is None and watch.passed() < plan.drained:
                await asyncio.sleep(0.5)
                if await _waiting(daemons) <= plan.hosts:
                    seen.drained_at = watch.passed()
    finally:
        await store.close()
    found = sum(seen.proofs[second] for second in range(int(plan.steady), int(plan.new_round)))
    return replace(plan, proofs=found / (plan.new_round - plan.steady) / plan.hosts), seen


def _daemon(
    plan: Plan, folder: Path, number: int, chain: str, receiver: str
) -> contextlib.AbstractAsyncContextManager[Running]:
    config = folder / f"{number}.toml"
    store = folder / f"{number}.db"
    every = policy_of(plan).every
    config.write_text(
        CONFIG.format(number=number, hosts=plan.hosts, chain=chain, receiver=receiver, every=every, store=store)
    )
    return started(folder, "run", "--config", str(config), log=folder / f"{number}.log")


async def _all_mine(daemons: list[Running]) -> None:
    for daemon in daemons:
        while (await call(daemon.url, "GET", "/api/v1/pow/status"))["funnel"]["delivered"] == 0:
            await asyncio.sleep(0.5)


async def _waiting(daemons: list[Running]) -> int:
    """Return how many batches wait in all queues."""
    statuses = [await call(daemon.url, "GET", "/api/v1/pow/status") for daemon in daemons]
    return sum(receiver["pending_batches"] for status in statuses for receiver in status["receivers"])


def _counting(seen: Seen, watch: _Watch, down: tuple[float, float]) -> Middleware:
    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        seen.polls[int(watch.passed())] += 1
        return web.Response(status=503) if is_within(watch.passed(), down) else await handler(request)

    return count


def _taking(seen: Seen, watch: _Watch, down: tuple[float, float]) -> Middleware:
    @web.middleware
    async def take(request: web.Request, handler: Handler) -> web.StreamResponse:
        body = await request.read()
        second = int(watch.passed())
        seen.posts[second] += 1
        seen.sent[second] += len(body)
        if is_within(watch.passed(), down):
            return web.Response(status=503)
        answer = await handler(request)
        seen.accepted[second] += answer.status < 300
        seen.proofs[second] += len(orjson.loads(body)["nonces"]) if answer.status < 300 else 0
        return answer

    return take
