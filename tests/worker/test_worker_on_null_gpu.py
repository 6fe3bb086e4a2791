"""Workers on a GPU that computes nothing: as they are by default, and how they end."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, BinaryIO

import pytest

from pocd.config.settings import Settings
from pocd.daemon.compose import make_loads
from pocd.pool.pool import environment
from pocd.protocol.proof import Round
from pocd.worker import frames
from pocd.worker.messages import CardIdentity, Compute, Distances, Failed, Load, Message, Ready
from tests.support import null_gpu
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WHY_NOT = null_gpu.hindrance()
pytestmark = [
    pytest.mark.nullgpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no GPU that computes nothing: {WHY_NOT}"),
]

MODEL = "bundled:tiny-qwen3"
WITH_CUDNN = "import torch\ntorch.backends.cuda.enable_cudnn_sdp = lambda _: None\n"  # which cannot run there


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return null_gpu.build(tmp_path_factory.mktemp("nullgpu"))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """What a worker is given where nothing but the model is configured."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = {"node": {"public_key": "key"}, "chain": {"urls": ["http://127.0.0.1:1"]}, "model": {"name": MODEL}}
    (found,) = make_loads(Settings.model_validate(given))
    return found


class Life:
    """A worker's process, and what it says."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket, stream: BinaryIO) -> None:
        self.process = process
        self.said: list[Message] = []
        self._link = link
        self._stream = stream

    def ask(self, message: Message) -> None:
        self._link.sendall(frames.encode(message))

    def until(self, *kinds: type[Message]) -> Message:
        """Wait for a message of one of these kinds; or the last one, where the process ends before."""
        while (message := frames.read(self._stream)) is not None:
            self.said.append(message)
            if isinstance(message, kinds):
                break
        return self.said[-1]


@contextlib.contextmanager
def living(folder: Path, load: Load, program: str = null_gpu.WORKER, **variables: str) -> Iterator[Life]:
    ours, theirs = socket.socketpair()
    (folder / "log").write_text("")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        env=environment(load, [load], folder / "cache") | null_gpu.environment(folder) | variables,
    )
    theirs.close()
    try:
        with ours, ours.makefile("rb") as stream:
            ours.settimeout(10 * PATIENCE)  # compilers take their time
            life = Life(process, ours, stream)
            life.ask(load)
            yield life
    finally:
        process.kill()
        process.wait()


def compiled(folder: Path) -> set[Path]:
    return set((folder / "cache").rglob("*.cubin"))


def test_a_worker_starts_by_default_and_ends_when_its_card_is_lost(folder: Path, load: Load, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    round_ = Round("block", 1, "key", 1.4, load.scheme, load.model, load.seq_len)
    with living(folder, load, NULLGPU_LOST=str(lost)) as life:
        ready = life.until(Ready, Failed)
        assert isinstance(ready, Ready), ready
        assert (ready.execution, ready.decoder, ready.device) == ("captured", "flat", "cuda:0"), ready.execution_reason
        assert ready.batch_size <= load.batch_size
        assert ready.conditioning is None, "without values there is nothing to be measured"
        life.ask(Compute(1, round_, list(range(ready.batch_size))))
        found = life.until(Distances, Failed)
        assert isinstance(found, Distances), found
        assert len(found.distances) == ready.batch_size
        assert "VIOLATION" not in (folder / "log").read_text()
        lost.touch()
        life.ask(Compute(2, round_, list(range(ready.batch_size))))
        assert life.until(Failed) == Failed(
            "fault", "cuda:0 failed: AcceleratorError: CUDA error: unspecified launch failure"
        )
        assert life.process.wait(PATIENCE) == 1
    first, before = next(each for each in life.said if isinstance(each, CardIdentity)), compiled(folder)
    assert before
    other = dataclasses.replace(load, devices=("cuda:1",), cards=("1",))
    with living(folder, other) as life:
        ready = life.until(Ready, Failed)
        assert isinstance(ready, Ready), ready
        assert (ready.execution, ready.device) == ("captured", "cuda:1"), ready.execution_reason
    second = next(each for each in life.said if isinstance(each, CardIdentity))
    assert (first.name, second.name) == ("NVIDIA H200", "NVIDIA H200")
    assert first.uuid != second.uuid, "another card"
    assert compiled(folder) == before, "what is compiled for one card serves all"


def test_a_card_without_memory_is_no_fault(folder: Path, load: Load) -> None:
    with living(folder, load, NULLGPU_TAKEN=str(143170 << 20)) as life:
        failed = life.until(Ready, Failed)
        assert isinstance(failed, Failed)
        assert (failed.kind, "does not fit into the memory of cuda:0 in bfloat16" in failed.message) == ("memory", True)


def test_an_error_of_cudnn_is_a_fault_and_not_the_models(folder: Path, load: Load) -> None:
    with living(folder, load, WITH_CUDNN + null_gpu.WORKER) as life:
        failed = life.until(Ready, Failed)
        assert isinstance(failed, Failed)
        assert (failed.kind, "cuDNN" in failed.message) == ("fault", True), failed.message


def test_a_card_that_is_not_there_is_named_as_it_is_configured(folder: Path, load: Load) -> None:
    hidden = dataclasses.replace(load, devices=("cuda:3",), cards=("-1",))
    with living(folder, hidden) as life:
        failed = life.until(Ready, Failed)
        assert isinstance(failed, Failed)
        assert (failed.kind, "device 'cuda:3' is not there" in failed.message) == ("device", True), failed.message
