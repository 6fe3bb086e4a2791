from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import plain
import pytest
import torch
import vector_models

from pocd.compute.engine import block_run
from pocd.compute.errors import InputError, NonFiniteError
from pocd.compute.model import Model, adapt, load_model
from pocd.compute.schemes import SCHEMES
from pocd.compute.transforms import layer_transforms, normalise_and_reflect, reflect, reflect_in_order

POC2 = SCHEMES["poc2"]
VECTORS: dict[str, Any] = orjson.loads((Path(__file__).parent / "data" / "poc2.json").read_bytes())
BUNDLED = ("bundled:tiny-qwen3", "bundled:tiny-llama")


@pytest.fixture(scope="module", params=BUNDLED)
def bundled(request: pytest.FixtureRequest) -> Model:
    return load_model(request.param, dtype="float32", device="cpu")


def compute(model: Model, nonces: list[int], *, batch_size: int, block: str = "block_alpha") -> list[float]:
    with block_run(model, POC2, block_hash=block, public_key="node_A", seq_len=24) as run:
        return run.distances(nonces, batch_size=batch_size)


@pytest.mark.parametrize("entry", VECTORS["distances"], ids=lambda entry: entry["name"])
def test_distances_agree_with_every_vector(entry: dict[str, Any]) -> None:
    model = adapt(vector_models.build(entry), name=entry["name"])
    groups: dict[tuple[str, str], dict[int, float]] = {}
    for value in entry["values"]:
        groups.setdefault((value["block_hash"], value["public_key"]), {})[value["nonce"]] = value["distance"]
    for (block_hash, public_key), expected in groups.items():
        run = block_run(model, POC2, block_hash=block_hash, public_key=public_key, seq_len=entry["seq_len"])
        with run as ready:
            found = ready.distances(list(expected), batch_size=4)
        assert found == pytest.approx(list(expected.values()), abs=2e-5)


def plain_decoder(name: str) -> plain.Decoder:
    """The bundled model `name` for the plain implementation: the same file, read by another reader."""
    from safetensors.torch import load_file

    folder = Path(__file__).parent.parent / "pocd" / "models" / name.removeprefix("bundled:")
    config = orjson.loads((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    return plain.Decoder(
        weights={key: tensor.double().numpy() for key, tensor in tensors.items()},
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        eps=config["rms_norm_eps"],
        theta=config["rope_parameters"]["rope_theta"],
    )


def test_trained_models_agree_with_the_plain_implementation(bundled: Model) -> None:
    decoder = plain_decoder(bundled.name)
    nonces = [0, 1, 7, 2**63 - 1]
    expected = [
        plain.distance(decoder, block_hash="block_alpha", public_key="node_A", nonce=nonce, seq_len=24)
        for nonce in nonces
    ]
    assert compute(bundled, nonces, batch_size=4) == pytest.approx(expected, abs=2e-5)


def test_a_distance_does_not_depend_on_its_batch(bundled: Model) -> None:
    alone = [compute(bundled, [nonce], batch_size=8)[0] for nonce in range(8)]
    assert compute(bundled, list(range(8)), batch_size=8) == alone
    assert compute(bundled, list(reversed(range(8))), batch_size=8) == alone[::-1]
    # Another batch shape may take other kernels; float32 rounding is all that may differ.
    assert compute(bundled, list(range(8)), batch_size=3) == pytest.approx(alone, abs=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.01), ("float16", 0.002)])
def test_half_precision_stays_near_float32(dtype: str, tolerance: float) -> None:
    exact = compute(load_model(BUNDLED[0], dtype="float32", device="cpu"), list(range(8)), batch_size=8)
    rough = compute(load_model(BUNDLED[0], dtype=dtype, device="cpu"), list(range(8)), batch_size=8)
    assert rough == pytest.approx(exact, abs=tolerance)
    assert rough != exact


def bare_outputs(model: Model) -> torch.Tensor:
    inputs = torch.linspace(-1, 1, 2 * 5 * model.hidden_size).view(2, 5, model.hidden_size)
    with torch.inference_mode():
        states: torch.Tensor = model.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state
    return states


def test_transforms_are_absent_before_and_after_a_round_and_present_in_it(bundled: Model) -> None:
    before = bare_outputs(bundled)
    with block_run(bundled, POC2, block_hash="block_alpha", public_key="node_A", seq_len=8):
        assert not torch.allclose(bare_outputs(bundled), before, atol=1e-2)
    assert torch.equal(bare_outputs(bundled), before)


def test_transforms_are_absent_after_a_round_that_failed(bundled: Model) -> None:
    before = bare_outputs(bundled)
    vectors = torch.zeros(len(bundled.layers), bundled.hidden_size)
    with pytest.raises(KeyError), layer_transforms(bundled, vectors):
        raise KeyError
    assert torch.equal(bare_outputs(bundled), before)
    for module in bundled.decoder.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_branch_and_residual_are_transformed_separately() -> None:
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    v = torch.nn.functional.normalize(torch.randn(8), dim=0)
    together = normalise_and_reflect(x + y, v)
    assert not torch.allclose(normalise_and_reflect(x, v) + normalise_and_reflect(y, v), together, atol=1e-2)


def test_reflect_is_a_reflection() -> None:
    x, v = torch.randn(5, 16), torch.nn.functional.normalize(torch.randn(16), dim=0)
    assert torch.allclose(reflect(reflect(x, v), v), x, atol=1e-5)
    assert torch.allclose(reflect(v, v), -v, atol=1e-6)


def test_reflections_are_applied_in_order() -> None:
    h, vectors = torch.randn(2, 8), torch.nn.functional.normalize(torch.randn(2, 3, 8), dim=-1)
    expected = h
    for r in range(3):
        expected = reflect(expected, vectors[:, r])
    assert torch.equal(reflect_in_order(h, vectors), expected)
    assert not torch.allclose(reflect_in_order(h, vectors.flip(1)), expected, atol=1e-3)


def test_large_float16_activations_do_not_overflow() -> None:
    x = torch.full((1, 128), 60_000.0, dtype=torch.float16)
    v = torch.nn.functional.normalize(torch.ones(128), dim=0).half()
    found = normalise_and_reflect(x, v)
    assert found.dtype == torch.float16
    assert np.allclose(found.float().numpy(), -1 / np.sqrt(128), atol=1e-3)


@pytest.mark.parametrize("nonce", [-1, 2**63])
def test_nonces_out_of_range_are_refused(bundled: Model, nonce: int) -> None:
    with pytest.raises(InputError, match=str(nonce)):
        compute(bundled, [nonce], batch_size=1)


@pytest.mark.parametrize("seq_len", [0, 4097])
def test_sequence_lengths_beyond_the_model_are_refused(bundled: Model, seq_len: int) -> None:
    run = block_run(bundled, POC2, block_hash="b", public_key="k", seq_len=seq_len)
    with pytest.raises(InputError, match="outside 1 to 4096"), run:
        pass


def test_a_broken_checkpoint_gives_an_error_and_no_distance() -> None:
    model = load_model(BUNDLED[1], dtype="float32", device="cpu")
    next(model.decoder.parameters()).data.fill_(0)  # embeddings are not used
    assert np.isfinite(compute(model, [0], batch_size=1)).all()
    model.layers[2].mlp.get_submodule("down_proj").get_parameter("weight").data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"bundled:tiny-llama.*float32.*poc2"):
        compute(model, [0], batch_size=1)
