"""Operations on the whole store, which may take long: each answer says how far it went."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from typer.testing import CliRunner

from pocd.admin import outbox as module
from pocd.admin.server import AdminApi
from pocd.cli.outbox import app
from pocd.http.server import listening
from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs
from pocd.store import deliveries, selections
from pocd.store.batches import form_batches
from pocd.store.outbox import Outbox, Work
from pocd.store.proofs import Weights
from tests.admin.test_status import made
from tests.support.clocks import NOW, ROUND, ManualClock
from tests.support.stored import commit_span

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from pocd.store.thread import OutboxThread

NODE = Node(0, 1)
MANY = 7


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[OutboxThread, str]]:
    """The admin API over a store with many dead letters, of which it does three at once."""
    monkeypatch.setattr(module, "PIECES_SECONDS", 0.0)
    for each in (deliveries, selections):
        monkeypatch.setattr(each, "CHUNK", 3)
    with made(tmp_path, ManualClock()) as parts:
        await parts.outbox(fill)
        api = AdminApi(parts, lambda: None).application(None)
        async with listening(api, "127.0.0.1", 0, shutdown_timeout=1) as url:
            yield parts.outbox, url


def fill(outbox: Outbox) -> None:
    outbox.begin_round(Work(ROUND, NODE), NOW)
    span = Span(0, MANY)
    proofs = Proofs.of_distances((nonce, 1.0) for nonce in NODE.nonces(span))
    commit_span(outbox, ROUND, NODE, span, proofs, Weights("f00d", "float32"), NOW)
    form_batches(outbox, ["one"], size=1, age=0.0, now=NOW, current=ROUND)
    for batch in range(1, MANY + 1):
        deliveries.record_set_aside(outbox, "one", batch, "refused", NOW)


@pytest.mark.parametrize(("what", "count"), [("retry", "queued"), ("purge", "purged")])
async def test_an_answer_says_how_many_were_done_and_whether_any_are_left(
    served: tuple[OutboxThread, str], what: str, count: str
) -> None:
    outbox, url = served
    told, left = [], []
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.post(f"{url}/api/v1/outbox/{what}", json={"states": ["dead"]}) as response:
                assert response.status == 200
                body = await response.json()
            told.append(body[count])
            left.append(outbox.view.queues["one"].dead_batches)
            if body["complete"]:
                break
    assert (told, left) == ([3, 3, 1], [4, 1, 0])


@pytest.mark.parametrize(("what", "said"), [("retry", "batches queued again"), ("purge", "batches given up")])
async def test_a_command_goes_on_to_the_end(served: tuple[OutboxThread, str], what: str, said: str) -> None:
    outbox, url = served
    yes = ["--yes"] if what == "purge" else []
    result = await asyncio.to_thread(CliRunner().invoke, app, [what, "--all", "--url", url, *yes])
    assert result.exit_code == 0, result.output
    assert f"{MANY} {said}" in result.output
    assert outbox.view.queues["one"].dead_batches == 0


async def test_what_was_done_before_the_store_failed_is_told(
    served: tuple[OutboxThread, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, url = served
    monkeypatch.setattr(module, "PIECES_SECONDS", 60.0)
    full = selections.purge
    calls = []

    def fails_then(*arguments: Any) -> object:  # noqa: ANN401 - passed on as they came
        calls.append(1)
        if len(calls) == 2:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = "SQLITE_FULL"
            raise error
        return full(*arguments)

    monkeypatch.setattr(selections, "purge", fails_then)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/api/v1/outbox/purge", json={"states": ["dead"]}) as response,
    ):
        assert response.status == 200
        assert await response.json() == {"purged": 3, "complete": False, "receivers": ["one"]}
    assert outbox.view.queues["one"].dead_batches == MANY - 3


async def test_a_backup_is_made_by_the_daemon_and_replaces_nothing(
    served: tuple[OutboxThread, str], tmp_path: Path
) -> None:
    _, url = served
    copy = tmp_path / "copy.db"
    result = await asyncio.to_thread(CliRunner().invoke, app, ["backup", str(copy), "--url", url])
    assert result.exit_code == 0, result.output
    assert f"{copy}: {copy.stat().st_size} bytes" in result.output
    with closing(Outbox.open(copy)) as outbox:
        assert outbox.queues["one"].dead_batches == MANY
    result = await asyncio.to_thread(CliRunner().invoke, app, ["backup", str(copy), "--url", url])
    assert "is there already" in str(result.exception)


async def test_a_store_in_use_is_not_replaced(served: tuple[OutboxThread, str], tmp_path: Path) -> None:
    _, url = served
    await asyncio.to_thread(CliRunner().invoke, app, ["backup", str(tmp_path / "copy.db"), "--url", url])
    # In a process of its own, as a process is in no way of its own locks.
    arguments = ["outbox", "restore", str(tmp_path / "copy.db"), "--config", str(tmp_path / "pocd.toml")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pocd", *arguments), stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    assert process.returncode == 1
    assert b"stop pocd first" in err
