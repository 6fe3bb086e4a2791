"""How near a mixture's routers come to another choice, against choices that other hosts really make."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pocd.compute.conditioning import turned_share
from pocd.compute.engine import BlockRun, block_run
from pocd.compute.margins import gaps_of, measure_chances, turned_chances
from pocd.compute.model import adapt, load_model
from pocd.compute.routers import routers_of
from pocd.protocol.errors import OutOfMemoryError
from pocd.protocol.schemes import SCHEMES
from tests.support.choices import draw_choices
from tests.support.family_models import FAMILIES, SEQ_LEN
from tests.support.other_models import OTHERS, build


@pytest.mark.parametrize("sigma", [1e-5, 1e-4, 1e-3])
def test_as_many_nonces_turn_as_the_chances_say_or_fewer(sigma: float) -> None:
    """Experts' scores of many positions, which three hosts round with normal errors; two ways are the validator's."""
    rows = 400
    gaps, turned = draw_choices(3, rows=rows, sigma=sigma)
    found = turned_chances(gaps[0], gaps[1], rows)
    counted, expected = int(turned.sum()), float(found.sum())
    assert turned.any()
    assert counted <= expected + 4 * math.sqrt(expected)
    assert expected <= 2 * counted + 10, "an honest one's error is taken for 1.5 times what it is"
    assert float(found[turned].min()) > 100 * 1e-4, "none that turns is far from the boundary"
    assert float(found.mean()) == pytest.approx(turned_share(gaps[0], gaps[1], rows), rel=1, abs=0.01)


def test_a_chance_is_that_of_the_nearest_choice_in_what_rounding_moves() -> None:
    gaps = torch.tensor([[1.5, 90.0], [3.0, 90.0], [90.0, math.inf], [0.0, 90.0]])
    moved = gaps + torch.tensor([[1.0, -1.0]])
    (found,) = [turned_chances([gaps.flatten()], [moved.flatten()], rows=4)]
    normal = torch.distributions.Normal(0, 1)
    beyond = [1 - float(normal.cdf(torch.tensor(gap, dtype=torch.float64) / 1.5)) for gap in (1.5, 3.0)]
    assert found[:2].tolist() == pytest.approx([1 - math.exp(-each) for each in beyond], rel=0.2)
    assert found[2] == 0
    assert found[3] == pytest.approx(1 - math.exp(-0.5))


def test_where_nothing_moves_only_equals_turn_and_what_is_masked_does_not_count() -> None:
    gaps = torch.tensor([0.5, math.inf, math.nan, 0.25])
    assert turned_chances([gaps], [gaps], rows=2).tolist() == [0.0, 0.0]
    assert turned_chances([gaps * 0], [gaps * 0], rows=2)[0] > 0.3
    # What is off stays off: a later choice of one position, which happens not to move, is no nearer for it.
    later = torch.tensor([1.0, 1.0])
    alone = turned_chances([later], [later], rows=2)
    after = turned_chances([gaps + 9, later], [gaps + 10, later], rows=2)
    assert alone.tolist() == [0.0, 0.0]
    assert float(after[1]) == pytest.approx(0.159, abs=0.001)  # 1 in standard deviations of 1.5·√½


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "MiniMaxM2ForCausalLM", "deepseek v3, dense first layer"])
def test_a_nonces_chance_is_its_own(name: str, dtype: str) -> None:
    """Whatever others are asked for beside it, in whatever order."""
    rel = 0.0
    if name in OTHERS:
        rel = 0.01  # of its heads' sizes places in memory decide how torch's attention rounds, also in dense models
        causal = build(OTHERS[name][0], **OTHERS[name][2])
    else:
        experts = {"num_experts": 16, "moe_intermediate_size": 24, "num_local_experts": 16}
        causal = build(name, num_hidden_layers=4, num_experts_per_tok=4, head_dim=16, **experts)
    model = adapt(causal.to(getattr(torch, dtype)), name=name)
    with block_run(model, SCHEMES["poc2"], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
        found = measure_chances(run, range(10), batch_size=4)
        assert found is not None
        assert found.dtype == torch.float64
        for others in ([7], [9, 90, 7, 91], [90, 91, 92, 93, 94, 9, 7]):
            again = measure_chances(run, others, batch_size=4)
            assert again is not None
            for nonce in {7, 9}.intersection(others):
                assert float(again[others.index(nonce)]) == pytest.approx(float(found[nonce]), rel=rel, abs=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_rounding_moves_of_a_nonce_is_its_own_in_any_place_of_a_batch(dtype: str) -> None:
    model = adapt(FAMILIES["qwen3 moe"].build().to(getattr(torch, dtype)), name="m")
    with block_run(model, SCHEMES["poc2"], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
        for other in (False, True):
            first, second = (gaps_of(run, nonces, other=other) for nonces in ([3, 4, 5, 6], [6, 90, 3, 91]))
            for one, two in zip(first, second, strict=True):
                assert torch.equal(one.view(4, -1)[[0, 3]], two.view(4, -1)[[2, 0]])


def test_a_dense_model_has_none_and_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("bundled:tiny-qwen3", dtype="float32", device="cpu")
    assert not routers_of(model.by_layers.layers)
    with block_run(model, SCHEMES["poc2"], block_hash="a", public_key="b", seq_len=8) as run:
        monkeypatch.delattr(BlockRun, "states")
        assert measure_chances(run, [1, 2], batch_size=2) is None


def test_memory_that_is_short_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(FAMILIES["qwen3 moe"].build(), name="m")

    def short(_: BlockRun, nonces: list[int]) -> torch.Tensor:
        raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {len(nonces)} bytes.")

    with block_run(model, SCHEMES["poc2"], block_hash="a", public_key="b", seq_len=8) as run:
        monkeypatch.setattr(BlockRun, "states", short)
        with pytest.raises(OutOfMemoryError, match="4 × 8 positions, watched at their routers, do not fit"):
            measure_chances(run, [1, 2], batch_size=4)


def test_a_mixture_is_as_it_was_afterwards() -> None:
    model = adapt(FAMILIES["qwen3 moe"].build().to(torch.bfloat16), name="m")
    before = {name: tensor.clone() for name, tensor in model.causal.named_parameters()}
    with block_run(model, SCHEMES["poc2"], block_hash="a", public_key="b", seq_len=8) as run:
        own = run.values(range(4), batch_size=4)
        measure_chances(run, range(4), batch_size=4)
        assert torch.equal(run.values(range(4), batch_size=4), own)
        by_layers = replace(run, model=replace(model, decoder=model.by_layers, program=None))
        assert by_layers.values(range(4), batch_size=4).isfinite().all()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.causal.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.causal.modules())
