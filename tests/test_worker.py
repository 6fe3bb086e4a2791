"""The supervisor with real worker processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import torch
from processes import PATIENCE
from safetensors.torch import load_file, save_file

from pocd.compute.names import BUNDLED
from pocd.delivery.outbox import Outbox, OutboxThread
from pocd.miner import Miner
from pocd.nonces import Node, Progress
from pocd.proof import Round
from pocd.worker import messages
from pocd.worker.messages import Cancel, Cancelled, Compute, Load, Message
from pocd.worker.supervisor import Limits, Supervisor, WorkerRefusedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

LOAD = Load("bundled:tiny-llama", "float32", "cpu", "poc2", 16, 8)
NODE = Node(0, 1)
ROUND = Round("block_alpha", 1, "node_A", 1.4142, "poc2", "bundled:tiny-llama", 16)


@contextlib.contextmanager
def prepared(folder: Path, load: Load, **limits: float) -> Iterator[tuple[Supervisor, Miner]]:
    """A supervisor that does not run yet, and its miner, on a real store."""
    with contextlib.closing(OutboxThread(folder / "outbox.db")) as outbox:
        miner = Miner(outbox, NODE, paused=False, clock=time.monotonic, wall=time.time)
        known = Limits(**{"batch": 60.0} | limits)
        yield Supervisor(load, miner, known, clock=time.monotonic, log=structlog.get_logger()), miner


@contextlib.asynccontextmanager
async def supervised(folder: Path, **limits: float) -> AsyncIterator[tuple[Supervisor, Miner]]:
    """A supervisor that runs, over a miner with one round."""
    with prepared(folder, LOAD, **limits) as (supervisor, miner):
        await miner.set_round(ROUND)
        task = asyncio.create_task(supervisor.run())
        try:
            yield supervisor, miner
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def run_to_its_end(folder: Path, load: Load) -> None:
    with prepared(folder, load) as (supervisor, _):
        async with asyncio.timeout(PATIENCE):
            await supervisor.run()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - another process is watched
            await asyncio.sleep(0.02)


def checked(miner: Miner) -> int:
    assert miner.mining is not None
    return miner.mining.checked


async def test_a_worker_that_stands_still_is_killed_and_replaced(tmp_path: Path) -> None:
    async with supervised(tmp_path, heartbeat=5.0, exit=0.2) as (supervisor, miner):
        await until(lambda: checked(miner) > 16)
        pid = supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: supervisor.restarts)
        assert supervisor.last_error == "worker gave no sign of life for 5 s, killed"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        before = checked(miner)
        await until(lambda: checked(miner) > before + 16)
        assert miner.mining is not None
        assert miner.mining.expected_valid_rate == pytest.approx(0.5, abs=0.01)
        await miner.close(PATIENCE)
        done = checked(miner)
    # What the killed worker had in hand was checked by the next one: no gap is left.
    with contextlib.closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        found = await outbox(Outbox.begin_round, ROUND, NODE, 0.0)
    assert found.progress == Progress(done)


async def test_a_worker_that_finishes_no_batch_in_time_is_killed(tmp_path: Path) -> None:
    async with supervised(tmp_path, batch=1e-9) as (supervisor, miner):
        await until(lambda: supervisor.restarts)
        assert supervisor.last_error == "worker finished no batch within 0 s, killed"
        # What it did finish counts, and nothing else.
        assert checked(miner) % LOAD.batch_size == 0


async def test_a_replaced_round_is_left_at_once_and_its_leases_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Message] = []
    encode = messages.encode

    def encode_and_note(message: Message) -> bytes:
        sent.append(message)
        return encode(message)

    monkeypatch.setattr(messages, "encode", encode_and_note)
    async with supervised(tmp_path) as (supervisor, miner):
        await until(lambda: checked(miner) > 16)
        old = miner.mining
        assert old is not None
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGSTOP)  # so that leases stay in its hands
        await miner.set_round(None)
        await until(lambda: isinstance(sent[-1], Cancel))
        last = max(message.id for message in sent if isinstance(message, Compute))
        assert sent[-1] == Cancel(through=last)
        os.kill(supervisor.pid, signal.SIGCONT)
        await miner.close(PATIENCE)  # returns when no lease is out
        assert old.ledger.take(1000).start == old.checked, "the next free position is the first that was not checked"


def test_a_worker_leaves_out_what_was_cancelled_before_it_began() -> None:
    from pocd.worker.child import Inbox

    inbox = Inbox()
    for message in (Compute(1, ROUND, 0, 1, 8), Compute(2, ROUND, 8, 1, 8), Cancel(2), Compute(3, ROUND, 16, 1, 8)):
        inbox.put(message)
    reported: list[Cancelled] = []
    assert inbox.get(reported.append).id == 3
    assert reported == [Cancelled(1), Cancelled(2)]


async def test_a_worker_without_its_device_refuses(tmp_path: Path) -> None:
    load = Load("bundled:tiny-llama", "float32", "cuda:99", "poc2", 16, 8)
    with pytest.raises(WorkerRefusedError, match="cuda:99") as refused:
        await run_to_its_end(tmp_path, load)
    assert refused.value.kind == "device"


async def test_a_model_that_gives_nan_never_becomes_ready(tmp_path: Path) -> None:
    model = tmp_path / "broken"
    model.mkdir()
    (model / "config.json").write_bytes((BUNDLED / "tiny-llama" / "config.json").read_bytes())
    weights = load_file(BUNDLED / "tiny-llama" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    load = Load(str(model), "float32", "cpu", "poc2", 16, 8)
    with pytest.raises(WorkerRefusedError, match="NaN or infinity") as refused:
        await run_to_its_end(tmp_path, load)
    assert refused.value.kind == "configuration"
