"""Families of transformers, split over two ranks: real processes, gloo on the CPU, or NCCL where two cards are."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from pocd.compute.engine import block_run
from pocd.compute.model import load_model
from pocd.compute.ranks import check_alike, joined, split_as_planned
from pocd.protocol.errors import DeviceError, ModelError
from pocd.protocol.schemes import SCHEMES
from tests.support.family_models import FAMILIES, SEQ_LEN
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path

# Those that transformers splits in different ways; the others were tried by hand.
SPLIT = ("llama", "qwen2", "qwen3", "mixtral", "gemma 2", "phi 3", "olmo 2", "gpt neox, parallel", "gpt 2")
QUANTISED = "qwen3, FP8"  # in blocks that neither its matrices nor the ranks' shares are whole numbers of
TRIED = ("poc2", "poc4", "trained")
SAMPLED = "llama"  # the one that is tried with poc3 too: it takes 128 inputs more, and reads all positions as poc4 does
NONCES = range(5)
TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@dataclass(frozen=True)
class Found:
    """What one process makes of a model.

    Attributes:
        results: By scheme, all numbers in one list.
        held: Elements of parameters that are in its memory.
        fingerprint: Of the checkpoint.
    """

    results: dict[str, list[float]]
    held: int
    fingerprint: str


def tried(name: str) -> tuple[str, ...]:
    return (*TRIED, "poc3") if name == SAMPLED else TRIED


def compute(name: str, folder: Path, device: str, ranks: int) -> Found | str:
    """Load the model and compute; the text of a refusal."""
    try:
        model = load_model(str(folder), dtype="float32", device=device, ranks=ranks)
    except ModelError as error:
        return str(error)
    results = {}
    for scheme in tried(name):
        with block_run(model, SCHEMES[scheme], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
            results[scheme] = run.values(NONCES, batch_size=4).flatten().tolist()
    parameters: list[Any] = list(model.causal.parameters())
    held = sum(part.to_local().numel() if hasattr(part, "to_local") else part.numel() for part in parameters)
    return Found(results, held, model.fingerprint)


def be_a_rank(rank: int, meeting: str, devices: tuple[str, str], folders: dict[str, Path], results: Any) -> None:  # noqa: ANN401 - a queue of its context
    """Compare checkpoints, and compute with every model; then the second rank is killed, and the first one tells."""
    if devices[rank] == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    with joined(rank, 2, f"file://{meeting}/ranks", devices[rank]):
        check_alike("m", "v2-1", f"machine {rank}")
        told = r"'m' .* \(rank 0 on machine 0: v2-0, rank 1 on machine 1: v2-1\): give all machines the same model"
        with pytest.raises(ModelError, match=told):
            check_alike("m", f"v2-{rank}", f"machine {rank}")
        results.put((rank, [compute(name, folder, devices[rank], 2) for name, folder in folders.items()]))
        torch.distributed.barrier()  # so both have put theirs
        if devices[rank] != "cpu":
            return  # NCCL is in no hurry to notice
        if rank == 1:
            results.close()
            results.join_thread()
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            said = f"refused: {compute(SAMPLED, folders[SAMPLED], devices[rank], 2)}"
        except RuntimeError as error:
            said = f"lost: {error}"
        results.put((rank, said))


def run_ranks(meeting: Path, devices: tuple[str, str], folders: dict[str, Path]) -> tuple[list[list[Found | str]], str]:
    """Return what each rank found, by model, and what the first one said when it was alone."""
    processes = multiprocessing.get_context("forkserver")  # a fork of this process, which has threads, may hang
    processes.set_forkserver_preload(["pocd.compute.engine", "pocd.compute.model", "pocd.compute.ranks"])
    results = processes.Queue()
    started = [
        processes.Process(target=be_a_rank, args=(rank, str(meeting), devices, folders, results)) for rank in range(2)
    ]
    try:
        for process in started:
            process.start()
        found = dict(results.get(timeout=PATIENCE) for _ in started)
        alone = "" if devices[0] != "cpu" else results.get(timeout=PATIENCE)[1]
        for process in started:
            process.join(PATIENCE)
        return [found[0], found[1]], alone
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's model on disk."""
    saved = {}
    for name in SPLIT:
        saved[name] = tmp_path_factory.mktemp("family")
        FAMILIES[name].build().save_pretrained(saved[name])
    saved[QUANTISED] = tmp_path_factory.mktemp("quantised")
    FAMILIES["qwen3"].build().save_pretrained(saved[QUANTISED])
    quantise(saved[QUANTISED])
    return saved


def quantise(folder: Path, block: int = 20) -> None:
    """Make a checkpoint's projections FP8, with blocks of different scales."""
    file, tensors = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        tensors[name] = tensor
        if "_proj" in name and name.endswith("weight"):
            rows, columns = (-(-size // block) for size in tensor.shape)
            scale = torch.arange(rows * columns).view(rows, columns) % 3 * 0.002 + 0.004
            spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: tensor.shape[0], : tensor.shape[1]]
            tensors[name], tensors[f"{name}_scale_inv"] = (tensor / spread).to(torch.float8_e4m3fn), scale
    save_file(tensors, file, metadata={"format": "pt"})
    config = orjson.loads((folder / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (folder / "config.json").write_bytes(orjson.dumps(config))


@pytest.fixture(scope="module")
def split(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Found | str]], str]:
    """What two ranks on the CPU found."""
    found, alone = run_ranks(tmp_path_factory.mktemp("meeting"), ("cpu", "cpu"), folders)
    return [dict(zip(folders, of_rank, strict=True)) for of_rank in found], alone


@pytest.mark.parametrize("name", [*SPLIT, QUANTISED])
def test_a_split_family_gives_what_one_process_gives(
    name: str, folders: dict[str, Path], split: tuple[list[dict[str, Found | str]], str]
) -> None:
    first, second = (of_rank[name] for of_rank in split[0])
    if name == "gpt 2":
        assert first == second
        assert "transformers has no plan for GPT2Config" in str(first)
        return
    whole = compute(name, folders[name], "cpu", 1)
    assert isinstance(whole, Found)
    assert isinstance(first, Found), first
    assert isinstance(second, Found), second
    assert first.results == second.results, "each rank may refuse what the other does, so they agree to the bit"
    assert first.fingerprint == whole.fingerprint
    for scheme in tried(name):
        assert first.results[scheme] == pytest.approx(whole.results[scheme], abs=2e-5)
    assert first.held < 0.6 * whole.held
    assert second.held < 0.6 * whole.held
    assert first.held + second.held >= whole.held


def test_the_death_of_a_rank_is_no_fault_of_the_model_that_the_other_loads(
    split: tuple[list[dict[str, Found | str]], str],
) -> None:
    assert split[1].startswith("lost: ")


def test_the_cpu_is_not_taken_where_transformers_would_take_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DeviceError, match=r"set model\.device to them"):
        split_as_planned(2, torch.device("cpu"))


@pytest.mark.gpu
@TWO_CARDS
def test_two_cards_give_what_one_gives(folders: dict[str, Path], tmp_path: Path) -> None:
    names = ["llama", "qwen3"]
    found, _ = run_ranks(tmp_path, ("cuda:0", "cuda:1"), {name: folders[name] for name in names})
    for name, first, second in zip(names, *found, strict=True):
        whole = compute(name, folders[name], "cuda:0", 1)
        assert isinstance(whole, Found)
        assert isinstance(first, Found), first
        assert isinstance(second, Found), second
        assert first.results == second.results
        for scheme in tried(name):
            assert first.results[scheme] == pytest.approx(whole.results[scheme], abs=2e-5)
        assert first.held < 0.6 * whole.held
