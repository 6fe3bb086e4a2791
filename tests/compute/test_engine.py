from __future__ import annotations

import functools
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import orjson
import pytest
import torch
from torch.nn import functional

from pocd.compute import stages
from pocd.compute.engine import block_run
from pocd.compute.model import Model, adapt, load_model
from pocd.compute.random import normal, seeds_tensor
from pocd.compute.transforms import join_of, reflect, reflect_in_order
from pocd.protocol.errors import InputError, NonFiniteError, OutOfMemoryError
from pocd.protocol.names import DTYPES, default_tolerance
from pocd.protocol.schemes import SCHEMES, LayerStep
from tests.reference import plain, plain_families
from tests.support import vector_models

if TYPE_CHECKING:
    from collections.abc import Iterator

POC2 = SCHEMES["poc2"]
VECTORS: dict[str, Any] = orjson.loads((Path(__file__).parent.parent / "data" / "poc2.json").read_bytes())
ROUNDING = 2e-5  # of distances in float32, whatever the kernels: docs/protocol.md, section 3
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
        assert found == pytest.approx(list(expected.values()), abs=ROUNDING)


def test_trained_models_agree_with_the_plain_implementation(bundled: Model) -> None:
    decoder = plain_families.bundled(bundled.name)
    nonces = [0, 1, 7, 2**63 - 1]
    expected = [
        plain.distance(decoder, block_hash="block_alpha", public_key="node_A", nonce=nonce, seq_len=24)
        for nonce in nonces
    ]
    assert compute(bundled, nonces, batch_size=4) == pytest.approx(expected, abs=ROUNDING)


@functools.cache
def loaded(name: str, dtype: str) -> Model:
    return load_model(name, dtype=dtype, device="cpu")


@functools.cache
@torch.inference_mode()
def products_round_alike(name: str, dtype: str, rows: int, seq_len: int) -> bool:
    """Whether this machine's libraries multiply equal sequences to equal bits at every place; none promises it."""
    model = loaded(name, dtype)
    head = torch.empty(8192, model.hidden_size).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    for weight in [*(each for each in model.causal.parameters() if each.ndim == 2), head]:
        for length in (seq_len, 1):
            sequence = normal(seeds_tensor(["a sequence"])[0], length * weight.shape[1]).view(length, -1)
            found = functional.linear(sequence.to(weight.dtype).repeat(rows, 1, 1), weight)
            if not torch.equal(found, found[:1].expand_as(found)):
                return False
    return True


@pytest.fixture
def every_core() -> Iterator[None]:
    """Threads as a worker has them that is alone on its host."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, len(os.sched_getaffinity(0))))
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("every_core")
@pytest.mark.parametrize("way", ["flat", "layers"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scheme", "batch_size", "rows", "seq_len"),
    [("poc2", 2, 4, 3), ("poc3", 2, 2, 7), ("poc4", 2, 4, 1)]
    + [(scheme, *shape) for scheme in ("poc2", "poc3", "poc4") for shape in ((1, 1, 24), (7, 8, 24), (13, 13, 25))],
)
def test_a_result_does_not_depend_on_its_batch(
    scheme: str, dtype: str, way: str, batch_size: int, rows: int, seq_len: int
) -> None:
    """Neighbours change no bit, nor does another place if bare products of as many rows, padded, keep them."""
    name = BUNDLED[batch_size % 2]
    model = loaded(name, dtype)
    model = replace(model, decoder=model.by_layers) if way == "layers" else model
    tolerance = default_tolerance(dtype, SCHEMES[scheme], model.hidden_size)
    rounding = 0.0 if products_round_alike(name, dtype, rows, seq_len) else tolerance
    nonces = list(range(batch_size))
    with block_run(model, SCHEMES[scheme], block_hash="block_alpha", public_key="node_A", seq_len=seq_len) as run:
        together = run.values(nonces, batch_size=batch_size).numpy()
        found = run.values(nonces[::-1], batch_size=batch_size).numpy()
        assert found == pytest.approx(together[::-1], abs=rounding, rel=0)
        for place in {0, batch_size // 2, batch_size - 1}:
            others = list(range(100, 100 + batch_size))
            others[place] = place
            assert np.array_equal(run.values(others, batch_size=batch_size)[place].numpy(), together[place])
            alone = run.values([place], batch_size=batch_size)[0].numpy()
            assert alone == pytest.approx(together[place], abs=rounding, rel=0)


def test_another_batch_size_changes_a_distance_by_rounding_only(bundled: Model) -> None:
    # It may take other kernels.
    eight = compute(bundled, list(range(8)), batch_size=8)
    assert compute(bundled, list(range(8)), batch_size=3) == pytest.approx(eight, abs=ROUNDING)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.01), ("float16", 0.002)])
def test_half_precision_stays_near_float32(dtype: str, tolerance: float) -> None:
    exact = compute(load_model(BUNDLED[0], dtype="float32", device="cpu"), list(range(8)), batch_size=8)
    rough = compute(load_model(BUNDLED[0], dtype=dtype, device="cpu"), list(range(8)), batch_size=8)
    assert rough == pytest.approx(exact, abs=tolerance)
    assert rough != exact


def test_both_ways_through_a_model_agree(bundled: Model) -> None:
    assert bundled.decoder.kind == "flat"
    by_layers = replace(bundled, decoder=bundled.by_layers)
    nonces = list(range(8))
    found = compute(by_layers, nonces, batch_size=8)
    assert found == pytest.approx(compute(bundled, nonces, batch_size=8), abs=ROUNDING)


def drawn(*shape: int) -> torch.Tensor:
    return normal(seeds_tensor([f"any {shape}"])[0], math.prod(shape)).view(shape)


@pytest.mark.parametrize("step", get_args(LayerStep))
def test_a_layers_output_is_the_sum_of_its_transformed_halves(step: LayerStep) -> None:
    branch, residual = drawn(3, 8), 5 * drawn(3, 8)
    v = functional.normalize(drawn(8), dim=0)

    def transform(x: torch.Tensor) -> torch.Tensor:
        if step == "none":
            return x
        return reflect(x / (x.norm(dim=-1, keepdim=True) + 1e-8) if "normalise" in step else x, v)

    weight = 0.5 if "weigh" in step else 1.0
    expected = weight * transform(branch) + transform(residual)
    assert torch.allclose(join_of(step, 4)(branch, residual, v), expected, atol=1e-4)  # of numbers up to 15: 1e-6 each
    together = transform(branch + residual)
    assert torch.allclose(expected, together, atol=1e-4) == ("normalise" not in step)


def test_reflect_is_a_reflection() -> None:
    x, v = drawn(5, 16), functional.normalize(drawn(16), dim=0)
    assert torch.allclose(reflect(reflect(x, v), v), x, atol=1e-5)
    assert torch.allclose(reflect(v, v), -v, atol=1e-5)


def test_reflections_are_applied_in_order() -> None:
    h, vectors = drawn(2, 8), functional.normalize(drawn(2, 3, 8), dim=-1)
    expected = h
    for r in range(3):
        expected = reflect(expected, vectors[:, r])
    assert torch.equal(reflect_in_order(h, vectors), expected)
    assert not torch.allclose(reflect_in_order(h, vectors.flip(1)), expected, atol=1e-3)


def test_large_float16_activations_do_not_overflow() -> None:
    x = torch.full((1, 128), 60_000.0, dtype=torch.float16)
    v = functional.normalize(torch.ones(128), dim=0).half()
    found = join_of("normalise and reflect", 4)(x, torch.zeros_like(x), v)
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


def test_repeated_nonces_are_refused(bundled: Model) -> None:
    with pytest.raises(InputError, match="nonce 7 is repeated"):
        compute(bundled, [7, 3, 7], batch_size=1)


def test_a_large_head_is_read_in_parts_with_the_same_result(bundled: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute(bundled, [1, 2], batch_size=2)
    monkeypatch.setattr(stages, "HEAD_CHUNK", 1000 * bundled.hidden_size)
    assert compute(bundled, [1, 2], batch_size=2) == pytest.approx(whole, abs=ROUNDING)


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ("layers.2.mlp.down_proj", r"layer 2, in its branch \(the MLP\)"),
        ("layers.2.self_attn.o_proj", r"layer 2, in its residual \(the stream after attention\)"),
        ("layers.3.self_attn.k_proj", r"layer 3, in its residual"),
        ("norm", "the final norm"),
    ],
)
def test_nan_is_an_error_that_names_its_place_and_no_distance(part: str, place: str) -> None:
    model = load_model(BUNDLED[1], dtype="float32", device="cpu")
    model.causal.model.embed_tokens.weight.fill_(torch.nan)  # is not used
    assert np.isfinite(compute(model, [0], batch_size=1)).all()
    model.causal.model.get_submodule(part).weight.view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"bundled:tiny-llama.*float32.*poc2.*first in {place}.*2 nonces.* is 5"):
        compute(model, [5, 6], batch_size=4)


def test_infinity_is_found_too() -> None:
    model = load_model(BUNDLED[1], dtype="float16", device="cpu")
    model.causal.model.layers[1].mlp.up_proj.weight.mul_(60_000)
    with pytest.raises(NonFiniteError, match=r"float16.*first in layer 1, in its branch"):
        compute(model, [0], batch_size=1)


def test_a_batch_beyond_the_memory_is_an_error_of_its_own(bundled: Model) -> None:
    with block_run(bundled, POC2, block_hash="b", public_key="k", seq_len=4096) as run:
        with pytest.raises(OutOfMemoryError, match="a batch of 100000 × 4096 positions does not fit"):
            run.distances([0], batch_size=100_000)
        assert len(run.distances([0], batch_size=1)) == 1
