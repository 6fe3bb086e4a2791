"""Compiled code gives the eager path's distances, serves every block, and outlives its process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import structlog.testing
import torch
from torch._dynamo.utils import counters
from transformers import Qwen3Config, Qwen3ForCausalLM

from pocd.compute import compiled, stages
from pocd.compute.compiled import compile_model
from pocd.compute.engine import block_run
from pocd.compute.flat import FlatDecoder, run_layer
from pocd.compute.model import Model, adapt, load_model
from pocd.protocol.errors import ComputeError, InputError
from pocd.protocol.names import BUNDLED
from pocd.protocol.schemes import SCHEMES
from pocd.worker.messages import Load
from tests.pool.test_pool import ROUND, pooled, recompute
from tests.support.family_models import FAMILIES
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from pocd.protocol.names import Compile
    from pocd.protocol.schemes import Scheme

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning"
)  # torch's compiler uses its own old parts

SEQ_LEN, BATCH = 16, 4  # as of the known distances, so that a worker's self-test needs no compilation of its own
POC2 = SCHEMES["poc2"]
# A pick and 256-bit inputs, by layers as of poc2, which are compiled already, and whose weights are drawn.
DRAWN = replace(SCHEMES["artifacts-256"], weights="drawn", layer_step=POC2.layer_step)
ROUNDING = 2e-5  # of distances in float32, whatever the kernels: docs/protocol.md, section 3
MODEL = "bundled:tiny-qwen3"  # whose layers each scheme here shares as far as it can, as each kernel costs a second
CHILD = f"""
import json, warnings
warnings.filterwarnings("ignore")
from torch._dynamo.utils import counters
from pocd.compute.compiled import compile_model
from pocd.compute.model import load_model
from pocd.protocol.schemes import SCHEMES
model = load_model("{MODEL}", dtype="float32", device="cpu")
ready = compile_model(model, "always", scheme=SCHEMES["poc2"], seq_len={SEQ_LEN}, batch_size={BATCH})
print(json.dumps({{"path": ready.execution.path, **counters["inductor"]}}))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all processes keep what they compile."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(cache: Path) -> Model:
    assert cache.is_dir()
    return load_model(MODEL, dtype="float32", device="cpu")


def ready(model: Model, scheme: Scheme = POC2) -> Model:
    return compile_model(model, "always", scheme=scheme, seq_len=SEQ_LEN, batch_size=BATCH)


def results(model: Model, scheme: Scheme, block: str) -> npt.NDArray[np.float32]:
    with block_run(model, scheme, block_hash=block, public_key="key", seq_len=SEQ_LEN) as run:
        assert run.execution(BATCH) == model.execution
        return run.values(range(BATCH + 2), batch_size=BATCH).numpy()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


async def test_a_worker_mines_by_compiled_code_and_says_so_and_another_process_finds_what_it_compiled(
    cache: Path, model: Model, tmp_path: Path
) -> None:
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache)
    assert not any(cache.rglob("*.so")), "this test is the first one: what is found below is the worker's"
    load = Load(MODEL, "float32", ("cpu",), "poc2", SEQ_LEN, BATCH, compile="always")
    round_ = replace(ROUND, model=load.model, seq_len=SEQ_LEN)
    with structlog.testing.capture_logs() as logs:
        async with pooled(tmp_path, [load], round_) as (pool, _):
            (worker,) = pool.workers
            await until(lambda: worker.computed > BATCH)
            assert worker.info is not None
            assert (worker.info.execution, worker.info.execution_reason) == ("compiled", "as the settings say")
            assert worker.info.compile_seconds > 0
            with block_run(model, POC2, block_hash="b", public_key="k", seq_len=SEQ_LEN) as run:
                eager = run.distances(range(BATCH), batch_size=BATCH)
            asked = replace(round_, block_hash="b", public_key="k")
            assert await recompute(pool, asked, tuple(range(BATCH))) == pytest.approx(eager, abs=ROUNDING)
    assert "execution" not in {entry["action"] for entry in logs}, "its round runs as it said"
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", CHILD], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = orjson.loads(done.stdout)
    assert (found["path"], found.get("fxgraph_cache_hit", 0), found.get("fxgraph_cache_miss", 0)) == ("compiled", 3, 0)


@pytest.mark.parametrize("scheme", [POC2, SCHEMES["poc3"], DRAWN], ids=lambda scheme: scheme.name)
def test_compiled_agrees_with_eager_for_every_block(model: Model, scheme: Scheme) -> None:
    agrees_for_every_block(model, scheme)


def test_a_mixture_of_experts_is_compiled_whole(cache: Path) -> None:
    assert cache.is_dir()
    agrees_for_every_block(adapt(FAMILIES["mixtral"].build(), name="mixture"), SCHEMES["poc4"])


def agrees_for_every_block(model: Model, scheme: Scheme) -> None:
    fast = ready(model, scheme)
    assert (fast.execution.path, fast.execution.seconds > 0) == ("compiled", True)
    before = compilations()
    for block in ("block_a", "block_b"):
        assert results(fast, scheme, block) == pytest.approx(results(model, scheme, block), abs=ROUNDING, rel=0)
    assert compilations() == before


def test_more_layers_compile_nothing_more(model: Model) -> None:
    ready(model)
    before = compilations()
    torch.manual_seed(0)
    like: dict[str, Any] = {"num_hidden_layers": 12, "layer_types": ["full_attention"] * 12}
    config = Qwen3Config.from_pretrained(BUNDLED / "tiny-qwen3", **like)
    deep = adapt(Qwen3ForCausalLM(config), name="deep")
    assert deep.layers == 12
    fast = ready(deep)
    assert compilations() == before
    assert results(fast, POC2, "block") == pytest.approx(results(deep, POC2, "block"), abs=ROUNDING)


def test_a_large_head_is_no_longer_program(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is multiplied in parts, for the memory's sake, which the compiler would unroll."""
    counts: list[int] = []

    def count(graph: Any, _inputs: object) -> Any:  # noqa: ANN401 - a compiler of torch's
        counts.append(len(graph.graph.nodes))
        return graph.forward

    with block_run(model, POC2, block_hash="b", public_key="k", seq_len=SEQ_LEN) as run:
        states, seeds = torch.ones(BATCH, model.hidden_size), run.host_seeds(range(BATCH))
        for chunk in (stages.HEAD_CHUNK, 8 * model.hidden_size):
            torch._dynamo.reset()
            monkeypatch.setattr(stages, "HEAD_CHUNK", chunk)
            torch.compile(stages.measure_states, backend=count)(states, seeds, run.block, scheme=run.scheme)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("path", ["eager", "compiled"])
def test_batches_of_two_runs_may_be_under_way_together(model: Model, path: str) -> None:
    model = ready(model) if path == "compiled" else model
    expected = {block: results(model, POC2, block)[:BATCH].tolist() for block in "ab"}
    with (
        block_run(model, POC2, block_hash="a", public_key="key", seq_len=SEQ_LEN) as a,
        block_run(model, POC2, block_hash="b", public_key="key", seq_len=SEQ_LEN) as b,
    ):
        pending = [run.start(range(BATCH), batch_size=BATCH) for run in (a, b, a)]
        assert [each.distances() for each in pending] == [expected["a"], expected["b"], expected["a"]]


@pytest.mark.parametrize("count", [0, BATCH + 1])
def test_what_is_no_batch_is_refused(model: Model, count: int) -> None:
    with block_run(model, POC2, block_hash="b", public_key="k", seq_len=SEQ_LEN) as run:
        with pytest.raises(InputError, match=f"^a batch takes 1 to {BATCH} nonces, got {count}$"):
            run.start(range(count), batch_size=BATCH)


def test_other_shapes_and_schemes_run_eagerly_and_say_so(model: Model) -> None:
    fast = ready(model)
    for scheme, seq_len, batch_size in (("poc2", 7, BATCH), ("poc2", SEQ_LEN, 3), ("end-norm", SEQ_LEN, BATCH)):
        found = []
        for each in (model, fast):
            with block_run(each, SCHEMES[scheme], block_hash="b", public_key="k", seq_len=seq_len) as run:
                found.append(run.distances(range(4), batch_size=batch_size))
                execution = run.execution(batch_size)
        assert found[0] == found[1]
        assert execution.path == "eager"
        assert "only another scheme, sequence length or batch size was compiled" in execution.reason


@pytest.mark.parametrize(
    ("mode", "reason"), [("never", "as the settings say"), ("auto", "on the CPU compiling gains too little")]
)
def test_an_eager_path_says_why(model: Model, mode: Compile, reason: str) -> None:
    fast = ready(model)
    before = compilations()
    for each in (model, fast):
        found = compile_model(each, mode, scheme=POC2, seq_len=SEQ_LEN, batch_size=BATCH)
        assert found.execution.path == "eager"
        assert found.execution.reason.startswith(reason)
        assert found.program is None
    assert compilations() == before


def test_a_model_that_runs_by_its_own_layers_is_not_compiled(model: Model) -> None:
    with pytest.raises(
        ComputeError, match=r"'bundled:tiny-qwen3' cannot be compiled: its layers are transformers' own"
    ):
        ready(replace(model, decoder=model.by_layers))


def test_without_a_compiler_the_error_names_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ComputeError, match=r"there is no C\+\+ compiler \(no-such-compiler\)"):
        ready(model)


def wrongly(*args: Any, **options: Any) -> torch.Tensor:  # noqa: ANN401 - as `run_layer`
    return run_layer(*args, **options) * 1.01


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_whatever_fails_leaves_a_clean_eager_path_or_is_an_error(
    model: Model, monkeypatch: pytest.MonkeyPatch, mode: Compile
) -> None:
    """As on a GPU, where 'auto' tries: a compiler whose code is wrong, which is the worst that can happen."""
    monkeypatch.setattr(compiled, "_hindrance", lambda *_: None)
    assert isinstance(model.decoder, FlatDecoder)

    monkeypatch.setattr(compiled, "_compile", lambda function: wrongly if function is run_layer else function)
    arguments: dict[str, Any] = {"scheme": POC2, "seq_len": SEQ_LEN, "batch_size": BATCH}
    if mode == "always":
        with pytest.raises(ComputeError, match=r"cannot be compiled.*WrongDistancesError: distances differ"):
            compile_model(model, mode, **arguments)
        return
    found = compile_model(model, mode, **arguments)
    assert found.program is None
    assert found.execution.path == "eager"
    assert found.execution.reason.startswith("compiling failed: WrongDistancesError: distances differ")
    assert np.array_equal(results(found, POC2, "block"), results(model, POC2, "block"))
