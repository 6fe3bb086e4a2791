"""The memory that models of four sizes take of a GPU, by what is asked of the driver, on one that computes nothing."""

from __future__ import annotations

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

# Kernels are left out, as they take no memory; what allocates it is the compiler's own code.
PROGRAM = """
import gc
from torch._inductor.async_compile import AsyncCompile
from pocd.protocol.names import largest_batch_size
from scripts.bench.models import SHAPES

class Nothing:
    def run(self, *_, **__):
        pass

AsyncCompile.triton = lambda *_, **__: Nothing()
name, scheme = NAME, SCHEMES[SCHEME]
shape = {"seq_len": 256, "batch_size": largest_batch_size(256)}
causal = made_on("cuda", torch.bfloat16, *SHAPES[name])
weights = torch.cuda.memory_allocated()
torch.cuda.empty_cache()
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_reserved()
model = adapt(causal, name=name, fingerprint=name)
loading = torch.cuda.max_memory_reserved() - before
with engine.block_run(model, scheme, block_hash="b", public_key="k", seq_len=256) as run:
    torch.cuda.reset_peak_memory_stats()
    run.values(range(shape["batch_size"]), batch_size=shape["batch_size"])
    eager = torch.cuda.max_memory_allocated() - weights
fast = compile_model(model, "auto", scheme=scheme, **shape)
gc.collect()
torch.cuda.empty_cache()
found = {"weights": weights, "loading": loading, "eager": eager, "held": torch.cuda.memory_reserved() - weights}
tell(path=fast.execution.path, reason=fast.execution.reason, kind=model.decoder.kind)
tell(gib={name: round(taken / 2**30, 2) for name, taken in found.items()})
"""
# GiB: of the weights; above them, while matrices are merged, of an eager batch at its peak, and of what is captured.
EXPECTED = {
    ("qwen3-0.6b", "poc2"): (0.82, 0.0, 1.94, 2.10),
    ("qwen3-0.6b", "poc3"): (0.82, 0.0, 1.91, 2.00),
    ("qwen3-0.6b", "poc4"): (0.82, 0.0, 1.91, 2.00),
    ("llama-8b", "poc2"): (13.0, 0.30, 7.41, 9.36),
    ("qwen3-32b", "poc2"): (58.13, 0.62, 12.06, 14.83),
    ("qwen3-30b-a3b", "poc2"): (55.71, 0.0, 8.61, 5.74),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return null_gpu.build(tmp_path_factory.mktemp("nullgpu"))


@pytest.mark.parametrize(("name", "scheme"), EXPECTED)
def test_a_model_takes_so_much_memory(folder: Path, name: str, scheme: str) -> None:
    program = PROGRAM.replace("NAME", repr(name)).replace("[SCHEME]", f"[{scheme!r}]")
    result: Result = run(folder, program, cache=folder, PYTORCH_ALLOC_CONF="expandable_segments:True")
    assert (result.told["path"], result.told["kind"]) == ("captured", "flat"), result.told
    found = result.found("gib")
    expected = dict(zip(("weights", "loading", "eager", "held"), EXPECTED[name, scheme], strict=True))
    assert found == pytest.approx(expected, abs=0.1, rel=0.05)
