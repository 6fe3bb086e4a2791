"""Scheme `poc3`: the engine against the plain implementation and its vectors, and distances against their theory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import torch
from scipy import stats

from pocd.compute import segments
from pocd.compute.engine import BlockRun, block_run
from pocd.compute.model import Model, adapt, load_model
from pocd.compute.random import seeds_tensor, signs
from pocd.compute.transforms import join_of
from pocd.protocol.errors import InputError, NonFiniteError
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.theory import expected_valid_rate, r_target_for
from tests.reference import plain, plain_families
from tests.support import vector_models

if TYPE_CHECKING:
    from collections.abc import Sequence

VECTORS: dict[str, Any] = orjson.loads((Path(__file__).parent.parent / "data" / "poc3.json").read_bytes())
BUNDLED = ("bundled:tiny-qwen3", "bundled:tiny-llama")
HIDDEN_SIZE = 128  # of both
ROUNDING = 2e-5  # of distances in float32, whatever the kernels: docs/protocol.md, section 3.1
BLOCKS = [f"block_{i}" for i in range(8)]


@pytest.fixture(scope="module", params=BUNDLED)
def bundled(request: pytest.FixtureRequest) -> Model:
    return load_model(request.param, dtype="float32", device="cpu")


def compute(
    model: Model,
    nonces: Sequence[int],
    *,
    batch_size: int = 4,
    seq_len: int = 24,
    block: str = "block_alpha",
    key: str = "node_A",
    scheme: str = "poc3",
) -> list[float]:
    with block_run(model, SCHEMES[scheme], block_hash=block, public_key=key, seq_len=seq_len) as run:
        return run.distances(nonces, batch_size=batch_size)


def plainly(model: Model, nonces: Sequence[int], seq_len: int) -> list[float]:
    decoder = plain_families.bundled(model.name)
    return [
        plain.distance(
            decoder, block_hash="block_alpha", public_key="node_A", nonce=nonce, seq_len=seq_len, scheme="poc3"
        )
        for nonce in nonces
    ]


# What is computed.


@pytest.mark.parametrize("entry", VECTORS["distances"], ids=lambda entry: entry["name"])
def test_engine_and_plain_implementation_give_the_vectors(entry: dict[str, Any]) -> None:
    causal = vector_models.build(entry)
    expected = {value["nonce"]: value["distance"] for value in entry["values"]}
    first, length = entry["values"][0], entry["seq_len"]
    block, key = first["block_hash"], first["public_key"]
    found = compute(adapt(causal, name="formula"), list(expected), block=block, key=key, seq_len=length)
    assert found == pytest.approx(list(expected.values()), abs=ROUNDING)
    decoder = vector_models.plainly(entry, causal)
    again = plain.distance(decoder, block_hash=block, public_key=key, nonce=7, seq_len=length, scheme="poc3")
    assert again == pytest.approx(expected[7], abs=plain.DISTANCE_ROUNDING)


@pytest.mark.parametrize("entry", VECTORS["standard"], ids=lambda entry: entry["name"])
def test_mean_and_deviation_are_those_of_the_vectors(entry: dict[str, Any]) -> None:
    (form,) = (form for form in VECTORS["distances"] if form["name"] == entry["name"])
    model = adapt(vector_models.build(form), name="formula")
    preparation = block_run(
        model, SCHEMES["poc3"], block_hash=entry["block_hash"], public_key="any", seq_len=entry["seq_len"]
    )
    with preparation as run:
        assert run.standard is not None
        mean = run.standard.mean
        assert mean.shape == (entry["seq_len"], model.hidden_size)
        assert mean[0, :4].tolist() == pytest.approx(entry["mean"]["first"], abs=1e-5)
        assert mean[-1, :4].tolist() == pytest.approx(entry["mean"]["last"], abs=1e-5)
        assert run.standard.deviation[:4].tolist() == pytest.approx(entry["deviation"], rel=1e-4)


@pytest.mark.parametrize("entry", VECTORS["signs"], ids=lambda entry: entry["text"])
def test_signs_are_exact(entry: dict[str, Any]) -> None:
    assert signs(seeds_tensor([entry["text"]]), entry["n"]).tolist() == [entry["signs"]]


@pytest.mark.parametrize("seq_len", [6, 7, 31])
def test_trained_models_agree_with_the_plain_implementation(bundled: Model, seq_len: int) -> None:
    """With segments of one position, and of unequal lengths."""
    nonces = [0, 1, 2**63 - 1]
    found = compute(bundled, nonces, seq_len=seq_len)
    assert found == pytest.approx(plainly(bundled, nonces, seq_len), abs=ROUNDING)


@pytest.mark.parametrize("seq_len", [1, 5])
def test_a_sequence_with_fewer_positions_than_segments_is_refused(bundled: Model, seq_len: int) -> None:
    with pytest.raises(InputError, match=rf"^seq_len {seq_len} is too short for scheme 'poc3': 6 or more$"):
        compute(bundled, [0], seq_len=seq_len)


def test_a_coordinate_that_never_changes_counts_for_nothing() -> None:
    """Its deviation is 0; without a least one all distances would be NaN."""
    model = load_model(BUNDLED[1], dtype="float32", device="cpu")
    before = compute(model, range(4))
    model.causal.model.norm.weight[3] = 0
    found = compute(model, range(4))
    assert np.isfinite(found).all()
    assert found != before


def test_a_model_that_says_nothing_has_no_distances() -> None:
    model = load_model(BUNDLED[1], dtype="float32", device="cpu")
    model.causal.model.norm.weight.zero_()
    with pytest.raises(NonFiniteError, match="first in the means of the block's samples"):
        compute(model, range(4))


# What it does not depend on; of its batch see test_engine.py.


def test_another_batch_size_changes_a_distance_by_rounding_only(bundled: Model) -> None:
    whole = compute(bundled, range(12), batch_size=12)
    for batch_size in (1, 5, 8):
        assert compute(bundled, range(12), batch_size=batch_size) == pytest.approx(whole, abs=ROUNDING)


def test_states_are_read_in_parts_with_the_same_result(bundled: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute(bundled, range(9), batch_size=9)
    monkeypatch.setattr(segments, "STATES_CHUNK", 2 * 24 * HIDDEN_SIZE)
    assert compute(bundled, range(9), batch_size=9) == pytest.approx(whole, abs=ROUNDING)


def test_both_ways_through_a_model_agree(bundled: Model) -> None:
    assert bundled.decoder.kind == "flat"
    by_layers = replace(bundled, decoder=bundled.by_layers)
    assert compute(by_layers, range(8)) == pytest.approx(compute(bundled, range(8)), abs=ROUNDING)


def test_a_distance_depends_on_block_key_and_nonce(bundled: Model) -> None:
    found = {
        compute(bundled, [nonce], block=block, key=key)[0]
        for block in ("a", "b")
        for key in ("a", "b")
        for nonce in (0, 1)
    }
    assert len(found) == 8


@torch.inference_mode()
def test_every_position_counts(bundled: Model) -> None:
    """A changed input at any position changes the output, the first and the last alike."""
    with block_run(bundled, SCHEMES["poc3"], block_hash="a", public_key="b", seq_len=8) as run:
        inputs = run.inputs([0])
        whole = output(run, inputs)
        for position in range(8):
            other = inputs.clone()
            other[:, position] = -other[:, position]
            assert torch.linalg.vector_norm(output(run, other) - whole) > 0.01  # rounding: 1e-6


def output(run: BlockRun, inputs: torch.Tensor) -> torch.Tensor:
    join = join_of(run.scheme.layer_step, run.model.layers)
    states = run.model.by_layers(inputs, join, run.vectors, all_positions=True)
    return run.hidden(run.readout(states, [0]), [0])


# What theory says of it.


def test_valid_rates_are_those_of_theory_in_every_block(bundled: Model) -> None:
    nonces = 500
    found = np.array([compute(bundled, range(nonces), batch_size=50, seq_len=8, block=block) for block in BLOCKS])
    r_target = r_target_for(0.1, HIDDEN_SIZE)
    valid = (found < r_target).sum(axis=1)
    assert even(valid, nonces) > 0.001
    assert stats.binomtest(int(valid.sum()), found.size, 0.1).pvalue > 0.001
    assert stats.kstest(found.ravel(), np.vectorize(lambda d: expected_valid_rate(d, HIDDEN_SIZE))).pvalue > 0.001


def test_the_same_statistics_find_the_uneven_blocks_of_poc2(bundled: Model) -> None:
    nonces = 300
    found = np.array(
        [compute(bundled, range(nonces), batch_size=50, seq_len=16, block=block, scheme="poc2") for block in BLOCKS[:5]]
    )
    assert even((found < np.quantile(found, 0.1)).sum(axis=1), nonces) < 1e-4


def even(valid: np.ndarray[Any, np.dtype[np.int64]], nonces: int) -> float:
    """The p-value of a chi-square test of equal rates."""
    return float(stats.chi2_contingency(np.array([valid, nonces - valid])).pvalue)


@pytest.mark.parametrize("length", [6, 7, 64])
def test_the_sums_of_compiled_code_are_those_of_the_eager_path(length: int) -> None:
    torch.manual_seed(0)
    states, signs = torch.randn(3, length, 16), torch.randint(0, 2, (3, length)) * 2.0 - 1
    inside = segments._segments(length, states.device)
    assert inside.sum(dim=0).tolist() == [1.0] * length
    found = segments._sum_fused(states, signs, segments._bounds(length))
    assert torch.allclose(found, segments._sum_in_chunks(states, signs, inside), rtol=0, atol=1e-5)
    whole = segments._sum_fused(states, signs, [0, length])[:, 0] * length**-0.5
    assert torch.allclose(whole, segments.signed_sum(states, signs), rtol=0, atol=1e-5)
