"""What only a GPU can show: captured batches, their overlap, and memory."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pocd.compute.compiled import compile_model
from pocd.compute.engine import block_run
from pocd.compute.model import Model, adapt, load_model, pick_device
from pocd.compute.random import normal
from pocd.protocol.errors import OutOfMemoryError
from pocd.protocol.names import DTYPES, default_tolerance
from pocd.protocol.schemes import SCHEMES
from tests.reference.plain import NORMAL_ROUNDING
from tests.support.family_models import FAMILIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

SEQ_LEN, BATCH = 64, 32

Values = npt.NDArray[np.float32]


def load(dtype: str = "bfloat16") -> Model:
    return load_model("bundled:tiny-qwen3", dtype=dtype, device="cuda")


def ready(model: Model, scheme: str) -> Model:
    return compile_model(model, "always", scheme=SCHEMES[scheme], seq_len=SEQ_LEN, batch_size=BATCH)


def results(model: Model, scheme: str, block: str, count: int = 3 * BATCH + 1) -> Values:
    with block_run(model, SCHEMES[scheme], block_hash=block, public_key="key", seq_len=SEQ_LEN) as run:
        return run.values(range(count), batch_size=BATCH).numpy()


def test_a_gpu_without_a_number_is_the_first_one() -> None:
    assert pick_device("cuda") == torch.device("cuda:0")
    torch.cuda.set_device(pick_device("cuda"))


@pytest.mark.parametrize("n", [8, 5001])
def test_the_kernel_draws_the_numbers_of_the_generator(n: int) -> None:
    from pocd.compute.kernels import fill_normal

    seeds = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    found = fill_normal(torch.empty(len(seeds), n, device="cuda"), seeds.cuda())
    assert torch.allclose(found.cpu(), normal(seeds, n), rtol=0, atol=NORMAL_ROUNDING)
    half = fill_normal(torch.empty(len(seeds), n, device="cuda", dtype=torch.bfloat16), seeds.cuda())
    assert torch.equal(half, found.bfloat16()), "it rounds as torch does"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_captured_agrees_with_eager_for_every_scheme_and_block(scheme: str, dtype: str) -> None:
    model = load(dtype)
    captured = ready(model, scheme)
    assert captured.execution.path == "captured", captured.execution
    tolerance = default_tolerance(dtype, SCHEMES[scheme], model.hidden_size)
    for block in ("block_a", "block_b"):
        found = results(captured, scheme, block)
        assert found == pytest.approx(results(model, scheme, block), abs=tolerance, rel=0)
        assert np.array_equal(found, results(captured, scheme, block))


@pytest.mark.parametrize("family", ["mixtral", "qwen3 moe"])
def test_a_mixture_of_experts_is_captured_where_its_products_are_grouped(family: str) -> None:
    model = adapt(FAMILIES[family].build().to("cuda", torch.bfloat16), name=family)
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        assert model.decoder.kind == "layers"
        return
    captured = ready(model, "poc2")
    assert captured.execution.path == "captured", captured.execution
    differences = np.abs(results(captured, "poc2", "block") - results(model, "poc2", "block"))
    # Where two experts are all but equal, a rounding decides between them.
    assert (differences <= default_tolerance("bfloat16", SCHEMES["poc2"], model.hidden_size)).mean() > 0.9


def test_what_auto_takes_is_the_captured_path() -> None:
    found = compile_model(load(), "auto", scheme=SCHEMES["poc2"], seq_len=SEQ_LEN, batch_size=BATCH)
    assert found.execution.path == "captured", found.execution


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_agrees_with_the_cpu(dtype: str) -> None:
    other = load_model("bundled:tiny-qwen3", dtype=dtype, device="cpu")
    tolerance = default_tolerance(dtype, SCHEMES["poc2"], other.hidden_size)
    found = results(ready(load(dtype), "poc2"), "poc2", "block", BATCH)
    assert found == pytest.approx(results(other, "poc2", "block", BATCH), abs=tolerance)


@pytest.mark.parametrize("path", ["eager", "captured"])
@pytest.mark.parametrize("scheme", ["poc2", "poc3"])
def test_batches_of_two_runs_overlap_without_mixing(scheme: str, path: str) -> None:
    model = ready(load(), scheme) if path == "captured" else load()
    expected = {block: results(model, scheme, block, 8 * BATCH) for block in "ab"}
    spans = [range(start, start + BATCH) for start in range(0, 8 * BATCH, BATCH)]
    with (
        block_run(model, SCHEMES[scheme], block_hash="a", public_key="key", seq_len=SEQ_LEN) as a,
        block_run(model, SCHEMES[scheme], block_hash="b", public_key="key", seq_len=SEQ_LEN) as b,
    ):
        pending = [(run.block_hash, span, run.start(span, batch_size=BATCH)) for span in spans for run in (a, b)]
        for block, span, batch in pending[::-1]:  # all were under way; they may be asked for in any order
            assert batch.distances() == expected[block][span.start : span.stop]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_start_does_not_wait() -> None:
    model = ready(load(), "poc2")
    try:
        with block_run(model, SCHEMES["poc2"], block_hash="b", public_key="k", seq_len=SEQ_LEN) as run:
            torch.cuda.set_sync_debug_mode("error")
            pending = [run.start(range(first, first + BATCH), batch_size=BATCH) for first in (0, BATCH)]
            torch.cuda.set_sync_debug_mode("default")
            assert len([value for each in pending for value in each.distances()]) == 2 * BATCH
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_leave_no_memory_behind_and_a_dropped_program_gives_its_own_back() -> None:
    captured = ready(load(), "poc2")
    results(captured, "poc2", "warm")
    held = torch.cuda.memory_allocated()
    for block in ("a", "b", "c"):
        results(captured, "poc2", block)
    assert torch.cuda.memory_allocated() == held
    captured = replace(captured, program=None)
    gc.collect()
    assert torch.cuda.memory_allocated() < held


def test_a_batch_beyond_the_memory_is_an_error_after_which_smaller_ones_work() -> None:
    model = load("float32")
    huge = torch.cuda.get_device_properties(0).total_memory // (4096 * model.hidden_size * 4)  # the inputs alone
    with pytest.raises(OutOfMemoryError, match="does not fit"):
        compile_model(model, "auto", scheme=SCHEMES["poc2"], seq_len=4096, batch_size=huge)
    with block_run(model, SCHEMES["poc2"], block_hash="b", public_key="k", seq_len=4096) as run:
        with pytest.raises(OutOfMemoryError, match="does not fit"):
            run.start([0], batch_size=huge)
    assert len(results(ready(model, "poc2"), "poc2", "block")) == 3 * BATCH + 1
