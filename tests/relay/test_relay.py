"""`pocd relay`: real processes between a proof server and an orchestrator that is away, late, or restarted."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
import structlog
from aiohttp import web
from yarl import URL

from pocd.clock import SteadyClock
from pocd.dev.processes import started
from pocd.process import EXIT_CONFIG
from pocd.relay import relay as at_work
from pocd.relay.relay import FullError, Relay
from pocd.store.thread import OutboxThread
from tests.relay.test_callbacks import OF, generated
from tests.support.clocks import ManualClock
from tests.support.command_line import pocd_here
from tests.support.delivering import Server, serving
from tests.support.processes import free_port
from tests.support.waiting import PATIENCE, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PATH = "/v2/poc-batches/MiniMaxAI%252FMiniMax-M2.7"


@dataclass
class Orchestrator:
    """Takes callbacks, or answers with `status`; notes what it took by the path as it was written."""

    status: int = 200
    asked: int = 0
    taken: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        body = orjson.loads(await request.read())
        if self.status == 200:
            self.taken.append((request.raw_path, body))
        return web.Response(status=self.status)

    @property
    def nonces(self) -> list[int]:
        return [artifact["nonce"] for _, body in self.taken for artifact in body.get("artifacts", [])]


@asynccontextmanager
async def orchestrating() -> AsyncIterator[tuple[Server, Orchestrator]]:
    async with serving() as server:
        orchestrator = Orchestrator()
        server.handle = orchestrator.handle
        yield server, orchestrator


async def post(url: str, body: bytes, **headers: str) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(URL(url, encoded=True), data=body, headers=headers) as response,
    ):
        return response.status, orjson.loads(await response.read())


async def status(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/status") as response:
        found: dict[str, Any] = await response.json()
        return found


async def test_what_is_acknowledged_outlives_a_kill_and_arrives_once_in_order(tmp_path: Path) -> None:
    async with orchestrating() as (server, orchestrator):
        orchestrator.status = 503
        options = ("--to", server.url, "--port", "0", "--store", str(tmp_path / "relay.db"))
        async with started(tmp_path, "relay", *options, log=tmp_path / "first.log") as relay:
            assert await post(f"{relay.url}{PATH}/generated", generated(1, 2)) == (200, {"stored": 2})
            assert await post(f"{relay.url}{PATH}/generated", generated(2, 3)) == (200, {"stored": 1})
            verdict = orjson.dumps({**OF, "request_id": "2f0c", "n_total": 200})
            assert await post(f"{relay.url}{PATH}/validated", verdict) == (200, {"stored": 1})
            await until(lambda: orchestrator.asked)
            relay.process.kill()
            await soon(relay.process.wait())
        async with started(tmp_path, "relay", *options, log=tmp_path / "second.log") as relay:
            assert await post(f"{relay.url}{PATH}/generated", generated(3, 1)) == (200, {"stored": 0})
            orchestrator.status = 200
            assert await post(f"{relay.url}{PATH}/generated", generated(4)) == (200, {"stored": 1})
            await until(lambda: len(orchestrator.taken) == 4)
            assert [queue["name"] for queue in (await status(relay.url))["queues"]] == [
                f"generated {PATH}",
                f"validated {PATH}",
            ]
            await relay.end()
    assert orchestrator.nonces == [1, 2, 3, 4]
    assert {path for path, _ in orchestrator.taken} == {f"{PATH}/generated", f"{PATH}/validated"}
    assert [body["request_id"] for _, body in orchestrator.taken if "request_id" in body] == ["2f0c"]


async def test_an_orchestrator_that_is_away_for_a_part_of_the_window_gets_what_is_not_late(tmp_path: Path) -> None:
    async with orchestrating() as (server, orchestrator):
        orchestrator.status = 503
        options = ("--to", server.url, "--port", "0", "--store", str(tmp_path / "relay.db"))
        # What came when the orchestrator was away is late in the end …
        async with started(
            tmp_path, "relay", *options, "--generated-seconds", "1", log=tmp_path / "first.log"
        ) as relay:
            assert (await post(f"{relay.url}{PATH}/generated", generated(*range(20))))[0] == 200
            async with asyncio.timeout(PATIENCE):
                while (await status(relay.url))["queues"][0]["expired_nonces"] < 20:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)
            relay.process.kill()
            await soon(relay.process.wait())
        # … and of the live part nothing is lost, though it is away still, and the relay is killed once more.
        for log, some in (("second", range(20, 30)), ("third", range(30, 40))):
            async with started(tmp_path, "relay", *options, log=tmp_path / f"{log}.log") as relay:
                orchestrator.asked = 0
                assert (await post(f"{relay.url}{PATH}/generated", generated(*some)))[0] == 200
                await until(lambda: orchestrator.asked)
                relay.process.kill()
                await soon(relay.process.wait())
        orchestrator.status = 200
        async with started(tmp_path, "relay", *options, log=tmp_path / "fourth.log") as relay:
            await until(lambda: len(orchestrator.nonces) >= 20)
            (left,) = (await status(relay.url))["queues"]
            assert left["expired_nonces"] == 20
            await relay.end()
    assert orchestrator.nonces == list(range(20, 40))


@asynccontextmanager
async def relaying(folder: Path, to: str, clock: ManualClock) -> AsyncIterator[Relay]:
    outbox = OutboxThread(folder / "relay.db")
    try:
        relay = Relay(
            to,
            outbox,
            windows={"generated": 240.0, "validated": 1500.0},
            clock=SteadyClock(clock),
            log=structlog.get_logger(),
        )
        await relay.restore()
        task = asyncio.create_task(relay.run())
        yield relay
        task.cancel()
        await asyncio.wait([task])
    finally:
        outbox.close()


def queue(relay: Relay, kind: str) -> dict[str, Any]:
    (found,) = (each for each in relay.status()["queues"] if each["name"].startswith(kind))
    return dict(found)


async def test_what_is_late_is_set_aside_and_counted_and_holds_no_verdict_up(tmp_path: Path) -> None:
    clock = ManualClock()
    async with orchestrating() as (server, orchestrator), relaying(tmp_path, server.url, clock) as relay:
        orchestrator.status = 503
        await relay.take("generated", PATH, generated(1, 2, 3))
        await until(lambda: queue(relay, "generated")["last_error"])
        clock.advance(300)
        await relay.take("generated", PATH, generated(4))
        await until(lambda: queue(relay, "generated")["expired_nonces"] == 3)
        orchestrator.status = 200
        await relay.take("validated", PATH, orjson.dumps({**OF, "request_id": "x"}))
        await until(lambda: queue(relay, "validated")["delivered_batches"] == 1)
        clock.advance(60)
        await relay.take("generated", PATH, generated(5))
        await until(lambda: queue(relay, "generated")["delivered_nonces"] == 2)
    assert orchestrator.nonces == [4, 5]


async def test_two_callbacks_at_once_pass_a_nonce_on_once(tmp_path: Path) -> None:
    async with orchestrating() as (server, orchestrator), relaying(tmp_path, server.url, ManualClock()) as relay:
        stored = await asyncio.gather(*(relay.take("generated", PATH, generated(*range(50))) for _ in range(8)))
        assert sorted(stored) == [0] * 7 + [50]
        await until(lambda: len(orchestrator.nonces) == 50)
        assert relay.status()["repeated"] == 350


async def test_what_was_delivered_long_ago_is_forgotten(tmp_path: Path) -> None:
    clock = ManualClock()
    async with orchestrating() as (server, orchestrator), relaying(tmp_path, server.url, clock) as relay:
        await relay.take("generated", PATH, generated(1))
        await until(lambda: queue(relay, "generated")["delivered_batches"] == 1)
        clock.advance(at_work.KEPT_SECONDS + 60)
        await relay._look()
        assert await relay.take("generated", PATH, generated(1)) == 1
        await until(lambda: len(orchestrator.nonces) == 2)


async def test_queues_and_nonces_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_work, "MOST_QUEUES", 2)
    monkeypatch.setattr(at_work, "MOST_REMEMBERED", 10)
    nobody = f"http://127.0.0.1:{free_port()}"
    async with relaying(tmp_path, nobody, ManualClock()) as relay:
        for path in ("/a", "/b"):
            await relay.take("generated", path, generated(1))
        with pytest.raises(FullError, match="2 queues"):
            await relay.take("generated", "/c", generated(1))
        with pytest.raises(FullError, match="10 nonces"):
            await relay.take("generated", "/a", generated(*range(2, 11)))
        assert await relay.take("generated", "/a", generated(2)) == 1


async def test_what_is_wrong_is_told_and_changes_nothing(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    options = ("--to", nobody, "--port", "0", "--store", str(tmp_path / "relay.db"))
    async with started(tmp_path, "relay", *options) as relay:
        answer, body = await post(f"{relay.url}/generated", b"{}")
        assert (answer, body["error"]["field"]) == (400, "public_key")
        assert (await post(f"{relay.url}/a/else", b"{}"))[0] == 404
        answer, body = await post(f"{relay.url}/generated", generated(1), Origin="http://evil.example")
        assert (answer, body["error"]["code"]) == (403, "foreign_origin")
        assert (await status(relay.url))["queues"] == []


def test_an_address_that_cannot_be_called_is_refused(tmp_path: Path) -> None:
    ended = pocd_here("relay", "--to", "api:9100", "--store", tmp_path / "relay.db")
    assert ended.returncode == EXIT_CONFIG
    assert "--to must be an http:// or https:// URL" in ended.stderr
    assert not (tmp_path / "relay.db").exists()
