"""`pocd outbox` and its API against a running daemon, with receivers that refuse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from aiohttp import web

from pocd.http.server import listening
from tests.support.forking import Process
from tests.support.processes import Chain, Daemon, config, running
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Moody:
    """A receiver that answers as the test says, and notes the ids that it accepted."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.choosy = False  # says `status` to the first, third, … batch that it is shown, and takes the others
        self.accepted: set[str] = set()
        self._shown: list[str] = []
        self.asked = 0
        self._arrived = asyncio.Condition()

    async def _handle(self, request: web.Request) -> web.Response:
        await request.read()
        self.asked += 1
        batch_id = request.headers["webhook-id"]
        if batch_id not in self._shown:
            self._shown.append(batch_id)
        if self.status == 200 or (self.choosy and self._shown.index(batch_id) % 2):
            async with self._arrived:
                self.accepted.add(batch_id)
                self._arrived.notify_all()
            return web.json_response({})
        return web.json_response({"why": "the test says so"}, status=self.status)

    async def until_accepted(self, batch_id: str) -> None:
        async with asyncio.timeout(PATIENCE), self._arrived:
            await self._arrived.wait_for(lambda: batch_id in self.accepted)

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[Moody]:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/generated", self._handle)
        async with listening(app, "127.0.0.1", 0, shutdown_timeout=1) as self.url:
            yield self


async def pocd(daemon: Daemon, *arguments: str) -> tuple[int, str, str]:
    """Run `pocd outbox …` as a person would: exit status, standard output, standard error."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Process("-m", "pocd", "outbox", *arguments, "--url", daemon.url, out=out.fileno(), err=err.fileno())
        code = await process.wait()
        said = [os.pread(each.fileno(), 2**20, 0).decode() for each in (out, err)]
    return code, said[0], said[1]


async def ask(daemon: Daemon, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"{daemon.url}/api/v1/outbox{path}", data=body) as response,
    ):
        return response.status, orjson.loads(await response.read())


async def until_set_aside(daemon: Daemon, state: str, count: int) -> None:
    await daemon.until(lambda body: body["receivers"][0][f"{state}_batches"] >= count)


async def test_dead_letters_are_listed_shown_sent_again_and_given_up_and_so_is_a_queue_whose_receiver_left(
    tmp_path: Path,
) -> None:
    async with Chain().served() as chain, Moody().served() as receiver:
        async with running(config(tmp_path, chain.url, {"one": receiver.url})) as daemon:
            receiver.status, receiver.choosy = 422, True
            await until_set_aside(daemon, "dead", 3)
            receiver.status = 200
            await daemon.until(lambda body: body["receivers"][0]["delivered_batches"] > 0)  # the queue went on
            await refuses_what_cannot_be_meant(daemon)
            await dead_letters_are_listed_shown_sent_again_and_given_up(daemon, receiver)
            receiver.status, receiver.choosy = 503, False
            await daemon.until(lambda body: body["receivers"][0]["pending_batches"] > 0)
            await daemon.end()
        receiver.status = 200
        async with running(config(tmp_path, chain.url, {"new": receiver.url})) as daemon:
            await a_queue_whose_receiver_left_is_kept_and_can_be_given_up(daemon)


async def dead_letters_are_listed_shown_sent_again_and_given_up(daemon: Daemon, receiver: Moody) -> None:
    code, page = await ask(daemon, "GET", "?state=dead&limit=2")
    assert code == 200
    first, second = page["batches"]
    assert (first["receiver"], first["sequence"], first["state"]) == ("one", 1, "dead")
    assert first["attempts"] >= 2, "it was refused again when another had passed"
    assert first["reason"] == 'refused: HTTP 422: {"why": "the test says so"}'
    _, rest = await ask(daemon, "GET", f"?state=dead&after={page['next']}")
    assert rest["batches"][0]["sequence"] > second["sequence"]

    code, out, _ = await pocd(daemon, "show", first["id"])
    assert code == 0
    assert "refused: HTTP 422" in out
    assert orjson.loads(out[out.index("{\n") :])["batch_id"] == first["id"]

    assert await pocd(daemon, "retry", first["id"]) == (0, "1 batches queued again; asked at once: one\n", "")
    await receiver.until_accepted(first["id"])
    assert second["id"] not in receiver.accepted
    code, out, _ = await pocd(daemon, "list", "--state", "dead")
    assert (code, second["id"] in out, first["id"] in out) == (0, True, False)

    assert (await pocd(daemon, "purge", second["id"]))[0] != 0, "without a terminal nobody can agree"
    assert (await pocd(daemon, "purge", second["id"], "--yes"))[:2] == (0, "1 batches given up\n")
    assert (await ask(daemon, "GET", f"/{second['id']}"))[0] == 404
    code, out, _ = await pocd(daemon, "retry", "--all")
    assert (code, "queued again; asked at once: one" in out) == (0, True)
    body = await daemon.until(lambda body: body["receivers"][0]["dead_batches"] == 0)
    assert body["funnel"]["purged"] == second["nonces"]
    assert {"outbox_retry", "outbox_purge", "dead_letter"} <= {entry["action"] for entry in daemon.entries()}


async def a_queue_whose_receiver_left_is_kept_and_can_be_given_up(daemon: Daemon) -> None:
    body = await daemon.until(lambda body: body["receivers"][0]["delivered_batches"] > 0)
    new, old = body["receivers"]
    assert (new["name"], old["name"], old["url"]) == ("new", "one", None)
    assert old["pending_batches"] > 0
    code, _, _ = await pocd(daemon, "purge", "--receiver", "one", "--state", "pending", "--yes")
    assert code == 0
    body = await daemon.status()
    assert body["receivers"][1]["pending_batches"] == 0
    assert body["receivers"][1]["purged_batches"] == old["purged_batches"] + old["pending_batches"]


async def test_a_receiver_in_trouble_is_an_alarm_expires_what_is_old_and_is_parked(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        chain = await stack.enter_async_context(Chain().served())
        receiver = await stack.enter_async_context(Moody().served())
        path = config(tmp_path, chain.url, {"one": receiver.url}, delivery__expire_after=0.5)
        daemon = await stack.enter_async_context(running(path))
        receiver.status = 401
        body = await daemon.until(
            lambda body: body["alarms"] and body["receivers"][0]["next_attempt_seconds"] is not None
        )
        assert body["alarms"][0]["reason"].startswith("answers HTTP 401")
        async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}/metrics") as response:
            assert 'pocd_receiver_alarm{receiver="one"} 1.0' in await response.text()

        receiver.status = 503
        await until_set_aside(daemon, "expired", 1)
        receiver.status = 200
        assert (await pocd(daemon, "retry", "--receiver", "one", "--state", "dead"))[0] == 0  # only asks it at once
        await daemon.until(lambda body: not body["alarms"] and body["receivers"][0]["delivered_batches"] > 0)
        _, page = await ask(daemon, "GET", "?state=expired")
        expired = page["batches"][0]
        assert expired["reason"].startswith("HTTP ")
        assert (await pocd(daemon, "retry", "--state", "expired"))[0] == 0
        await receiver.until_accepted(expired["id"])

        receiver.status = 410
        body = await daemon.until(lambda body: body["receivers"][0]["parked"])
        assert body["alarms"][0]["part"] == "receiver one"
        assert "parked since" in body["alarms"][0]["reason"]
        assert "HTTP 410" in body["alarms"][0]["reason"]
        receiver.status, asked = 200, receiver.asked
        pending = body["receivers"][0]["pending_batches"]
        await daemon.until(lambda body: body["receivers"][0]["pending_batches"] > pending)
        assert receiver.asked == asked
        assert (await pocd(daemon, "retry", "--receiver", "one"))[0] == 0
        await daemon.until(lambda body: not body["alarms"] and not body["receivers"][0]["parked"])


BAD = [
    ("GET", "?state=lost", None, 400, "state"),
    ("GET", "?limit=0", None, 400, "limit"),
    ("GET", "?after=x", None, 400, "after"),
    ("GET", "?receiver=%2F", None, 400, "receiver"),
    ("GET", "?colour=red", None, 400, "colour"),
    ("GET", "/nosuch", None, 404, "id"),
    ("POST", "/retry", b"{", 400, None),
    ("POST", "/retry", b"[]", 400, None),
    ("POST", "/retry", b"{}", 400, None),
    ("POST", "/retry", b'{"ids":[]}', 400, "ids"),
    ("POST", "/retry", b'{"ids":["nosuch"]}', 404, "ids"),
    ("POST", "/retry", b'{"states":["pending"]}', 400, "states"),
    ("POST", "/retry", b'{"states":[]}', 400, "states"),
    ("POST", "/retry", b'{"receiver":"nobody"}', 404, "receiver"),
    ("POST", "/purge", b"{}", 400, None),
    ("POST", "/purge", b'{"states":["delivered"]}', 400, "states"),
    ("POST", "/purge", b'{"states":["pending"]}', 409, "states"),
    ("POST", "/purge", b'{"states":["pending"],"receiver":"one"}', 409, "states"),
]


async def refuses_what_cannot_be_meant(daemon: Daemon) -> None:
    for method, path, body, status, field in BAD:
        code, answer = await ask(daemon, method, path, body)
        assert (code, answer["error"]["field"]) == (status, field), (path, body, answer)
        assert answer["error"]["message"]
    code, _, err = await pocd(daemon, "retry")
    assert (code, "say which batches" in err) == (2, True)
    code, _, err = await pocd(daemon, "list", "--state", "lost")
    assert (code, "'pending', 'delivered', 'dead', 'expired' or 'withdrawn'" in err) == (1, True)
    assert (await daemon.status())["funnel"]["purged"] == 0
