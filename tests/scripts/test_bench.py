"""The measuring scripts run from a checkout with torch, transformers, numpy, scipy and rich alone."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands for a machine where nothing else of pocd's dependencies is installed; one process, as torch's import is dear.
WITHOUT = """
import runpy, sys
absent = {"accelerate", "aiohttp", "orjson", "prometheus_client", "pydantic", "pydantic_settings", "structlog",
          "tenacity", "uvloop"}
sys.modules.update(dict.fromkeys(absent))  # what Python takes for: there is no such module
for command in sys.argv[1:]:
    sys.argv = command.split()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
OPTIONS = "--models bundled:tiny-llama --seq-len 8 --batch-size 2 --repeats 1"
COMMANDS = {
    "engine": f"scripts.bench.engine {OPTIONS} --profile --json",
    "another scheme": f"scripts.bench.engine {OPTIONS} --scheme poc3 --json",
    "agreement": "scripts.bench.agreement --models bundled:tiny-qwen3 --nonces 40 --seq-len 8 --json",
}


# As a GPU's profile, and torch's compiler, name them.
KERNELS = [
    "_draw_normal",
    "triton_poi_fused_add_clamp_min_copy_cos_log_mul_sin_sqrt_0",
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
    "sm90_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize32x32x8_stage3",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
    "triton_per_fused__to_copy_add_div_linalg_vector_norm_mul_sum_5",
    "triton_per_fused__fused_rms_norm__scaled_dot_product_flash_attention_addcmul_mul_1",  # of what attention takes
    "Memcpy DtoD (Device -> Device)",
]


@pytest.fixture(scope="module")
def printed() -> dict[str, dict[str, Any]]:
    """What each of the commands printed."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *COMMANDS.values()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(COMMANDS, map(orjson.loads, done.stdout.splitlines()), strict=True))


def test_the_bench_measures_all_three_ways(printed: dict[str, dict[str, Any]]) -> None:
    (row,) = printed["engine"]["models"]
    assert abs(sum(row["profile"].values()) - 1) < 1e-9
    assert row["profile"].keys() >= {"matrix products", "attention", "generator", "norms and transforms"}
    assert (row["seq_len"], row["batch_size"], row["hidden_size"], row["dtype"]) == (8, 2, 128, "float32")
    # Above one too, where the machine was busy: the generator is timed apart.
    measured = "plain", "bare", "engine", "engine_gflops", "round_seconds", "generator_share"
    assert min(row[name] for name in measured) > 0
    # With one sample each, the ratios are those of the rates.
    assert abs(row["engine_over_bare"] * row["bare"] / row["engine"] - 1) < 1e-9
    assert abs(row["engine_over_plain"] * row["plain"] / row["engine"] - 1) < 1e-9
    # 4 layers of 3 × 128 × 320 and (2 + 2/2) × 128² weights, and attention over 8 positions.
    weights = 4 * (3 * 128 * 320 + 3 * 128 * 128)
    assert abs(row["gflop_per_nonce"] * 1e9 - (2 * weights * 8 + 4 * 2 * 8 * 8 * 128)) < 1


def test_the_bench_holds_another_scheme_against_poc2(printed: dict[str, dict[str, Any]]) -> None:
    (row,) = printed["another scheme"]["models"]
    assert (row["scheme"], row["plain"], row["engine_over_plain"]) == ("poc3", None, None)
    assert abs(row["engine_over_poc2"] * row["poc2"] / row["engine"] - 1) < 1e-9


def test_the_agreement_table_shows_that_all_within_a_dtype_keeps_its_tolerance(
    printed: dict[str, dict[str, Any]],
) -> None:
    found = printed["agreement"]
    rows = {(row["dtype"], row["between"]): row for row in found["rows"]}
    for dtype, tolerance in {(row["dtype"], row["tolerance"]) for row in found["rows"]}:
        assert (dtype, "place in the batch and neighbours") in rows
        within = [row for row in found["rows"] if row["dtype"] == dtype and "float32" not in row["between"]]
        assert all(row["largest"] <= tolerance for row in within)
        assert all(row["flipped_with_tolerance"] == 0 for row in within)
    rough = rows["bfloat16", "bfloat16 and float32"]
    assert 1e-5 < rough["percentile_99"] <= rough["largest"] < 0.01
    assert 0.001 < rough["flipped"] < 0.1


def test_honest_ways_of_computing_lie_about_as_far_from_the_reference_as_the_validator() -> None:
    import torch

    from pocd.protocol.schemes import SCHEMES
    from scripts.bench.differences import compared
    from scripts.bench.models import build

    options = Namespace(nonces=32, seq_len=8, compiled=False)
    model = build("bundled:tiny-qwen3", torch.bfloat16, torch.device("cpu"))
    head, threads, layers = islice(compared(model, SCHEMES["poc3"], options), 3)
    assert str(head).startswith("bundled:tiny-qwen3, poc3: own error")
    assert not isinstance(threads, str)
    assert not isinstance(layers, str)
    assert (threads.way, threads.error, threads.by_projections[0]) == ("another number of threads", 1, 0)
    assert (layers.way, layers.by_projections[0]) == ("transformers' layers", 0)
    assert 0.5 < layers.error < 2


def test_kernels_belong_to_groups_by_their_names() -> None:
    from scripts.bench.profiling import ATTENTION, DECODER, GENERATOR, MATRICES, OTHER, _group_of_kernel

    groups = [GENERATOR, GENERATOR, MATRICES, MATRICES, ATTENTION, ATTENTION, DECODER, DECODER, OTHER]
    assert [_group_of_kernel(name) for name in KERNELS] == groups
