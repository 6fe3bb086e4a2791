"""A machine that is cut off under Ray's own limits, in a cluster with TLS and a token."""

from __future__ import annotations

import asyncio
import contextlib
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from pocd.pool.causes import Cause
from pocd.pool.limits import WorkerLimits
from pocd.protocol.names import BUNDLED
from pocd.store.outbox import Outbox, Work
from pocd.store.thread import OutboxThread
from tests.cluster.test_cluster import MOST_IN_FLIGHT, NODE, ROUND, at_work, pooled
from tests.support.authorities import Authority
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.pool.pool import Pool
    from tests.support.ray_machines import Machines

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'pocd[ray]'")

CUT_SECONDS = 20.0


def protected(folder: Path, machines: Machines) -> dict[str, str]:
    """Ray's variables of machines that encrypt and want a token; for the rest Ray's own limits."""
    assert machines.network is not None
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    certificate = Authority(folder, "authority").certify(
        "machine", "127.0.0.1", machines.network.address, *machines.network.free
    )
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    return own | certificate | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def tell(measured: str) -> None:
    """Say how long something took, to whoever asks by -s or a failure."""
    print(measured)  # noqa: T201 - as said above


async def be_cut_off_for_a_while(pool: Pool, machines: Machines) -> None:
    one, two = await at_work(pool, "one", "two")
    ended = sum(two.causes.values())
    machines.cut("two")
    computed = one.computed
    goes_on = until(lambda: one.computed >= computed + MOST_IN_FLIGHT)
    await asyncio.gather(asyncio.sleep(CUT_SECONDS), goes_on)  # the fault itself is a span of time
    machines.heal("two")
    began = time.monotonic()
    await at_work(pool, "one", "two")
    tell(f"cut off for {CUT_SECONDS:.0f} s: back after {time.monotonic() - began:.1f} s, {two.causes}")
    assert sum(two.causes.values()) == ended or two.last_error


async def be_cut_off_for_good(pool: Pool, machines: Machines) -> None:
    one, two = await at_work(pool, "one", "two")
    ends = two.causes[Cause.SILENT] + two.causes[Cause.CLUSTER]
    machines.cut("two")
    began = time.monotonic()
    await until(lambda: two.causes[Cause.SILENT] + two.causes[Cause.CLUSTER] > ends)
    tell(f"cut off for good: its spans are lent again after {time.monotonic() - began:.1f} s: {two.last_error}")
    computed = one.computed
    await until(lambda: one.computed >= computed + MOST_IN_FLIGHT)


async def test_what_a_machine_that_is_cut_off_had_is_checked_once(tmp_path: Path, machines: Machines) -> None:
    if machines.network is None:
        pytest.skip("no machine can be cut off: network namespaces need root and the command ip")
    machines.variables = protected(tmp_path, machines)
    await machines.start("one")
    await machines.start("two")
    limits = WorkerLimits(batch=PATIENCE)
    variables = machines.variables
    async with pooled(tmp_path, BUNDLED / "tiny-llama", machines.address, limits=limits, variables=variables) as (
        pool,
        miner,
    ):
        await be_cut_off_for_a_while(pool, machines)
        await be_cut_off_for_good(pool, machines)
        await miner.close(PATIENCE)
        assert miner.mining is not None
        done = miner.mining.checked
        assert done == sum(worker.computed for worker in pool.workers)
    with contextlib.closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        found = await outbox(Outbox.begin_round, Work(ROUND, NODE), 0.0)
    gaps = sum(map(len, found.progress.gaps()))
    assert found.checked == done == found.progress.end - gaps, "each once"
    assert gaps <= MOST_IN_FLIGHT
