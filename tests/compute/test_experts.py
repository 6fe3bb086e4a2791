"""Mixtures of experts, against transformers' own routers and experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN

from pocd.compute.engine import block_run
from pocd.compute.experts import are_products_grouped, can_mix, mix, mixture_of, route
from pocd.compute.model import Model, adapt
from pocd.protocol.names import DTYPES
from pocd.protocol.schemes import SCHEMES
from tests.support.family_models import FAMILIES, SEQ_LEN, layers_of, qwen3_moe
from tests.support.other_models import build

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
    _, shares, chosen = block.gate(h)
    found_chosen, found_shares = route(h.flatten(0, 1), mixture)
    assert not (found_chosen == 3).any()
    assert torch.equal(found_chosen, chosen)
    assert torch.equal(found_shares, shares)
    assert found_shares.dtype == shares.dtype
    expected, found = block(h), mix(h, mixture, SILU)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MIXTURES)
def test_neighbours_change_a_mixtures_result_by_rounding_only(family: str, dtype: str) -> None:
    """They change how many rows an expert has, so a product may take another kernel."""
    block = block_of(family, dtype)
    h, mixture = positions(dtype, rows=7), mixture_of(block)
    together = mix(h, mixture, SILU)
    for place in (0, 3, 6):
        others = torch.roll(h, 1, dims=-1)
        others[place] = h[place]
        for rows, at in ((others, place), (h[place : place + 1], 0)):
            found = mix(rows, mixture, SILU)[at]
            assert (found.float() - together[place].float()).abs().max() <= rounding(together)


@pytest.mark.parametrize(
    ("dtype", "capability", "version", "expected"),
    [
        ("float32", None, "2.13.0+cpu", True),
        ("float16", None, "2.11.0", True),
        ("bfloat16", None, "2.10.1", False),
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
    dtype: str, capability: tuple[int, int] | None, version: str, *, expected: bool
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


def test_rows_that_torch_does_not_group_run_by_their_own_layers() -> None:
    assert can_mix(block_of("qwen3 moe"))
    odd = qwen3_moe(shares_sum_to_one=True, moe_intermediate_size=22).build()
    assert not can_mix(odd.model.layers[0].mlp)
