"""Disks that are full, fail, lie or are closed to us: mining waits or the daemon ends, and nothing stored is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import structlog
from aiohttp import web

from pocd.admin.client import AdminError, call
from pocd.clock import SteadyClock
from pocd.delivery.keeper import Keeper, StoreLimits
from pocd.http.server import listening
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs, Round
from pocd.receiver import app as receiver
from pocd.receiver import store as receiver_store
from pocd.store.batches import form_batches
from pocd.store.deliveries import next_pending, record_delivered
from pocd.store.errors import StoreError, StoreUnavailableError
from pocd.store.outbox import Outbox, Totals, Work
from pocd.store.proofs import Weights
from pocd.store.thread import OutboxThread
from tests.support.clocks import NOW, ManualClock
from tests.support.delivering import dispatchers
from tests.support.processes import Chain, Daemon, config, fails, running
from tests.support.stored import commit_span
from tests.support.waiting import PATIENCE
from tests.system.test_daemon import batches, dense, receiving, stored_proofs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp.typedefs import Handler

WEIGHTS = Weights("f00d", "float32")
NODE = Node(1, 3)
ROUND = Round("AB", 10, "miner", 2.0, "poc2", "tiny", 16)
PAGE = 4096


FILLED = 100_000  # nonces, whose batches take more than a mebibyte


def fill(path: Path, round_: Round = ROUND, *, nonces: int = FILLED, delivered: bool = False) -> None:
    """Make a store of more than a mebibyte, whose batches wait for the receiver "one" or were accepted by it."""
    now = time.time()
    with closing(Outbox.open(path)) as outbox:
        outbox.begin_round(Work(round_, NODE), now)
        proofs = Proofs.of_distances(
            (nonce, 1 + nonce * 0.61803398874989 % 1) for nonce in NODE.nonces(Span(0, nonces))
        )
        commit_span(outbox, round_, NODE, Span(0, nonces), proofs, WEIGHTS, now)
        form_batches(outbox, ["one"], size=2000, age=1, now=now, current=None)
        while delivered and (head := next_pending(outbox, "one")):
            record_delivered(outbox, "one", head.batch, now)


def round_of(chain: Chain) -> Round:
    """A round of the chain's block 1, which another miner's settings made."""
    return Round(chain.dev.block_hash(1), 1, "test-key", 2.0, "poc2", "tiny", 16)


def reasons(body: dict[str, Any], part: str = "store") -> list[str]:
    return [problem["reason"] for problem in body["problems"] if problem["part"] == part]


async def readiness(daemon: Daemon) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}/readyz") as response:
        return response.status, await response.json()


async def polled(daemon: Daemon, chain: Chain, times: int) -> None:
    """Let the daemon live on for so many looks at the chain, five a second."""
    polls = chain.polls
    await daemon.until(lambda _body: chain.polls > polls + times)


# A disk that takes nothing for a while


LARGEST_FILE = 256 * 1024  # of a daemon whose disk is full


async def fill_disk(daemon: Daemon, folder: Path) -> tuple[int, int]:
    """Let a daemon that mines write its log, but nothing more to its store; returns its limits before."""
    wal = folder / "outbox.db-wal"
    await daemon.until(lambda _body: wal.exists() and wal.stat().st_size > 4 * LARGEST_FILE)
    before = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (LARGEST_FILE, before[1]))
    return before


async def nothing_lost_or_doubled(folder: Path, url: str, more_than: int) -> None:
    """Check that the receiver holds what the store says, and more proofs than there were."""
    held = [(batch["block_hash"], nonce) for batch in await batches(url) for nonce in batch["nonces"]]
    assert len(set(held)) == len(held)
    assert sorted(held) == sorted(stored_proofs(folder))
    assert len(held) > more_than
    assert dense(folder)


async def test_a_full_disk_holds_mining_until_it_takes_something_again_and_keeps_no_daemon_from_its_end(
    tmp_path: Path,
) -> None:
    async with Chain().served() as chain, receiving(tmp_path) as url:
        path = config(tmp_path, chain.url, {"one": url}, round__r_target=2.0)
        async with running(path) as daemon:
            unlimited = await fill_disk(daemon, tmp_path)
            body = await daemon.until(reasons)
            assert "cannot be written" in reasons(body)[0]
            assert body["state"] == "IDLE"
            chain.height = 2  # the next block changes nothing
            await polled(daemon, chain, 35)  # the keeper looks more than once
            status, ready = await readiness(daemon)
            assert (status, reasons(ready)) == (503, reasons(await daemon.status()))
            assert (await daemon.status())["funnel"] == body["funnel"]
            with pytest.raises(AdminError, match="cannot be written"):  # nor can a stop be remembered
                await call(daemon.url, "POST", "/api/v1/pow/stop")
            assert (await daemon.status())["state"] == "IDLE"
            assert "store_released" not in [entry["action"] for entry in daemon.entries()]
            assert daemon.log.stat().st_size < LARGEST_FILE / 4  # it is under the same limit, and was not meant

            resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, unlimited)
            checked = body["funnel"]["checked"]
            await daemon.until(lambda body: body["funnel"]["checked"] > checked + 50 and not body["problems"])
            assert (await readiness(daemon))[0] == 200
            assert (await daemon.status())["worker"]["restarts"] == 0

            await fill_disk(daemon, tmp_path)
            checked = (await daemon.until(reasons))["funnel"]["checked"]
            assert await daemon.end() == 0
        async with running(path) as daemon:
            assert (await daemon.status())["funnel"]["checked"] == checked
            await daemon.until(lambda body: body["funnel"]["checked"] > checked)
            await call(daemon.url, "POST", "/api/v1/pow/stop")
            await daemon.until(lambda body: body["funnel"]["delivered"] == body["funnel"]["valid"])
            assert await daemon.end() == 0
        await nothing_lost_or_doubled(tmp_path, url, checked)


def limit_pages(outbox: Outbox, more: int) -> None:
    """Let the file grow by `more` pages, and no further."""
    (pages,) = outbox.db.execute("PRAGMA page_count").fetchone()
    outbox.db.execute(f"PRAGMA max_page_count = {pages + more}")


async def test_what_a_full_disk_refused_is_lent_again_once_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    clock = ManualClock()
    with closing(OutboxThread(path)) as outbox:
        miner = Miner(outbox, Changes(), clock=clock)
        limits = StoreLimits(keep_delivered=1, expire_after=1, size=2**40, free=0)
        log = structlog.get_logger()
        keeper = Keeper(path, outbox, miner, dispatchers(outbox), limits=limits, clock=SteadyClock(clock), log=log)
        await miner.set_round(Work(ROUND, NODE))
        await outbox(limit_pages, 0)
        lease = await miner.lease(2000)

        await miner.complete(lease, [1.0] * 2000, WEIGHTS)
        assert miner.held is not None
        assert "SQLITE_FULL" in miner.held
        assert outbox.view.totals == Totals()
        proofs = Proofs.of_distances((nonce, 1.0) for nonce in lease.nonces)
        with pytest.raises(StoreUnavailableError, match="SQLITE_FULL"):
            await outbox(commit_span, ROUND, NODE, lease.span, proofs, WEIGHTS, NOW)
        await keeper.look()
        assert miner.current is None, "the probe found no room"

        await outbox(limit_pages, 1000)
        await keeper.look()
        assert miner.held is None
        again = await miner.lease(2000)
        assert again.span == lease.span
        await miner.complete(again, [1.0] * 2000, WEIGHTS)
        assert outbox.view.totals == Totals(checked=2000, valid=2000)


# StoreLimits of our own


async def test_a_store_at_its_limit_holds_mining_until_the_receiver_takes_something(tmp_path: Path) -> None:
    willing = False

    @web.middleware
    async def refuse(request: web.Request, handler: Handler) -> web.StreamResponse:
        # Not simply closed: then the daemon would ask again less and less often.
        return await handler(request) if willing else web.Response(status=429, headers={"Retry-After": "1"})

    store = await receiver_store.Store.open(tmp_path / "receiver.db")
    app = receiver.application(store, None)
    app.middlewares.insert(0, refuse)
    async with Chain().served() as chain, listening(app, "127.0.0.1", 0, shutdown_timeout=1) as url:
        fill(tmp_path / "outbox.db", round_of(chain))
        async with running(config(tmp_path, chain.url, {"one": url}, store__size_limit_mib=1)) as daemon:
            body = await daemon.until(lambda body: reasons(body) and body["worker"]["ready"] and body["round"])
            assert "store.size_limit_mib is 1: mend what keeps receivers from accepting" in reasons(body)[0]
            await polled(daemon, chain, 5)
            assert (await daemon.status())["total_checked"] == 0
            willing = True
            body = await daemon.until(lambda body: body["total_checked"] > 0)
            assert reasons(body) == []
            async with asyncio.timeout(PATIENCE):
                while (await store.stats())[0].nonces < FILLED:  # noqa: ASYNC110 - what delivers is another process
                    await asyncio.sleep(0.05)
            actions = [entry["action"] for entry in daemon.entries()]
            assert actions.index("store_held") < actions.index("pruned_early") < actions.index("store_released")
    await store.close()


async def test_delivered_batches_go_before_mining_is_held(tmp_path: Path) -> None:
    async with Chain().served() as chain:
        fill(tmp_path / "outbox.db", round_of(chain), delivered=True)
        async with running(config(tmp_path, chain.url, {}, store__size_limit_mib=1)) as daemon:
            await daemon.until(lambda body: body["total_checked"] > 0)
            actions = [entry["action"] for entry in daemon.entries()]
            assert "pruned_early" in actions
            assert "store_held" not in actions
            assert (await daemon.status())["funnel"]["delivered"] == FILLED


async def test_a_disk_with_too_little_room_holds_mining_from_the_start(tmp_path: Path) -> None:
    async with Chain().served() as chain:
        async with running(config(tmp_path, chain.url, {}, store__free_space_mib=2**40)) as daemon:
            body = await daemon.until(lambda body: body["worker"]["ready"] and body["round"])
            await polled(daemon, chain, 5)
            status, ready = await readiness(daemon)
            assert status == 503
            (reason,) = reasons(ready)
            assert reason.endswith("store.free_space_mib is 1099511627776: make room on the disk")
            body = await daemon.status()
            assert (body["state"], body["total_checked"], reasons(body)) == ("IDLE", 0, [reason])
            assert await daemon.end() == 0


# Damage


def damage(path: Path) -> None:
    """Write garbage over a tenth of the file's pages, in its middle."""
    pages = path.stat().st_size // PAGE
    with path.open("r+b") as file:
        file.seek(pages // 2 * PAGE)
        file.write(os.urandom(pages // 10 * PAGE))


def cut(path: Path) -> None:
    """Take the second half of the file away."""
    os.truncate(path, path.stat().st_size // 2 // PAGE * PAGE)


@pytest.mark.parametrize("harm", [damage, cut])
async def test_a_damaged_store_is_told_at_the_start_and_left_as_it_is(tmp_path: Path, harm: Any) -> None:  # noqa: ANN401 - one of two
    path = tmp_path / "outbox.db"
    fill(path)
    harm(path)
    before = path.read_bytes()
    code, line = await fails(config(tmp_path, "http://127.0.0.1:1", {}))
    assert code == 78
    assert f"store {path} is damaged" in line
    assert "Move it and its -wal file away" in line
    assert path.read_bytes() == before


# As `pocd run` with a file too large to be looked through.
UNLOOKED = "from pocd.cli.main import main; from pocd.store import opening; opening.LOOKED_THROUGH_BYTES = 0; main()"


async def test_damage_that_is_found_at_work_ends_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    async with Chain().served() as chain, receiving(tmp_path) as url:
        fill(path, round_of(chain))
        damage(path)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", UNLOOKED, "run", "--config", str(config(tmp_path, chain.url, {"one": url}))),
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE):
            _, err = await process.communicate()
        assert process.returncode == 78, err.decode()
        assert b"Traceback" not in err
        lines = err.decode().splitlines()
        assert any('"action":"listening"' in line for line in lines), "it was not found at the start"
        assert f"pocd: store {path} is damaged" in lines[-1]
        # What came before the damage was delivered, and nothing that was damaged.
        whole = [nonce for batch in await batches(url) for nonce in batch["nonces"]]
        assert whole == list(range(1, 1 + 3 * len(whole), 3))


# Folders that are closed to us


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Be nobody in particular while the context lasts: permissions do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError as error:
        pytest.skip(f"cannot become another user here: {error}")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_is_read_only_is_refused_by_name(exists: bool) -> None:  # noqa: FBT001 - a parameter
    # Not tmp_path, which lies in a folder that others cannot enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "outbox.db"
        if exists:
            fill(path, nonces=10)
            path.chmod(0o666)
        before = path.read_bytes() if exists else b""
        folder.chmod(0o555)
        with unprivileged(), pytest.raises(StoreError, match="permissions") as caught:
            Outbox.open(path)
        folder.chmod(0o755)
        assert str(path) in str(caught.value)
        assert "check store.path" in str(caught.value)
        assert (path.read_bytes() if path.exists() else b"") == before
