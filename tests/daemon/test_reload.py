"""SIGHUP: what differs between two configurations, and real daemons that read theirs again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocd.admin.client import call
from pocd.config.settings import Settings
from pocd.daemon.reload import AT_ONCE, R_TARGET_FOLLOWS, Reloader, compare, diff, merge
from pocd.delivery.posting import Receiver
from pocd.delivery.receivers import CallbackError
from pocd.http.webhooks import WebhookKeys
from pocd.protocol.nonces import Span
from pocd.protocol.proof import Proofs
from pocd.store.outbox import Outbox, Work
from tests.support.clocks import NOW, ROUND
from tests.support.delivering import NODE, WEIGHTS, dispatchers, prepared, serving
from tests.support.processes import Chain, Daemon, config, running
from tests.support.stored import commit_span
from tests.support.waiting import PATIENCE, soon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from pocd.delivery.receivers import Receivers

SECRET, OTHER_SECRET = "whsec_" + "QUFB" * 8, "whsec_" + "QkJC" * 8
BASE = Settings.model_validate({"node": {"public_key": "key"}, "chain": {"urls": ["http://127.0.0.1:1"]}})
# Another value of some keys of every section, as a configuration may hold it.
OTHERS: dict[str, Any] = {
    "node.public_key": "another",
    "chain.urls": ["http://127.0.0.1:2"],
    "chain.poll_interval": 3.0,
    "round.r_target": 1.3,
    "round.every": 100,
    "round.seq_len": 128,
    "round.scheme": "poc3",
    "model.name": "bundled:tiny-llama",
    "model.revision": "v2",
    "model.device": "cpu",
    "worker.batch_size": 8,
    "delivery.receivers": [{"name": "one", "url": "http://127.0.0.1:3"}],
    "delivery.batch_nonces": 7,
    "admin.port": 0,
    "admin.callback_origins": ["https://good.example"],
    "validation.max_queued": 3,
    "store.path": "/srv/outbox.db",
    "log.level": "debug",
    "log.format": "json",
}
NAMES = st.sets(st.sampled_from(sorted(OTHERS)))


def changed(names: set[str]) -> Settings:
    """The settings with other values for these keys."""
    values: dict[str, Any] = BASE.model_dump()
    for name in names:
        section, _, key = name.partition(".")
        values[section][key] = OTHERS[name]
    return Settings(**values)


@given(NAMES)
def test_each_key_that_differs_changes_at_once_or_waits_for_a_restart(names: set[str]) -> None:
    found = diff(BASE, changed(names))
    assert not set(found.apply) & set(found.restart)
    assert {*found.apply, *found.restart} == names
    assert set(found.apply) <= AT_ONCE
    assert names & AT_ONCE - set(found.apply) <= {"round.r_target"}
    # It belongs to the model and the scheme that it was chosen for.
    assert ("round.r_target" in found.apply) == ("round.r_target" in names and not names & R_TARGET_FOLLOWS)


@given(NAMES)
def test_what_is_merged_is_in_effect_and_only_the_rest_still_differs(names: set[str]) -> None:
    new = changed(names)
    found = diff(BASE, new)
    merged = merge(BASE, new, found.apply)
    assert diff(BASE, merged).apply == found.apply
    assert diff(BASE, merged).restart == ()
    assert diff(merged, new).apply == ()
    assert diff(merged, new).restart == found.restart
    assert merge(BASE, new, names) == new


RECEIVERS = st.lists(
    st.builds(
        Receiver,
        st.sampled_from("abcd"),
        st.sampled_from(["http://x", "http://y"]),
        st.sampled_from([None, WebhookKeys((b"1",)), WebhookKeys((b"2",))]),
    ),
    unique_by=lambda receiver: receiver.name,
)


@given(RECEIVERS, RECEIVERS)
def test_receivers_are_added_removed_changed_or_the_same(old: list[Receiver], new: list[Receiver]) -> None:
    found = compare(old, new)
    assert all(found.values()), "what is not there is not named"
    before, after = {receiver.name for receiver in old}, {receiver.name for receiver in new}
    same = {receiver.name for receiver in new if receiver in old}
    named = [set(found.get(what, ())) for what in ("added", "removed", "changed")]
    assert named == [after - before, before - after, (after & before) - same]


# The dispatchers, over a real store and a real receiver.


async def test_a_new_receiver_is_served_and_one_that_is_gone_is_not(tmp_path: Path) -> None:
    with prepared(tmp_path / "outbox.db") as bench:
        async with serving() as old, serving() as new:
            each = dispatchers(
                bench.outbox, [Receiver("a", old.url, None)], lambda one: bench.dispatcher(one.url, one.name)
            )
            async with delivering(each):
                await bench.store(1, "a")
                each.wake()
                await old.take(1)
                kept, *_ = each
                await each.configure([Receiver("b", new.url, None), Receiver("a", old.url, None)])
                assert list(each)[1] is kept, "whoever has not changed goes on undisturbed"
                callback = await each.callback(f"{old.url}/x", wanted=None)
                await each.configure([Receiver("a", new.url, None)])  # moved, with its queue
                await bench.store(1, "a")
                each.wake()
                (request,) = await new.take(1)
                assert request.sequence == 2
                assert old.requests.empty()
                with pytest.raises(CallbackError):
                    await each.callback(f"{old.url}/x", wanted=None)  # no longer an origin of a receiver
                assert callback not in [dispatcher.receiver for dispatcher in each]
                assert each.names() == ["a"]


@contextlib.asynccontextmanager
async def delivering(each: Receivers) -> AsyncIterator[None]:
    task = asyncio.create_task(each.run(None))
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# Whole daemons.


class Manager:
    """A service manager's socket, and what was said there."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify.sock")
        self.said: list[str] = []

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Manager]:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.bind(self.address)
            channel.setblocking(False)
            loop.add_reader(channel, lambda: self.said.append(channel.recv(4096).decode()))
            try:
                yield self
            finally:
                loop.remove_reader(channel)

    def reloads(self) -> list[str]:
        """What was said of starting and reloading, in order, without the times."""
        return [text.partition("\n")[0] for text in self.said if text.startswith(("READY", "RELOADING"))]


async def reload(daemon: Daemon) -> dict[str, Any]:
    """Send SIGHUP and return the line of the log that tells what came of it."""

    def told() -> list[dict[str, Any]]:
        return [line for line in daemon.entries() if line["action"] in {"reloaded", "reload_refused"}]

    before = len(told())
    daemon.process.send_signal(signal.SIGHUP)
    await daemon.until(lambda _: len(told()) > before)
    return told()[-1]


@contextlib.asynccontextmanager
async def listening(daemon: Daemon) -> AsyncIterator[aiohttp.ClientResponse]:
    async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}/api/v1/pow/events") as response:
        assert response.status == 200
        yield response


async def next_reload(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The data of the next event that tells of a reload."""
    async with asyncio.timeout(PATIENCE):
        while await response.content.readline() != b"event: reload\n":
            assert not response.content.at_eof()
        event: dict[str, Any] = orjson.loads((await response.content.readline()).removeprefix(b"data: "))
        return event


async def test_a_first_receiver_gets_what_was_found_before_it_came(tmp_path: Path) -> None:
    def find(outbox: Outbox) -> None:
        outbox.begin_round(Work(ROUND, NODE), NOW)
        commit_span(outbox, ROUND, NODE, Span(0, 1), Proofs.of_distances([(0, 1.0)]), WEIGHTS, NOW)

    with prepared(tmp_path / "outbox.db") as bench:
        await bench.outbox(find)
    manager = Manager(tmp_path)
    async with Chain().served() as chain, serving() as server, manager.listening():
        path = config(tmp_path, chain.url, {})
        async with running(path, NOTIFY_SOCKET=manager.address) as daemon:
            # It can be reloaded as soon as it is ready, while the model still loads.
            assert (await reload(daemon))["applied"] == []
            assert manager.reloads()[:2] == ["READY=1", "RELOADING=1"]
            # Nothing but the reload calls for a batch: no other proof, no other round, no worker that came.
            await call(daemon.url, "POST", "/api/v1/pow/stop")
            await daemon.until(lambda body: body["round"] and body["is_model_initialized"])
            path.write_text(path.read_text().replace("receivers = []", f"receivers = {receiver(server.url)}"))
            line = await reload(daemon)
            assert (line["level"], line["applied"], line["added"]) == ("info", ["delivery.receivers"], ["one"])
            (request,) = await server.take(1)
            assert orjson.loads(request.body)["nonces"] == [0]
            assert await daemon.end() == 0


async def test_a_sighup_before_the_reloader_runs_is_not_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reloads = asyncio.Event()

    async def note(_: Reloader) -> None:
        reloads.set()

    monkeypatch.setattr(Reloader, "_reload", note)
    parts, batcher, notifier = (cast("Any", None) for _ in range(3))
    reloader = Reloader(tmp_path / "pocd.toml", parts, batcher, notifier)
    reloader.heed()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        running_task = asyncio.create_task(reloader.run())
        await soon(reloads.wait())
        running_task.cancel()
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)


def receiver(url: str, secret: Path | None = None) -> str:
    """The value of `receivers` for the one at `url`."""
    return f'[{{ name = "one", url = "{url}"{f", secret_file = {str(secret)!r}" if secret else ""} }}]'


async def test_sighup_changes_what_it_can_and_names_the_rest(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    manager = Manager(tmp_path)
    async with Chain().served() as chain, serving() as one, serving() as two, manager.listening():
        path = config(tmp_path, chain.url, {})
        path.write_text(path.read_text().replace("receivers = []", f"receivers = {receiver(one.url, secret)}"))
        async with running(path, NOTIFY_SOCKET=manager.address) as daemon:
            (request,) = await one.take(1)
            keys = WebhookKeys.parse(SECRET)
            assert keys.headers(request.id, request.timestamp, request.body).items() <= request.headers.items()

            # A rotated secret, in a file that is called the same.
            secret.write_text(OTHER_SECRET)
            line = await reload(daemon)
            assert (line["applied"], line["changed"]) == (["delivery.receivers"], ["one"])
            keys = WebhookKeys.parse(OTHER_SECRET)
            async with asyncio.timeout(PATIENCE):
                while not keys.headers(request.id, request.timestamp, request.body).items() <= request.headers.items():
                    (request,) = await one.take(1)

            # A bad file changes nothing, whichever key is bad.
            good = path.read_text()
            path.write_text(good.replace('name = "one"', 'name = "two"').replace("1.414", "7.5"))
            async with listening(daemon) as events:
                line = await reload(daemon)
                assert (line["level"], line["action"]) == ("error", "reload_refused")
                assert "round.r_target" in line["cause"]
                told = await next_reload(events)
                assert (told["applied"], told["restart"], told["problem"]) == ([], [], line["cause"])
            path.write_text(good.replace(str(secret), str(tmp_path / "nowhere")))
            assert "delivery.receivers, one" in (await reload(daemon))["cause"]
            assert [each["name"] for each in (await daemon.status())["receivers"]] == ["one"]

            # The rest: the receiver moves, the level and r_target change, the port cannot.
            text = good.replace(one.url, two.url).replace("1.414", "1.4").replace("port = 0", "port = 1")
            path.write_text(text.replace("[log]", '[log]\nlevel = "debug"'))
            async with listening(daemon) as events:
                line = await reload(daemon)
                told = await next_reload(events)
            assert (line["level"], line["restart"], line["changed"]) == ("warning", ["admin.port"], ["one"])
            assert (told["applied"], told["restart"], told["problem"]) == (line["applied"], line["restart"], None)
            assert sorted(line["applied"]) == ["delivery.receivers", "log.level", "round.r_target"]
            await two.take(1)
            assert (await daemon.status())["r_target"] == 1.414  # the round's
            chain.height += 1
            await daemon.until(lambda body: body["r_target"] == 1.4)

            assert manager.reloads() == ["READY=1", *["RELOADING=1", "READY=1"] * 4]
            assert await daemon.end() == 0
