"""The reference in float32 arithmetic, and what is measured against it."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import stats

from pocd.compute.conditioning import OwnShare, measure_conditioning, measure_turned, turned_share
from pocd.compute.engine import BlockRun, block_run
from pocd.compute.model import Model, adapt, load_model
from pocd.compute.reference import reference_of
from pocd.compute.transforms import join_of
from pocd.compute.wide import WideDecoder
from pocd.protocol.conditioning import LARGEST_ERROR, Conditioning
from pocd.protocol.proof import MISMATCH
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.theory import RATE, flipped_share
from scripts.bench.models import random_model, rounded
from tests.reference import plain
from tests.support.choices import draw_choices
from tests.support.family_models import FAMILIES, SEQ_LEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.protocol.schemes import LayerStep

DEPTH = 28


def deep(dtype: torch.dtype) -> Model:
    causal = random_model(
        "Qwen3",
        num_hidden_layers=DEPTH,
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return adapt(rounded(causal, dtype), name="deep")


def bits(model: Model) -> dict[str, torch.Tensor]:
    tensors = [*model.causal.named_parameters(), *model.causal.named_buffers()]
    return {name: tensor.clone() for name, tensor in tensors}


# The reference.


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_reference_is_exact_arithmetic_on_the_rounded_weights(family: str) -> None:
    """Held against float64: what is left is float32's rounding, a thousandth of bfloat16's."""
    causal = rounded(FAMILIES[family].build(), torch.bfloat16)
    model, decoder = adapt(causal, name="small"), FAMILIES[family].plain(causal)
    inputs = torch.from_numpy(np.random.default_rng(2).standard_normal((1, SEQ_LEN, 32))).bfloat16()
    vectors = torch.nn.functional.normalize(
        torch.from_numpy(np.random.default_rng(3).standard_normal((3, 32)))
    ).bfloat16()
    layer_step: LayerStep = "normalise, weigh and reflect"

    def step(layer: int, branch: plain.Array, residual: plain.Array) -> tuple[plain.Array, plain.Array]:
        v = vectors[layer].double().numpy()
        halves = [half / np.linalg.norm(half, axis=-1, keepdims=True) for half in (branch, residual)]
        return plain.reflect(halves[0] / np.sqrt(3), v), plain.reflect(halves[1], v)

    expected = decoder.run(decoder.weights, inputs[0].double().numpy(), step)
    join = join_of(layer_step, 3)
    found = WideDecoder(model.by_layers)(inputs, join, vectors, all_positions=True)
    assert found.dtype == torch.float32
    assert np.abs(found[0].double().numpy() - expected).max() < 3e-5 * np.abs(expected).max()
    last = WideDecoder(model.by_layers)(inputs, join, vectors)
    assert np.abs(last[0].double().numpy() - expected[-1]).max() < 3e-5 * np.abs(expected).max()
    own = model.by_layers(inputs, join, vectors, all_positions=True)
    assert np.abs(own[0].double().numpy() - expected).max() > 3e-4 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["poc2", "poc3", "poc4", "random-weights"])
def test_the_reference_leaves_the_model_as_it_was(scheme: str) -> None:
    model = load_model("bundled:tiny-qwen3", dtype="bfloat16", device="cpu")
    before = bits(model)
    with block_run(model, SCHEMES[scheme], block_hash="a", public_key="b", seq_len=8) as run:
        own = run.values([0, 1], batch_size=2)
        other = reference_of(run).values([0, 1], batch_size=2)
        assert not torch.equal(own, other)
        assert torch.equal(run.values([0, 1], batch_size=2), own)
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for module in model.causal.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_reference_that_fails_leaves_the_model_as_it_was() -> None:
    model = load_model("bundled:tiny-qwen3", dtype="bfloat16", device="cpu")
    before = bits(model)

    def fail(*_: object) -> None:
        raise RuntimeError("no more")

    hook = model.causal.model.layers[2].mlp.register_forward_pre_hook(fail)
    with block_run(model, SCHEMES["poc4"], block_hash="a", public_key="b", seq_len=8) as run:
        other = reference_of(run)
        with pytest.raises(RuntimeError, match="no more"):
            other.values([0], batch_size=1)
    hook.remove()
    after = bits(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# What is measured.


@pytest.mark.parametrize(
    ("scheme", "dtype", "is_good"),
    [("poc2", torch.bfloat16, False), ("poc4", torch.bfloat16, True), ("poc2", torch.float32, True)],
)
def test_depth_is_red_for_poc2_in_bfloat16_and_green_for_poc4(
    scheme: str, dtype: torch.dtype, *, is_good: bool
) -> None:
    with block_run(deep(dtype), SCHEMES[scheme], block_hash="a", public_key="b", seq_len=16) as run:
        found = measure_conditioning(run, batch_size=8)
    assert found is not None
    assert (found.alarm is None) == is_good, found
    assert (found.flipped is None) == (scheme == "poc4")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scheme", ["poc2", "poc3", "poc4"])
def test_the_bundled_models_are_green(scheme: str, dtype: str) -> None:
    model = load_model("bundled:tiny-llama", dtype=dtype, device="cpu")
    with block_run(model, SCHEMES[scheme], block_hash="a", public_key="b", seq_len=16) as run:
        found = measure_conditioning(run, batch_size=16)
    assert found is not None
    assert found.alarm is None


@pytest.mark.parametrize(("broken", "measured"), [((0, 5), True), (range(16), False)])
def test_nonces_that_give_nan_are_left_out(broken: Sequence[int], measured: bool) -> None:  # noqa: FBT001 - a parameter
    model = load_model("bundled:tiny-llama", dtype="bfloat16", device="cpu")
    with block_run(model, SCHEMES["poc2"], block_hash="a", public_key="b", seq_len=16) as run:

        class Overflowing(BlockRun):
            def states(self, nonces: Sequence[int]) -> torch.Tensor:
                return super().states(nonces) * (math.nan if set(nonces) & set(broken) else 1)

        overflowing = Overflowing(**{field.name: getattr(run, field.name) for field in fields(run)})
        found = measure_conditioning(overflowing, batch_size=4)
    assert (found is not None) == measured
    assert found is None or (found.error and 0.1 < found.own_share < 1)


def test_nobody_flips_without_rounding_and_chance_decides_with_nothing_in_common() -> None:
    assert flipped_share(0.0, 0.0) == 0.0
    assert flipped_share(1.5, 0.0) == pytest.approx(1 - RATE, abs=1e-3)
    assert flipped_share(0.001, 0.01) < 1e-9
    shares = [flipped_share(error, 0.05) for error in (0.01, 0.03, 0.1, 0.3, 1.0)]
    assert shares == sorted(shares)


@pytest.mark.parametrize(("error", "tolerance"), [(0.05, 0.0), (0.3, 0.1), (1.0, 0.0)])
def test_the_share_is_what_two_normal_hosts_find(error: float, tolerance: float) -> None:
    correlation = (1 - error**2 / 2) ** 2
    miner, other = np.random.default_rng(0).multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], 400_000).T
    r_target = stats.norm.ppf(RATE)
    valid = miner < r_target
    invalid = int((other[valid] >= r_target + tolerance).sum())
    assert stats.binomtest(invalid, int(valid.sum()), flipped_share(error, tolerance)).pvalue > 1e-4


def test_a_model_with_one_output_for_all_nonces_is_red() -> None:
    """However well it is reproduced: whoever has one nonce's output has all of them."""
    model = load_model("bundled:tiny-qwen3", dtype="bfloat16", device="cpu")
    with block_run(model, SCHEMES["poc2"], block_hash="a", public_key="b", seq_len=16) as run:

        class Collapsed(BlockRun):
            def inputs(self, nonces: Sequence[int]) -> torch.Tensor:
                every = super().inputs(nonces)
                return super().inputs([0]) + 1e-3 * every

        one = Collapsed(**{field.name: getattr(run, field.name) for field in fields(run)})
        found = measure_conditioning(one, batch_size=4)
    assert found is not None
    assert found.own_share < 0.01
    assert found.alarm is not None
    assert "all nonces have nearly the same output" in found.alarm


@pytest.mark.parametrize("scheme", ["poc2", "trained", "poc4"])
def test_results_that_do_not_scatter_are_red(scheme: str) -> None:
    """As of a device that writes nothing: no division by 0, and no share of it."""
    model = load_model("bundled:tiny-qwen3", dtype="bfloat16", device="cpu")
    with block_run(model, SCHEMES[scheme], block_hash="a", public_key="b", seq_len=16) as run:

        class Blank(BlockRun):
            def differences(
                self, states: torch.Tensor, exact: torch.Tensor, nonces: Sequence[int]
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                own, reference, errors = super().differences(states, exact, nonces)
                return own, torch.zeros_like(reference), errors

        blank = Blank(**{field.name: getattr(run, field.name) for field in fields(run)})
        found = measure_conditioning(blank, batch_size=4)
    assert found == Conditioning(None, None, 0.0)
    assert found.alarm is not None
    assert "all nonces have nearly the same output: 0.00% of its squares are the nonce's own" in found.alarm


def test_two_nonces_are_enough_and_one_is_not() -> None:
    model = load_model("bundled:tiny-qwen3", dtype="bfloat16", device="cpu")
    with block_run(model, SCHEMES["poc2"], block_hash="a", public_key="b", seq_len=16) as run:
        for left in (1, 2):

            class Overflowing(BlockRun):
                def states(self, nonces: Sequence[int], *, good: int = left) -> torch.Tensor:
                    return super().states(nonces) * (math.nan if max(nonces) >= good else 1)

            overflowing = Overflowing(**{field.name: getattr(run, field.name) for field in fields(run)})
            assert (measure_conditioning(overflowing, batch_size=1) is not None) == (left == 2)


def test_states_of_zeros_have_nothing_of_their_own() -> None:
    share = OwnShare()
    share.add(torch.zeros(4, 3, 8))
    assert share.value() == 0


@pytest.mark.parametrize(("common", "expected"), [(0.0, 1.0), (1.0, 0.5), (3.0, 0.1), (1e6, 0.0)])
def test_the_own_share_is_what_the_mean_leaves(common: float, expected: float) -> None:
    generator = torch.Generator().manual_seed(1)
    own = torch.nn.functional.normalize(torch.randn(64, 3, 512, generator=generator), dim=-1)
    same = torch.nn.functional.normalize(torch.randn(3, 512, generator=generator), dim=-1)
    share = OwnShare()
    for part in (common * same + own).split(16):
        share.add(7 * part)
    assert share.value() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("sigma", [1e-4, 1e-3, 1e-2])
def test_the_turned_share_is_what_two_hosts_find(sigma: float) -> None:
    """Experts' scores of many positions, which two hosts round with normal errors."""
    rows = 200
    gaps, turned = draw_choices(2, rows=rows, sigma=sigma)
    estimate = turned_share(gaps[0], gaps[1], rows=rows)
    assert stats.binomtest(int(turned.sum()), rows, estimate).pvalue > 1e-3


def test_choices_that_nothing_moves_are_turned_only_between_equals() -> None:
    gaps = [torch.tensor([0.5, 0.0, math.inf, 0.25])]
    assert turned_share(gaps, gaps, rows=1) > 0.9  # two experts are equal
    assert turned_share([gaps[0] + 1], [gaps[0] + 1], rows=1) == 0.0


def test_only_a_mixture_has_choices_that_rounding_turns() -> None:
    found = {}
    for family, dtype in (("qwen3", "float32"), ("qwen3 moe", "float32"), ("qwen3 moe", "bfloat16")):
        model = adapt(FAMILIES[family].build().to(getattr(torch, dtype)), name=family)
        with block_run(model, SCHEMES["poc2"], block_hash="a", public_key="b", seq_len=SEQ_LEN) as run:
            found[family, dtype] = measure_turned(run, batch_size=4)
            whole = measure_conditioning(run, batch_size=4)
        assert whole is not None
        assert whole.turned == found[family, dtype]
        assert whole.flipped is not None
        assert dtype != "float32" or whole.flipped >= 0.9 * (whole.turned or 0)
    dense, narrow, wide = found.values()
    assert dense is None
    assert narrow is not None
    assert wide is not None
    assert 0 < narrow < 0.05 < wide <= 1


def test_the_limits_are_those_of_the_verdict_and_of_vectors() -> None:
    assert Conditioning(0.5, MISMATCH, 0.5).alarm is None
    told = Conditioning(0.5, 0.25, 0.5).alarm
    assert told is not None
    assert "25.00% of honest nonces would be found invalid by another honest host, and 0.05% is the limit" in told
    assert Conditioning(LARGEST_ERROR, None, 0.5).alarm is None
    told = Conditioning(0.5, None, 0.5).alarm
    assert told is not None
    assert "vectors are off by 50.0% of their size, and 10% is the limit" in told
