"""Scheme `poc4`: the engine against the plain implementation and its vectors, and what a vector does not depend on."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import torch

from pocd.compute import segments
from pocd.compute.engine import BlockRun, Pending, block_run
from pocd.compute.model import Model, adapt, load_model
from pocd.compute.transforms import join_of
from pocd.protocol.errors import NonFiniteError
from pocd.protocol.names import VECTOR_TOLERANCE
from pocd.protocol.schemes import SCHEMES, VECTOR_SIZE
from pocd.protocol.vectors import decode_vectors, encode_vectors
from tests.reference import plain, plain_families
from tests.support import vector_models

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

VECTORS: dict[str, Any] = orjson.loads((Path(__file__).parent.parent / "data" / "poc4.json").read_bytes())
BUNDLED = ("bundled:tiny-qwen3", "bundled:tiny-llama")
ROUNDING = 1e-5  # of a number in float32, whatever the kernels: docs/protocol.md, section 3.2


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
) -> NDArray[np.float32]:
    with block_run(model, SCHEMES["poc4"], block_hash=block, public_key=key, seq_len=seq_len) as run:
        return run.values(nonces, batch_size=batch_size).numpy()


def plainly(model: Model, nonces: Sequence[int], seq_len: int) -> NDArray[np.float64]:
    decoder = plain_families.bundled(model.name)
    return np.array(
        [
            plain.vector(decoder, block_hash="block_alpha", public_key="node_A", nonce=nonce, seq_len=seq_len)
            for nonce in nonces
        ]
    )


def same(expected: NDArray[Any], rounding: float = ROUNDING) -> Any:  # noqa: ANN401 - pytest gives it no type
    return pytest.approx(expected, abs=rounding, rel=0)


@pytest.mark.parametrize("entry", VECTORS["vectors"], ids=lambda entry: entry["name"])
def test_engine_and_plain_implementation_give_the_vectors(entry: dict[str, Any]) -> None:
    causal, values = vector_models.build(entry), entry["values"]
    nonces = [value["nonce"] for value in values]
    block, key, length = values[0]["block_hash"], values[0]["public_key"], entry["seq_len"]
    found = compute(adapt(causal, name="formula"), nonces, block=block, key=key, seq_len=length)
    expected = np.array([value["vector"] for value in values])
    assert found == same(expected)
    sent = np.concatenate([decode_vectors(value["vector_b64"]) for value in values])
    assert np.array_equal(sent, expected.astype(np.float16))
    assert decode_vectors(encode_vectors(found)) == pytest.approx(
        sent, abs=ROUNDING, rel=2**-10
    )  # a last bit of float16
    decoder = vector_models.plainly(entry, causal)
    again = plain.vector(decoder, block_hash=block, public_key=key, nonce=7, seq_len=length)
    assert again == same(expected[nonces.index(7)], 5 * plain.DISTANCE_ROUNDING)  # numbers up to 4, distances up to 2


@pytest.mark.parametrize("seq_len", [1, 2, 31])
def test_trained_models_agree_with_the_plain_implementation(bundled: Model, seq_len: int) -> None:
    nonces = [0, 1, 2**63 - 1]
    assert compute(bundled, nonces, seq_len=seq_len) == same(plainly(bundled, nonces, seq_len))


def test_both_ways_through_a_model_agree(bundled: Model) -> None:
    assert bundled.decoder.kind == "flat"
    by_layers = replace(bundled, decoder=bundled.by_layers)
    assert compute(by_layers, range(8)) == same(compute(bundled, range(8)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_near_float32(bundled: Model, dtype: str) -> None:
    half = load_model(bundled.name, dtype=dtype, device="cpu")
    found, exact = compute(half, range(8)), compute(bundled, range(8))
    assert found == same(exact, VECTOR_TOLERANCE[dtype])
    assert (found != exact).any()


def test_states_are_read_in_parts_with_the_same_result(bundled: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute(bundled, range(9), batch_size=9)
    monkeypatch.setattr(segments, "STATES_CHUNK", 2 * 24 * bundled.hidden_size)
    assert compute(bundled, range(9), batch_size=9) == same(whole)


def test_a_vector_depends_on_block_key_and_nonce(bundled: Model) -> None:
    found = {
        tuple(compute(bundled, [nonce], block=block, key=key)[0].tolist())
        for block in ("a", "b")
        for key in ("a", "b")
        for nonce in (0, 1)
    }
    assert len(found) == 8


def test_its_numbers_are_about_one_whatever_the_length(bundled: Model) -> None:
    for seq_len in (4, 64):
        found = compute(bundled, range(32), batch_size=32, seq_len=seq_len)
        assert found.shape == (32, VECTOR_SIZE)
        assert 0.7 < found.std() < 1.4


@torch.inference_mode()
def test_every_position_counts(bundled: Model) -> None:
    """A changed input at any position changes the vector, the first and the last alike."""
    with block_run(bundled, SCHEMES["poc4"], block_hash="a", public_key="b", seq_len=8) as run:
        inputs = run.inputs([0])
        whole = output(run, inputs)
        for position in range(8):
            other = inputs.clone()
            other[:, position] = -other[:, position]
            assert torch.linalg.vector_norm(output(run, other) - whole) > 0.01  # rounding: 1e-5


def output(run: BlockRun, inputs: torch.Tensor) -> torch.Tensor:
    join = join_of(run.scheme.layer_step, run.model.layers)
    return run.measure(run.model.by_layers(inputs, join, run.vectors, all_positions=True), [0])


def test_a_model_that_says_nothing_has_no_vectors() -> None:
    model = load_model(BUNDLED[1], dtype="float32", device="cpu")
    model.causal.model.norm.weight.zero_()
    with pytest.raises(NonFiniteError, match="first in what follows it; 4 nonces, the first is 0"):
        compute(model, range(4))


def test_one_nonce_without_a_vector_does_not_keep_the_others_from_counting(bundled: Model) -> None:
    """Where that is asked for; and where no nonce has one, the fault is not the nonces'."""
    with block_run(bundled, SCHEMES["poc4"], block_hash="a", public_key="b", seq_len=8) as run:
        values = run.start(range(3), batch_size=3).values().clone()
        values[1, 5] = torch.nan
        some, none = Pending(run, [0, 1, 2], values, None), Pending(run, [1], values[1:2], None)
        assert some.values(gaps=True)[[0, 2]].isfinite().all()
        for refused in (some.values, partial(none.values, gaps=True)):
            with pytest.raises(NonFiniteError, match="but not when it ran again"):
                refused()


# As they travel.


def test_vectors_travel_as_float16_little_endian() -> None:
    numbers = [1.0, -2.0, 0.5, 0.1, *[0.0] * 7, 65504.0]
    data = b64decode(encode_vectors(numbers))
    assert data.hex() == "003c00c00038662e" + "0000" * 7 + "ff7b"
    assert decode_vectors(encode_vectors([numbers, numbers])).shape == (2, VECTOR_SIZE)


@pytest.mark.parametrize("text", ["AAAA", "not base64!", "A" * 33])
def test_what_is_no_vector_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"whole number of vectors|base64|padding"):
        decode_vectors(text)
