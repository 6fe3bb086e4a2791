"""Branch and residual at the edges of layers, and the last position carried alone; more in test_families.py."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel

from pocd.compute.layers import LayerDecoder
from pocd.compute.model import Model, adapt, load_model
from pocd.compute.random import normal
from pocd.compute.transforms import join_of


@pytest.fixture(scope="module", params=["bundled:tiny-qwen3", "bundled:tiny-llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Model:
    if request.param == "gpt2":
        torch.manual_seed(3)
        return adapt(GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=32, n_layer=3, n_head=4)), name="gpt2")
    return load_model(request.param, dtype="float32", device="cpu")


def inputs(model: Model, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [2, length, H] and no layer vectors."""
    embeddings = normal(torch.tensor([1, 2], dtype=torch.int32), length * model.hidden_size)
    return embeddings.view(2, length, model.hidden_size), torch.zeros(model.layers, model.hidden_size)


def both(model: Model) -> list[Any]:
    return [model.by_layers, *([model.decoder] if model.decoder is not model.by_layers else [])]


@torch.inference_mode()
def test_without_transforms_the_result_is_the_bare_models(model: Model) -> None:
    embeddings, vectors = inputs(model)
    bare = model.by_layers.decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1]
    for decoder in both(model):
        assert torch.allclose(decoder(embeddings, join_of("none", 1), vectors), bare, atol=2e-5)


@torch.inference_mode()
def test_a_single_position_is_a_sequence_too(model: Model) -> None:
    embeddings, vectors = inputs(model, 1)
    bare = model.by_layers.decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1]
    for decoder in both(model):
        assert torch.allclose(decoder(embeddings, join_of("none", 1), vectors), bare, atol=2e-5)


class Products(TorchFunctionMode):
    """Notes how many positions meet each matrix, by its place in memory; the last time counts."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: dict[int, int] = {}

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - torch's own signature
        types: Any,  # noqa: ANN401 - torch's own signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own signature
        if func is functional.linear:
            self.positions[args[1].data_ptr()] = args[0].shape[1]
        elif func is torch.addmm:  # GPT-2's products, of two sequences
            self.positions[args[2].data_ptr()] = args[1].shape[0] // 2
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_after_the_last_layers_keys_and_values_only_the_last_position_is_carried(model: Model) -> None:
    embeddings, vectors = inputs(model)
    last, earlier = model.by_layers.layers[-1], model.by_layers.layers[0]
    is_gpt2 = model.name == "gpt2"
    watched = {
        "output projection": last.get_submodule("attn.c_proj" if is_gpt2 else "self_attn.o_proj"),
        "MLP": last.get_submodule("mlp.c_fc" if is_gpt2 else "mlp.gate_proj"),
        "earlier MLP": earlier.get_submodule("mlp.c_fc" if is_gpt2 else "mlp.gate_proj"),
        "keys": last.get_submodule("attn.c_attn" if is_gpt2 else "self_attn.k_proj"),
    }
    for decoder in both(model):
        with Products() as products:
            decoder(embeddings, join_of("none", 1), vectors)
        found = {name: products.positions[cast("Any", module).weight.data_ptr()] for name, module in watched.items()}
        # GPT-2 makes keys, values and queries in one product, which then runs once more for the last query.
        keys = 1 if is_gpt2 else 9 if decoder is model.decoder else 1
        assert found == {"output projection": 1, "MLP": 1, "earlier MLP": 9, "keys": keys}


@torch.inference_mode()
def test_hooks_are_gone_after_a_failure(model: Model) -> None:
    embeddings, vectors = inputs(model)

    def fail(*_: torch.Tensor) -> torch.Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        model.by_layers(embeddings, fail, vectors)
    for module in model.causal.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@torch.inference_mode()
def test_an_observer_sees_every_half_in_order(model: Model) -> None:
    embeddings, vectors = inputs(model)
    seen: list[tuple[str, int]] = []
    model.by_layers(
        embeddings, join_of("none", 1), vectors, observe=lambda name, values: seen.append((name[:7], values.shape[1]))
    )
    lengths = [9] * (model.layers - 1) + [1]
    assert seen == [(f"layer {i}", length) for i, length in enumerate(lengths) for _ in range(2)]


def test_a_decoder_that_is_run_by_its_layers_names_its_kind(model: Model) -> None:
    assert isinstance(model.by_layers, LayerDecoder)
    assert isinstance(model.by_layers.norm, nn.Module)
    assert model.decoder.kind == ("layers" if model.name == "gpt2" else "flat")
