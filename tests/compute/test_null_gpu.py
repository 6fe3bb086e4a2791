"""The host's side of the GPU path, by numbers: graphs, kernels, memory, waits. Needs torch's build for GPUs, no GPU."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.support import null_gpu
from tests.support.null_gpu import Result, run

if TYPE_CHECKING:
    from pathlib import Path

WHY_NOT = null_gpu.hindrance()
pytestmark = [
    pytest.mark.nullgpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no GPU that computes nothing: {WHY_NOT}"),
]

BATCH, SEQ_LEN = 8, 64
SHAPE = f"seq_len={SEQ_LEN}, batch_size={BATCH}"
CAPTURED = f"""
from torch._dynamo.utils import counters
rows = range({BATCH})
for scheme, layers in (("poc2", 2), ("poc2", 4), ("poc3", 2)):
    model, name = build(layers), f"{{scheme}} {{layers}}"
    counters.clear()
    torch._dynamo.reset()
    mark(f"{{name}} compiling")
    fast = compile_model(model, "auto", scheme=SCHEMES[scheme], {SHAPE})
    found = {{"path": fast.execution.path, "reason": fast.execution.reason}}
    found["graphs"] = counters["stats"]["unique_graphs"]
    with engine.block_run(fast, SCHEMES[scheme], block_hash="b", public_key="k", seq_len={SEQ_LEN}) as run:
        run.distances(rows, batch_size={BATCH})
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        mark(f"{{name}} starting")
        pending = [run.start(rows, batch_size={BATCH}) for _ in range(2)]
        mark(f"{{name}} waiting")
        for each in pending:
            each.distances()
        mark(f"{{name}} done")
        found["taken"] = torch.cuda.max_memory_allocated() - held
    tell(**{{name: found}})
"""
DYNAMIC = f"""
model = build(2, rope_parameters={{"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}})
fast = compile_model(model, "auto", scheme=SCHEMES["poc2"], {SHAPE})
tell(path=fast.execution.path, reason=fast.execution.reason)
"""
WAITING = f"""
from pocd.compute import compiled
from pocd.protocol.errors import CaptureError, ComputeError
decode = compiled.Compiled.decode
def wait(self, *arguments):
    torch.cuda.synchronize()
    return decode(self, *arguments)
compiled.Compiled.decode = wait
model = build(2)
try:
    compile_model(model, "auto", scheme=SCHEMES["poc2"], {SHAPE})
except CaptureError as error:
    tell(error=str(error))
fast = compile_model(model, "auto", scheme=SCHEMES["poc2"], capture=False, {SHAPE})
tell(path=fast.execution.path, reason=fast.execution.reason)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return null_gpu.build(tmp_path_factory.mktemp("nullgpu"))


@pytest.fixture(scope="module")
def captured(folder: Path) -> Result:
    return run(folder, CAPTURED, cache=folder)


def nodes(result: Result, name: str) -> int:
    graphs = [line for line in result.log[f"{name} starting"] if line.startswith("GRAPH")]
    assert len(graphs) == 2, "one for each batch"
    return int(graphs[0].split()[2])


@pytest.mark.parametrize(("name", "graphs"), [("poc2 2", 3), ("poc2 4", 3), ("poc3 2", 2)])
def test_a_batch_is_captured_from_few_graphs(captured: Result, name: str, graphs: int) -> None:
    """The layer, the last layer, which is as the others with `poc3`, and what follows: each is compiled once."""
    found = captured.told[name]
    assert isinstance(found, dict)
    assert (found["path"], found["graphs"]) == ("captured", graphs), found["reason"]
    assert not [line for lines in captured.log.values() for line in lines if line.startswith("VIOLATION")]


def test_a_layer_takes_seven_products_one_attention_and_ten_kernels(captured: Result) -> None:
    assert nodes(captured, "poc2 4") - nodes(captured, "poc2 2") == 2 * (7 + 1 + 10)


@pytest.mark.parametrize("name", ["poc2 2", "poc3 2"])
def test_to_start_a_batch_waits_for_nothing(captured: Result, name: str) -> None:
    lines = captured.log[f"{name} starting"]
    assert not [line for line in lines if line.startswith("SYNC") or " sync" in line]
    assert [line for line in captured.log[f"{name} waiting"] if line.startswith("SYNC")] == ["SYNC event"] * 2


@pytest.mark.parametrize("name", ["poc2 2", "poc3 2"])
def test_inputs_are_drawn_by_one_kernel_on_a_stream_of_its_own_without_memory(captured: Result, name: str) -> None:
    lines = captured.log[f"{name} starting"]
    drawn = [line for line in lines if line.startswith("KERNEL _draw_normal")]
    assert len(drawn) == 2, "one for each batch"
    (side,) = {re.search(r"stream (\d+)", line)[1] for line in drawn}  # type: ignore[index] # each line has one
    assert side not in {re.search(r"stream (\d+)", line)[1] for line in lines if line.startswith("GRAPH")}  # type: ignore[index] # likewise
    found = captured.told[name]
    assert isinstance(found, dict)
    assert found["taken"] < BATCH * SEQ_LEN * 256  # a byte for each number


def test_a_model_whose_rotations_wait_for_the_gpu_is_captured_all_the_same(folder: Path) -> None:
    told = run(folder, DYNAMIC, cache=folder).told
    assert told["path"] == "captured", told["reason"]


def test_a_capture_that_fails_is_an_error_and_the_next_process_leaves_it_out(folder: Path) -> None:
    result = run(folder, WAITING, cache=folder)
    assert "previous error during capture" in str(result.told["error"])
    assert (result.told["path"], "failed in a process before" in str(result.told["reason"])) == ("compiled", True)
