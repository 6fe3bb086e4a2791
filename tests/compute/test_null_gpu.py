"""The host's side of the GPU path, by numbers: graphs, kernels, memory, waits. Needs torch's build for GPUs, no GPU."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from pocd.protocol.names import DTYPES
from pocd.protocol.schemes import SCHEMES
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
OF_EXPERTS = 27  # nodes of a layer
SHAPE = f"seq_len={SEQ_LEN}, batch_size={BATCH}"
CAPTURED = f"""
from pathlib import Path
from torch._dynamo.utils import counters
rows = range({BATCH})
from pocd.compute import segments
chunk = segments.STATES_CHUNK
named = [("poc2", 2, chunk), ("poc2", 4, chunk), *((name, 2, size) for name in ("poc3", "poc4") for size in (chunk, 1))]
for scheme, layers, least in named:
    segments.STATES_CHUNK = least
    model, name = build(layers), f"{{scheme}} {{layers}}" + " in chunks" * (least == 1)
    counters.clear()
    torch._dynamo.reset()
    mark(f"{{name}} compiling")
    fast = compile_model(model, "auto", scheme=SCHEMES[scheme], {SHAPE})
    found = {{"path": fast.execution.path, "reason": fast.execution.reason}}
    found["graphs"] = counters["stats"]["unique_graphs"]
    with engine.block_run(fast, SCHEMES[scheme], block_hash="b", public_key="k", seq_len={SEQ_LEN}) as run:
        run.values(rows, batch_size={BATCH})
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        mark(f"{{name}} starting")
        pending = [run.start(rows, batch_size={BATCH}) for _ in range(2)]
        mark(f"{{name}} waiting")
        for each in pending:
            each.values()
        mark(f"{{name}} done")
        found["taken"] = torch.cuda.max_memory_allocated() - held
    tell(**{{name: found}})
sources = [path.read_text() for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.py")]
tell(contracted=[text.count("'enable_fp_fusion': True") for text in sources if "@triton.jit" in text])
"""
EVERY = """
from pocd.protocol.names import DTYPES
pairs = [(scheme, "bfloat16") for scheme in SCHEMES]
pairs += [(scheme, dtype) for dtype in DTYPES if dtype != "bfloat16" for scheme in ("poc2", "poc3", "poc4")]
for scheme, dtype in pairs:
    fast = compile_model(
        build(2, dtype=getattr(torch, dtype)), "auto", scheme=SCHEMES[scheme], seq_len=64, batch_size=4
    )
    tell(**{f"{scheme} {dtype}": [fast.execution.path, fast.execution.reason]})
"""
EXPERTS = f"""
few = {{"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}}
for layers in (2, 4):
    model, name = build(layers, "Qwen3Moe", **few), f"{{layers}}"
    fast = compile_model(model, "auto", scheme=SCHEMES["poc2"], {SHAPE})
    with engine.block_run(fast, SCHEMES["poc2"], block_hash="b", public_key="k", seq_len={SEQ_LEN}) as run:
        run.distances(range({BATCH}), batch_size={BATCH})
        mark(f"{{name}} starting")
        pending = [run.start(range({BATCH}), batch_size={BATCH}) for _ in range(2)]
        mark(f"{{name}} waiting")
    tell(**{{name: {{"kind": model.decoder.kind, "path": fast.execution.path, "reason": fast.execution.reason}}}})
"""
SHORT = f"""
from pocd.compute.model import load_model
MIB = 2**20
LARGE = {{"seq_len": 256, "batch_size": 256}}  # inputs of 32 MiB

def attempt(call, free=None):
    if free is not None:
        torch.cuda.empty_cache()
        leave(free)
    try:
        return str(call())
    except Exception as error:
        return type(error).__name__
    finally:
        os.environ.pop("NULLGPU_TAKEN", None)

def batch(model, seq_len=256, batch_size=256):
    with engine.block_run(model, SCHEMES["poc2"], block_hash="b", public_key="k", seq_len=seq_len) as run:
        return len(run.distances(range(batch_size), batch_size=batch_size))

def path(**shape):
    return compile_model(model, "auto", scheme=SCHEMES["poc2"], **shape).execution.path

model = build(2)
tell(load=attempt(lambda: load_model("bundled:tiny-qwen3", dtype="bfloat16", device="cuda"), 0))
tell(inputs=attempt(lambda: batch(model), 24 * MIB), layers=attempt(lambda: batch(model), 96 * MIB))
tell(again=attempt(lambda: batch(model)))
small = {{"seq_len": {SEQ_LEN}, "batch_size": {BATCH}}}
enter = torch.cuda.graph.__enter__
def enter_with_nothing_left(self):
    torch.cuda.empty_cache()
    leave(0)
    return enter(self)
torch.cuda.graph.__enter__ = enter_with_nothing_left
tell(capture=attempt(lambda: path(**small)))
torch.cuda.graph.__enter__ = enter
fast = compile_model(model, "auto", scheme=SCHEMES["poc2"], **small)
with engine.block_run(fast, SCHEMES["poc2"], block_hash="b", public_key="k", seq_len={SEQ_LEN}) as run:
    start = lambda: len(run.start(range({BATCH}), batch_size={BATCH}).distances())
    tell(afterwards=fast.execution.path, captured=attempt(start, 0))
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


def violations(result: Result) -> list[str]:
    return [line for lines in result.log.values() for line in lines if line.startswith("VIOLATION")]


def nodes(result: Result, name: str) -> int:
    graphs = [line for line in result.log[f"{name} starting"] if line.startswith("GRAPH")]
    assert len(graphs) == 2, "one for each batch"
    return int(graphs[0].split()[2])


@pytest.mark.parametrize(("name", "graphs"), [("poc2 2", 3), ("poc2 4", 3), ("poc3 2", 2)])
def test_a_batch_is_captured_from_few_graphs(captured: Result, name: str, graphs: int) -> None:
    """The layer, the last layer, which is as the others with `poc3`, and what follows: each is compiled once."""
    found = captured.found(name)
    assert (found["path"], found["graphs"]) == ("captured", graphs), found["reason"]
    assert not violations(captured)


def test_a_layer_takes_four_products_one_attention_and_six_kernels(captured: Result) -> None:
    """Norm; norm and turn of queries, and of keys; sum and norm; gate times up; join. Products of one input are one."""
    assert nodes(captured, "poc2 4") - nodes(captured, "poc2 2") == 2 * (4 + 1 + 6)


@pytest.mark.parametrize("name", ["poc3 2", "poc4 2"])
def test_all_states_at_once_take_no_more_kernels_than_few(captured: Result, name: str) -> None:
    assert nodes(captured, f"{name} in chunks") == nodes(captured, name)


def test_compiled_code_rounds_as_the_eager_path_does(captured: Result) -> None:
    """Sums in half precision are off, products and sums are not contracted, and each operation rounds its result."""
    lines = [line for part in captured.log.values() for line in part]
    half = [line for line in lines if "GEMM half" in line or "GEMM lt" in line]
    assert half
    assert all(" math=16 " in line for line in half), "CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION"
    contracted = captured.told["contracted"]
    assert isinstance(contracted, list)
    assert len(contracted) > 5
    assert not any(contracted)


def test_attention_is_never_cudnns_and_other_threads_do_not_concern_a_capture(captured: Result) -> None:
    lines = [line for part in captured.log.values() for line in part]
    assert any("flash_fwd_kernel" in line for line in lines)
    assert not any("cudnn" in line.lower() for line in lines)
    begun = {line for line in lines if line.startswith("CAPTURE begin")}
    assert begun == {"CAPTURE begin mode 1"}, "cudaStreamCaptureModeThreadLocal"


def test_every_scheme_and_every_dtype_is_captured(folder: Path) -> None:
    """Each scheme in bfloat16, and three that differ most in the other dtypes."""
    result = run(folder, EVERY, cache=folder)
    assert len(result.told) == len(SCHEMES) + 3 * (len(DTYPES) - 1)
    assert {name: found for name, found in result.told.items() if found[0] != "captured"} == {}  # type: ignore[index] # each is a list
    assert not violations(result)


def test_a_layer_of_experts_is_captured_and_waits_for_nothing(folder: Path) -> None:
    """Three products, one attention, two products of groups, and what sorts rows by expert and adds them up."""
    result = run(folder, EXPERTS, cache=folder)
    assert (result.found("4")["kind"], result.found("4")["path"]) == ("flat", "captured"), result.told
    assert not violations(result)
    assert not [line for line in result.log["4 starting"] if line.startswith("SYNC") or " sync" in line]
    assert nodes(result, "4") - nodes(result, "2") == 2 * OF_EXPERTS


def test_memory_may_lack_at_each_place(folder: Path) -> None:
    """While a model is loaded, inputs are drawn, layers run, or a batch is captured; a captured batch needs none."""
    assert run(folder, SHORT, cache=folder).told == {
        "load": "MemoryShortError",
        "inputs": "OutOfMemoryError",
        "layers": "OutOfMemoryError",
        "again": "256",
        "capture": "OutOfMemoryError",
        "afterwards": "captured",
        "captured": str(BATCH),
    }


@pytest.mark.parametrize("name", ["poc2 2", "poc3 2"])
def test_to_start_a_batch_waits_for_nothing(captured: Result, name: str) -> None:
    lines = captured.log[f"{name} starting"]
    assert not [line for line in lines if line.startswith("SYNC") or " sync" in line]
    assert [line for line in captured.log[f"{name} waiting"] if line.startswith("SYNC")] == ["SYNC event, asleep"] * 2


@pytest.mark.parametrize("name", ["poc2 2", "poc3 2"])
def test_inputs_are_drawn_by_one_kernel_on_a_stream_of_its_own_without_memory(captured: Result, name: str) -> None:
    lines = captured.log[f"{name} starting"]
    drawn = [line for line in lines if line.startswith("KERNEL _draw_normal")]
    assert len(drawn) == 2, "one for each batch"
    (side,) = {re.search(r"stream (\d+)", line)[1] for line in drawn}  # type: ignore[index] # each line has one
    assert side not in {re.search(r"stream (\d+)", line)[1] for line in lines if line.startswith("GRAPH")}  # type: ignore[index] # likewise
    taken = captured.found(name)["taken"]
    assert isinstance(taken, int)
    assert taken < BATCH * SEQ_LEN * 256, "a byte for each number"


def test_a_model_whose_rotations_wait_for_the_gpu_is_captured_all_the_same(folder: Path) -> None:
    told = run(folder, DYNAMIC, cache=folder).told
    assert told["path"] == "captured", told["reason"]


def test_a_capture_that_fails_is_an_error_and_the_next_process_leaves_it_out(folder: Path) -> None:
    result = run(folder, WAITING, cache=folder)
    assert "previous error during capture" in str(result.told["error"])
    assert (result.told["path"], "failed in a process before" in str(result.told["reason"])) == ("compiled", True)
