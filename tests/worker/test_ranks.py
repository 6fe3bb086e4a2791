"""A model that is split over two ranks: real processes, gloo, the CPU."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, Qwen3Config

from pocd.compute import ranks
from pocd.compute.engine import block_run
from pocd.compute.model import load_model
from pocd.compute.ranks import check_split, meet
from pocd.pool.causes import Cause
from pocd.pool.recomputations import NoResultError
from pocd.protocol.errors import ModelError
from pocd.protocol.names import BUNDLED
from pocd.protocol.schemes import SCHEMES
from tests.pool.test_pool import LOAD, ROUND, pooled, recompute
from tests.support.forking import at_work
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from pathlib import Path

NONCES = (5, 0, 7, 11)


def alone(model: str, scheme: str, block_hash: str = "block_beta") -> list[float]:
    """The distances by one process."""
    loaded = load_model(model, dtype="float32", device="cpu")
    terms: dict[str, Any] = {"block_hash": block_hash, "public_key": ROUND.public_key, "seq_len": ROUND.seq_len}
    with block_run(loaded, SCHEMES[scheme], **terms) as run:
        return run.distances(NONCES, batch_size=LOAD.batch_size)


async def test_two_ranks_agree_with_one_process_and_the_death_or_silence_of_one_ends_both(tmp_path: Path) -> None:
    load = dataclasses.replace(LOAD, devices=("cpu", "cpu"), is_auto=True)
    async with pooled(tmp_path, [load], exit=0.2) as (pool, miner):
        (worker,) = pool.workers
        await until(lambda: worker.computed > 32)
        assert worker.info is not None
        assert (worker.info.device, worker.info.decoder, worker.info.execution) == ("cpu+cpu", "layers", "eager")
        assert worker.batch_size in {1, 2, 4, 8}, "both chose the same"
        for scheme in ("poc2", "poc3", "trained"):
            round_ = dataclasses.replace(ROUND, block_hash="block_beta", scheme=scheme)
            assert await recompute(pool, round_, NONCES) == pytest.approx(alone(load.model, scheme), abs=2e-5)
        with pytest.raises(NoResultError, match="draws weights, which a model that is split"):
            await recompute(pool, dataclasses.replace(ROUND, scheme="random-weights"), NONCES)

        leader, other = worker.pids
        os.kill(other, signal.SIGKILL)
        await until(lambda: worker.causes)
        assert worker.causes == {Cause.CRASH: 1}
        assert worker.last_error == f"worker process {other}, rank 1 of 2, was killed by signal 9"
        with pytest.raises(ProcessLookupError):
            os.kill(leader, 0)
        before = worker.computed
        await until(lambda: worker.ready and worker.computed > before + 32)

        silent = worker.causes[Cause.SILENT]  # one, where the machine is as slow as that
        leader, other = worker.pids
        os.kill(at_work(other), signal.SIGSTOP)
        await until(lambda: worker.causes[Cause.SILENT] > silent)
        for pid in (leader, other):
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert miner.mining is not None
        await miner.close(PATIENCE)
        assert miner.mining.checked == worker.computed, "nothing was lost, and nothing counted twice"


async def test_ranks_that_get_nan_name_the_layer_together(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((BUNDLED / "tiny-llama" / "config.json").read_bytes())
    weights = {name: tensor.float() for name, tensor in load_file(BUNDLED / "tiny-llama" / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"] *= 12_800  # two nonces in five overflow in float16
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    load = dataclasses.replace(LOAD, model=str(model), dtype="float16", devices=("cpu", "cpu"), seq_len=2, batch_size=1)
    round_ = dataclasses.replace(ROUND, public_key="test-key", model=load.model, seq_len=2)
    async with pooled(tmp_path, [load], round_) as (pool, miner):
        await until(lambda: miner.refused_batches > 3 and pool.workers[0].computed)
        assert "layer 1, in its branch" in str(pool.workers[0].last_refusal)


def rendezvous() -> tuple[str, socket.socket]:
    """Where ranks of several machines can meet, and the socket on which the first one listens there."""
    listener = socket.create_server(("127.0.0.1", 0))
    return f"127.0.0.1:{listener.getsockname()[1]}", listener


def test_ranks_of_several_machines_meet_by_their_groups_name_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as threads:
        address, listener = rendezvous()
        first = threads.submit(meet, 0, 2, f"tcp://{address}/secret", listener)
        second = meet(1, 2, f"tcp://{address}/secret", None)
        second.set("key", "value")
        assert first.result(PATIENCE).get("key") == b"value"
        monkeypatch.setattr(ranks, "JOINING", timedelta(seconds=1))
        address, listener = rendezvous()
        first = threads.submit(meet, 0, 2, f"tcp://{address}/secret", listener)
        with pytest.raises(
            RuntimeError, match=f"rank 0 did not come to rank 0 at {address} within 1 s: do the cluster's"
        ):
            meet(1, 2, f"tcp://{address}/guessed", None)
        with pytest.raises(RuntimeError, match=f"rank 1 did not come to rank 0 at {address} within 1 s"):
            first.result(PATIENCE)


def test_a_rank_that_does_not_reach_the_first_one_says_so_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "JOINING", timedelta(seconds=1))
    address, listener = rendezvous()
    listener.close()
    with pytest.raises(RuntimeError, match=f"rank 1 does not reach rank 0 at {address}: do the cluster's machines"):
        meet(1, 2, f"tcp://{address}/secret", None)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(), "transformers has no plan for GPT2Config; set model.parallel = 1"),
        (Qwen3Config(num_attention_heads=9, num_key_value_heads=3), "its num_attention_heads, 9, is not a multiple"),
        (Qwen3Config(num_attention_heads=8, num_key_value_heads=1), "its num_key_value_heads, 1, is not a multiple"),
    ],
)
def test_a_model_that_cannot_be_split_says_why(config: object, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_split(config, "m", 2)
