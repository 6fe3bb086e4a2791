"""Mixtures of experts, against transformers' own routers and experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN

from pocd.compute.engine import block_run
from pocd.compute.experts import (
    TILE,
    are_products_grouped,
    can_mix,
    grouped_product,
    in_tiles,
    mix,
    mixture_of,
    route,
)
from pocd.compute.model import Model, adapt
from pocd.compute.routers import choose, even_routers
from pocd.protocol.names import DTYPES
from pocd.protocol.schemes import SCHEMES
from tests.support.family_models import FAMILIES, SEQ_LEN, layers_of, qwen3_moe
from tests.support.other_models import OTHERS, build

ROUNDING = 2e-5  # of distances in float32, whatever the kernels: docs/protocol.md, section 3
MIXTURES = ("mixtral", "qwen3 moe", "qwen3 moe, shares sum to one")
SILU = ACT2FN["silu"]


def model_of(family: str, dtype: str = "float32") -> Model:
    return adapt(FAMILIES[family].build().to(getattr(torch, dtype)), name=family)


def block_of(family: str, dtype: str = "float32") -> Any:  # noqa: ANN401 - transformers gives its classes no common type
    """A mixture of which two experts are always tied, and one is chosen for no position that is positive."""
    model = FAMILIES[family].build().to(getattr(torch, dtype)).eval().requires_grad_(requires_grad=False)
    block = next(layer.mlp for layer in layers_of(model) if hasattr(layer.mlp, "experts"))
    block.experts.config._experts_implementation = "eager"  # an expert after the other
    block.gate.weight[1] = block.gate.weight[2]
    block.gate.weight[3] = -10
    return block


def positions(dtype: str = "float32", rows: int = 3) -> torch.Tensor:
    drawn = torch.randn(rows, SEQ_LEN, 32, generator=torch.Generator().manual_seed(3))
    return drawn.abs().to(getattr(torch, dtype))


def rounding(result: torch.Tensor) -> float:
    """Largest difference between a mixture's results that products and sums in another order make."""
    return max(4 * torch.finfo(result.dtype).eps, 1e-5) * float(result.float().abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_is_that_of_transformers(family: str, dtype: str) -> None:
    block, h = block_of(family, dtype), positions(dtype)
    mixture = mixture_of(block)
    with even_routers([block]):
        _, shares, chosen = block.gate(h)
        expected = block(h)
    found_chosen, found_shares = route(h.flatten(0, 1), mixture)
    assert not (found_chosen == 3).any()
    assert torch.equal(found_chosen, chosen)
    assert torch.equal(found_shares, shares)
    assert found_shares.dtype == torch.float32
    found = mix(h, mixture, SILU)
    assert found.dtype == expected.dtype
    # transformers adds the experts up in the model's dtype, one after the other.
    assert (found.float() - expected.float()).abs().max() <= rounding(expected)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("scheme", ["poc2", "poc3", "random-weights"])
def test_both_ways_through_a_mixture_agree(family: str, scheme: str) -> None:
    model = model_of(family)
    assert model.decoder.kind == "flat"
    found = []
    for decoder in (model.decoder, model.by_layers):
        one = replace(model, decoder=decoder)
        with block_run(one, SCHEMES[scheme], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
            found.append(run.values(range(8), batch_size=4).numpy())
    assert found[0] == pytest.approx(found[1], abs=ROUNDING, rel=0)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MIXTURES)
def test_neighbours_change_nothing_in_a_mixture(family: str, dtype: str) -> None:
    """They change how many rows an expert has, and where among them a row is."""
    block = block_of(family, dtype)
    h, mixture = positions(dtype, rows=7), mixture_of(block)
    together = mix(h, mixture, SILU)
    for place in (0, 3, 6):
        others = torch.roll(h, 1, dims=-1)
        others[place] = h[place]
        for rows, at in ((others, place), (h[place : place + 1], 0)):
            assert torch.equal(mix(rows, mixture, SILU)[at], together[place])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_a_row_depends_on_no_other_row(dtype: str) -> None:
    """Kernels for few rows, and for the last ones of many, sum in another order than those for many."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3 * TILE + 1, 96, generator=generator).to(getattr(torch, dtype))
    matrices = torch.randn(3, 80, 96, generator=generator).to(rows.dtype)
    alone = torch.cat([grouped_product(row, matrices[:1], torch.tensor([1]).int()) for row in rows.unsqueeze(1)])
    for count in (1, 2, 3, 5, TILE - 1, TILE, TILE + 1, 2 * TILE + 3, len(rows)):
        ends = torch.tensor([count, count, len(rows)]).int()  # nothing for the second
        found = grouped_product(rows, matrices[[0, 1, 0]], ends)
        assert torch.equal(found, alone)


def test_rows_beyond_the_last_group_are_nobodys() -> None:
    found = grouped_product(torch.ones(3, 4), torch.ones(1, 2, 4), torch.tensor([1]).int())
    assert found.tolist() == [[4, 4], [0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("Qwen3MoeForCausalLM", {"num_experts": 16, "moe_intermediate_size": 24}),
        ("MiniMaxM2ForCausalLM", {"num_local_experts": 16}),
        ("GptOssForCausalLM", {"num_local_experts": 16}),
    ],
)
def test_a_nonces_result_depends_on_no_neighbour(name: str, experts: dict[str, int], dtype: str) -> None:
    """A deep mixture makes much of little: one rounding that differs turns a choice of a later router."""
    # Heads of 64 bytes: others' places in memory decide how torch's attention rounds, also in dense models.
    causal = build(name, num_hidden_layers=8, num_experts_per_tok=4, head_dim=16, **experts)
    model = adapt(causal.to(getattr(torch, dtype)), name=name)
    for decoder in {model.decoder.kind: model.decoder, "layers": model.by_layers}.values():
        one = replace(model, decoder=decoder)
        with block_run(one, SCHEMES["poc4"], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
            first = run.values(range(4), batch_size=4)
            assert torch.equal(run.values([3, 90, 91, 1], batch_size=4)[[0, 3]], first[[3, 1]])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("MiniMaxM2ForCausalLM", {"num_local_experts": 4}),
        ("GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 8}),  # biases, transposed, a gate of its own
        ("Qwen2MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}),
        ("DeepseekV3ForCausalLM", OTHERS["deepseek v3, dense first layer"][2]),  # groups of experts
    ],
)
def test_any_experts_of_transformers_are_computed_in_tiles(name: str, config: dict[str, Any]) -> None:
    causal = build(name, **({"num_experts_per_tok": 2} | config)).eval()
    experts = next(module for module in causal.modules() if hasattr(module, "has_gate"))
    h, chosen = positions().flatten(0, 1), torch.tensor([[0, 2]]).expand(3 * SEQ_LEN, 2).contiguous()
    shares = torch.tensor([[0.75, 0.25]]).expand(3 * SEQ_LEN, 2).contiguous()
    experts.config._experts_implementation = "eager"
    expected = experts(h, chosen, shares)
    assert (in_tiles(experts, h, chosen, shares) - expected).abs().max() <= rounding(expected)
    adapt(causal, name="small")
    assert torch.equal(experts(h, chosen, shares), in_tiles(experts, h, chosen, shares))


def test_of_equal_scores_the_lower_place_is_chosen() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]]).repeat(50, 20)
    values, places = choose(scores, 41)
    assert values[7].tolist() == [3.0] * 40 + [2.0]
    assert places[7].tolist() == [*sorted([*range(1, 120, 6), *range(3, 120, 6)]), 2]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "MiniMaxM2ForCausalLM", "GptOssForCausalLM"])
def test_routers_of_transformers_compute_in_float32_and_prefer_the_lower_number(name: str) -> None:
    count = {"num_experts": 8} if name.startswith("Qwen") else {"num_local_experts": 8}
    causal = build(name, num_experts_per_tok=2, head_dim=8, **count).to(torch.bfloat16).eval()
    router = next(module for module in causal.modules() if type(module).__name__.endswith("Router"))
    for parameter in router.parameters():
        parameter.data[:] = parameter.data[:1].clone()  # all experts are equal
    seen: list[torch.Tensor] = []
    arguments = [positions("bfloat16").flatten(0, 1), *([torch.zeros(8)] if name.startswith("MiniMax") else [])]
    with even_routers(list(layers_of(causal)), seen.append):
        logits, _, chosen = router(*arguments)
    assert logits.dtype == torch.float32
    assert (chosen.sort(dim=-1).values == torch.tensor([0, 1])).all()
    assert seen[0].tolist() == [0.0] * 3 * SEQ_LEN  # how far the chosen ones are above the others
    assert router(*arguments)[0].dtype == torch.bfloat16  # as it was


def test_a_router_that_fails_is_left_as_it_was() -> None:
    causal = build("Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2).to(torch.bfloat16)
    router = causal.model.layers[0].mlp.gate
    with pytest.raises(RuntimeError), even_routers(list(layers_of(causal))):
        router(torch.ones(1, 31))  # another size
    assert router.weight.dtype == torch.bfloat16
    assert router(torch.ones(1, 2, 32, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "capability", "version", "expected"),
    [
        ("bfloat16", (9, 0), "2.10.1", False),
        ("bfloat16", (9, 0), "2.13.0+cu130", True),
        ("bfloat16", (10, 3), "2.13.0+cu130", True),
        ("bfloat16", (9, 0), "2.6.0", False),
        ("bfloat16", (8, 0), "2.13.0+cu130", False),
        ("bfloat16", (12, 0), "2.13.0+cu130", False),
        ("float16", (9, 0), "2.13.0+cu130", False),
        ("float32", (10, 0), "2.13.0+cu130", False),
    ],
)
def test_products_are_grouped_where_that_waits_for_nothing(
    dtype: str, capability: tuple[int, int], version: str, *, expected: bool
) -> None:
    assert are_products_grouped(getattr(torch, dtype), capability, version) == expected


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": 24}),  # an expert for all positions
        ("Glm4MoeForCausalLM", {"n_routed_experts": 4, "n_shared_experts": 1}),  # shares by sigmoid, and groups
        ("GptOssForCausalLM", {"head_dim": 8, "num_local_experts": 4}),  # experts with biases
        ("OlmoeForCausalLM", {"num_experts": 4}),  # norms of all heads at once
    ],
)
def test_mixtures_of_another_form_run_by_their_own_layers(name: str, config: dict[str, Any]) -> None:
    common = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 0}
    model = adapt(build(name, **common, **config), name="other")
    assert model.decoder.kind == "layers"
    assert not can_mix(model.by_layers.layers[-1].mlp)


def test_on_the_cpu_rows_of_any_size_are_multiplied() -> None:
    odd = qwen3_moe(shares_sum_to_one=True, moe_intermediate_size=21).build()
    assert can_mix(odd.model.layers[0].mlp)
    assert adapt(odd, name="odd").decoder.kind == "flat"
