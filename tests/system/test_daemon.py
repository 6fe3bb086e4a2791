"""The whole daemon: real processes, sockets, signals and files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from pocd.admin.client import AdminError, call
from pocd.cli.report import as_text
from pocd.http.server import listening
from pocd.receiver import app as receiver
from pocd.receiver import store as receiver_store
from pocd.store.bodies import unpack_body
from tests.support.forking import at_work
from tests.support.processes import Chain, Daemon, config, fails, free_port, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def receiving(folder: Path, port: int = 0) -> AsyncIterator[str]:
    """The reference receiver, on a store in `folder`."""
    store = await receiver_store.Store.open(folder / "receiver.db")
    try:
        async with listening(receiver.application(store, None), "127.0.0.1", port, shutdown_timeout=1) as url:
            yield url
    finally:
        await store.close()


async def batches(url: str) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/batches?limit=1000") as response:
        page = orjson.loads(await response.read())
    assert page["next"] is None
    return [entry["batch"] for entry in page["batches"]]


def stored_proofs(folder: Path) -> list[tuple[str, int]]:
    """(block hash, nonce) of every proof in the daemon's store, which must not be running."""
    with contextlib.closing(sqlite3.connect(folder / "outbox.db")) as db:
        bodies = [orjson.loads(unpack_body(body)) for (body,) in db.execute("SELECT body FROM batches ORDER BY number")]
        assert db.execute("SELECT count(*) FROM proofs").fetchone() == (0,)
    return [(body["block_hash"], nonce) for body in bodies for nonce in body["nonces"]]


def dense(folder: Path) -> bool:
    """Whether every round's nonces were checked without a gap, each once."""
    with contextlib.closing(sqlite3.connect(folder / "outbox.db")) as db:
        rows = db.execute("SELECT cursor, islands, checked FROM progress WHERE checked > 0").fetchall()
    return bool(rows) and all(islands == "[]" and cursor == checked for cursor, islands, checked in rows)


def nonces_checked(folder: Path) -> list[int]:
    """Every nonce of node 1 of 3 that the daemon's store says was checked, of its one round."""
    with contextlib.closing(sqlite3.connect(folder / "outbox.db")) as db:
        ((cursor, islands),) = db.execute("SELECT cursor, islands FROM progress WHERE checked > 0")
    spans = [(0, cursor), *orjson.loads(islands)]
    return [1 + 3 * position for start, stop in spans for position in range(start, stop)]


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_proofs_arrive_and_recompute_also_when_one_of_two_workers_is_killed(tmp_path: Path) -> None:
    async with Chain().served() as chain, receiving(tmp_path) as url:
        notify = tmp_path / "notify.sock"
        said: list[str] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(notify))
            manager.setblocking(False)
            asyncio.get_running_loop().add_reader(manager, lambda: said.append(manager.recv(4096).decode()))
            environment = {"NOTIFY_SOCKET": str(notify), "WATCHDOG_USEC": "500000"}
            path = config(tmp_path, chain.url, {"one": url}, model__device=["cpu", "cpu"])
            async with running(path, **environment) as daemon:
                assert "torch" not in Path(f"/proc/{daemon.process.pid}/maps").read_text()
                body = await daemon.until(lambda body: all(each["computed_per_second_1m"] for each in body["workers"]))
                workers_are_told_apart(body)
                await daemon.until(lambda body: body["total_valid"] > 50 and body["funnel"]["delivered"] > 20)
                assert memory(daemon.process.pid) < 150e6
                (pid,) = body["workers"][1]["pids"]
                assert memory(at_work(pid)) < 1e9
                os.kill(pid, signal.SIGKILL)
                body = await daemon.until(lambda body: body["workers"][1]["restarts"] == 1)
                assert f"worker process {pid} was killed by signal 9" in body["workers"][1]["last_error"]
                assert (body["workers"][1]["causes"]["crash"], body["workers"][0]["restarts"]) == (1, 0)
                assert (body["state"], body["problems"], body["alarms"]) == ("GENERATING", [], [])
                await metrics_tell_workers_apart(daemon)
                checked = body["total_checked"]
                await daemon.until(lambda body: body["total_checked"] > checked + 30 and body["workers"][1]["ready"])
                assert await daemon.end() == 0
            asyncio.get_running_loop().remove_reader(manager)
        held = await batches(url)
    # It is ready when its API listens, and goes on to say what it loads; of quick stages only the last may be told.
    loading = next(i for i, text in enumerate(said) if text.startswith("STATUS=LOADING ("))
    assert said.index("READY=1") < loading < said.index("STOPPING=1")
    assert "WATCHDOG=1" in said
    in_time = all(entry["action"] != "delivery_deadline" for entry in daemon.entries())
    what_was_delivered_recomputes(tmp_path, held, body["worker"], chain.dev.block_hash(1), in_time=in_time)


def what_was_delivered_recomputes(
    folder: Path, held: list[dict[str, Any]], worker: dict[str, Any], block: str, *, in_time: bool
) -> None:
    """Check each distance that arrived, and that of those that were checked none is left out that is valid."""
    from pocd.compute.engine import block_run
    from pocd.compute.model import load_model
    from pocd.protocol.schemes import SCHEMES

    assert {(batch["block_hash"], batch["block_height"], batch["public_key"]) for batch in held} == {
        (block, 1, "test-key")
    }
    assert {batch["model_fingerprint"] for batch in held} == {worker["fingerprint"]}
    assert (worker["decoder"], worker["batch_size"]) == ("flat", 8)
    found = {nonce: d for batch in held for nonce, d in zip(batch["nonces"], batch["dist"], strict=True)}
    assert len(found) == sum(len(batch["nonces"]) for batch in held)
    stored = stored_proofs(folder)
    assert sorted((block, nonce) for nonce in found) == sorted(stored[: len(found)])
    valid = {nonce for _, nonce in stored}
    assert len(found) == len(stored) or not in_time  # what does not fit into its last seconds waits
    assert all(nonce % 3 == 1 and d < 1.414 for nonce, d in found.items())
    model = load_model("bundled:tiny-llama", dtype="float32", device="cpu")
    every = nonces_checked(folder)
    some = sorted({*every[:160], *every[-160:]})  # before a worker was killed, and after it
    with block_run(model, SCHEMES["poc2"], block_hash=block, public_key="test-key", seq_len=16) as run:
        computed = dict(zip(some, run.distances(some, batch_size=8), strict=True))
    both = found.keys() & computed.keys()
    assert {nonce: found[nonce] for nonce in both} == pytest.approx(
        {nonce: computed[nonce] for nonce in both}, abs=1e-5
    )
    # Nothing that was valid was left out either (a rounding's width around the limit set aside), nor anything added.
    assert all(nonce in valid for nonce, d in computed.items() if d < 1.414 - 1e-5)
    assert valid <= set(every)


def workers_are_told_apart(body: dict[str, Any]) -> None:
    assert [(each["number"], each["device"], each["execution"]) for each in body["workers"]] == [
        (0, "cpu", "eager"),
        (1, "cpu", "eager"),
    ]
    assert body["workers"][0]["execution_reason"].startswith("on the CPU compiling gains too little")
    assert re.findall(r"^ +(\d): cpu, ", as_text(body), re.MULTILINE) == ["0", "1"]


async def metrics_tell_workers_apart(daemon: Daemon) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}/metrics") as response:
        metrics = await response.text()
    assert 'pocd_worker_restarts_total{cause="crash",worker="1"} 1.0' in metrics
    assert 'pocd_worker_restarts_total{cause="hung",worker="0"} 0.0' in metrics
    assert re.search(r'^pocd_worker_info\{.*execution="eager",.*worker="0"\} 1.0$', metrics, re.MULTILINE)


async def test_nothing_is_lost_by_sigkill_without_a_receiver_nor_by_sigterm_with_one_that_is_down(
    tmp_path: Path,
) -> None:
    port = free_port()
    async with Chain().served() as chain:
        async with running(config(tmp_path, chain.url, {})) as daemon:
            found = await daemon.until(lambda body: body["funnel"]["valid"] > 5)
            assert found["funnel"]["stored"] == 0
            assert any(entry["action"] == "no_receiver" for entry in daemon.entries())
            assert await daemon.end(signal.SIGKILL) == -signal.SIGKILL
        path = config(tmp_path, chain.url, {"one": f"http://127.0.0.1:{port}"})
        async with running(path) as daemon:
            before = (await daemon.status())["funnel"]
            assert before["valid"] >= found["funnel"]["valid"]
            await daemon.until(
                lambda body: body["funnel"]["checked"] > before["checked"] and body["funnel"]["stored"] > 10
            )
            assert await daemon.end() == 0
        async with running(path) as daemon, receiving(tmp_path, port) as url:
            await call(daemon.url, "POST", "/api/v1/pow/stop")
            await daemon.until(lambda body: body["funnel"]["delivered"] == body["funnel"]["valid"] > before["valid"])
            assert await daemon.end() == 0
            held = await batches(url)
    nonces = [nonce for batch in held for nonce in batch["nonces"]]
    assert len(set(nonces)) == len(nonces)
    assert sorted(nonces) == sorted(nonce for _, nonce in stored_proofs(tmp_path))
    assert dense(tmp_path)


async def test_rounds_follow_the_chain_through_its_nonsense_until_a_stop_that_outlives_a_restart(
    tmp_path: Path,
) -> None:
    async with Chain().served() as chain, receiving(tmp_path) as url:
        path = config(tmp_path, chain.url, {"one": url}, delivery__batch_seconds=60)
        async with running(path) as daemon:
            await daemon.until(lambda body: body["total_valid"] > 5)
            await metrics_and_errors(daemon)
            await a_new_block_replaces_the_round_within_two_polls(daemon, chain, url)
            await nonsense_of_the_chain_costs_nothing_else(daemon, chain)
            await daemon.until(lambda body: body["total_valid"] > 5)
            assert (await call(daemon.url, "POST", "/api/v1/pow/stop"))["state"] == "STOPPED"
            # Nothing found is lost: it is sent now, not when it would be old enough.
            await daemon.until(lambda body: body["funnel"]["delivered"] == body["funnel"]["valid"] > 5)
            with pytest.raises(AdminError):
                await call(daemon.url, "GET", "/readyz")
            async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}/readyz") as response:
                reasons = (await response.json())["problems"]
            assert [reason["part"] for reason in reasons] == ["miner"]
            await daemon.end()
        async with running(path) as daemon:
            body = await daemon.until(lambda body: body["worker"]["ready"] and body["round"])
            assert (body["state"], body["total_checked"]) == ("STOPPED", body["round"]["checked"])
            checked = body["total_checked"]
            assert (await call(daemon.url, "POST", "/api/v1/pow/resume"))["state"] == "GENERATING"
            await daemon.until(lambda body: body["total_checked"] > checked)
            assert (await call(daemon.url, "GET", "/readyz"))["ready"] is True
            await call(daemon.url, "POST", "/shutdown")
            assert await daemon.process.wait() == 0


async def metrics_and_errors(daemon: Daemon) -> None:
    """What a daemon that generates says in its metrics, and to calls that there are not."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{daemon.url}/metrics") as response:
            text = await response.text()
        async with session.get(f"{daemon.url}/nothing") as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "not_found"
        async with session.get(f"{daemon.url}/api/v1/pow/stop") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
    for name in (
        "pocd_nonces_checked_total",
        "pocd_chain_head_height",
        'pocd_state{pocd_state="GENERATING"} 1.0',
    ):
        assert name in text


async def a_new_block_replaces_the_round_within_two_polls(daemon: Daemon, chain: Chain, receiver_url: str) -> None:
    polls, chain.height = chain.polls, 2
    # One may have been on its way, and a third gets no answer.
    chain.answer = lambda _request: web.Response(status=503) if chain.polls > polls + 2 else None
    body = await daemon.until(lambda body: body["round"]["block_height"] == 2)
    chain.answer = lambda _request: None
    assert body["round"]["block_hash"] == chain.dev.block_hash(2)
    # What the old round found is delivered at once, long before it would be old enough.
    await daemon.until(lambda body: body["funnel"]["delivered"] > 5)
    await daemon.until(lambda body: body["total_checked"] > 0)
    assert {batch["block_height"] for batch in await batches(receiver_url)} == {1}
    chain.height = 7
    await daemon.until(lambda body: body["round"]["block_height"] == 7)


async def nonsense_of_the_chain_costs_nothing_else(daemon: Daemon, chain: Chain) -> None:
    for answer in (b"<html>bad gateway</html>", b'{"result": {"sync_info"', b'{"result": 3}', b"\xff\xfe"):
        chain.answer = lambda _request, answer=answer: web.Response(body=answer)  # type: ignore[misc] # mypy infers no lambda with a default
        polls, checked = chain.polls, (await daemon.status())["total_checked"]
        await daemon.until(lambda body, checked=checked: body["total_checked"] > checked)  # type: ignore[misc] # mypy infers no lambda with a default
        await daemon.until(lambda _body, polls=polls: chain.polls > polls + 1)  # type: ignore[misc] # mypy infers no lambda with a default
    actions = [entry["action"] for entry in daemon.entries()]
    chain.answer = lambda _request: None
    chain.height = 9
    await daemon.until(lambda body: body["round"]["block_height"] == 9)
    restored = [entry["action"] for entry in daemon.entries()][len(actions) :]
    assert "chain_down" in actions
    assert "chain_restored" in restored


async def status_of(daemon: Daemon, path: str, **headers: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(daemon.url + path, headers=headers) as response:
        return response.status


async def a_token_is_asked_for_and_never_shown(daemon: Daemon, token: str) -> None:
    assert await status_of(daemon, "/healthz") == 200
    for path in ("/api/v1/pow/status", "/metrics", "/api/v1/outbox", "/api/v1/outbox/x"):
        assert await status_of(daemon, path) == 401
    assert await status_of(daemon, "/metrics", Authorization="Bearer wrong") == 401
    assert await status_of(daemon, "/metrics", Authorization=f"Bearer {token}") == 200
    body = await call(daemon.url, "GET", "/api/v1/pow/status", token=token)
    assert token not in str(body)
    assert token not in daemon.log.read_text()


async def test_bad_starts_are_told_in_one_line_also_beside_a_daemon_with_a_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("correct-horse-battery\n")
    async with Chain().served() as chain:
        port = free_port()
        path = config(tmp_path, chain.url, {}, admin__port=port, admin__token_file=str(token))
        async with running(path) as daemon:
            await a_token_is_asked_for_and_never_shown(daemon, "correct-horse-battery")
            code, line = await fails(config(tmp_path, chain.url, {}))
            assert (code, "second daemon" in line, "outbox.db" in line) == (75, True, True)
            other = tmp_path / "other.db"
            code, line = await fails(config(tmp_path, chain.url, {}, admin__port=port, store__path=str(other)))
            assert (code, f"127.0.0.1:{port}" in line) == (75, True)
        code, line = await fails(config(tmp_path, chain.url, {}, store__path=str(tmp_path / "pocd.toml" / "x.db")))
        assert (code, "store" in line) == (78, True)
        code, line = await fails(config(tmp_path, chain.url, {}, model__name="bundled:nosuch"))
        assert (code, "bundled:tiny-qwen3" in line) == (78, True)
        code, line = await fails(config(tmp_path, chain.url, {}, round__seq_len=100_000))
        assert (code, "seq_len 100000" in line) == (78, True)
        code, line = await fails(config(tmp_path, chain.url, {}, model__device="cuda:9"))
        assert (code, "cuda:9" in line) == (75, True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            code, line = await fails(config(tmp_path, chain.url, {}, model__device="auto"))
        assert (code, "model.device is 'auto'" in line, "this machine has 0 of the 1" in line) == (75, True, True)
        token = tmp_path / "empty"
        token.write_text("\n")
        code, line = await fails(config(tmp_path, chain.url, {}, admin__token_file=str(token)))
        assert (code, "admin.token_file" in line) == (78, True)
