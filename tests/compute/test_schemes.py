"""Every scheme of docs/protocol.md section 4 against the plain implementations, through the engine and the command."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pytest
import torch

from pocd.compute.engine import block_run
from pocd.compute.model import Model, load_model
from pocd.protocol.schemes import DISTANCE_SCHEMES, SCHEMES
from pocd.protocol.vectors import decode_vectors
from tests.reference import plain, plain_families, plain_torch
from tests.support import vector_models
from tests.support.command_line import pocd_here
from tests.support.family_models import FAMILIES

BUNDLED = ("bundled:tiny-qwen3", "bundled:tiny-llama")
VECTORS: dict[str, Any] = orjson.loads((Path(__file__).parent.parent / "data" / "poc2.json").read_bytes())
NONCES = [0, 1, 2**63 - 1]  # of poc2; see `nonces_of`
SEQ_LEN = 24
TOLERANCE = 2e-5

Values = npt.NDArray[np.float64]


@pytest.fixture(scope="module", params=BUNDLED)
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(request.param, dtype="float32", device="cpu")


def nonces_of(scheme: str) -> list[int]:
    """The first nonces and the last one."""
    return [0, 1, SCHEMES[scheme].largest_nonce]


def engine(model: Model, scheme: str, *, block_hash: str = "ABC") -> Values:
    with block_run(model, SCHEMES[scheme], block_hash=block_hash, public_key="key", seq_len=SEQ_LEN) as run:
        return run.values(nonces_of(scheme), batch_size=4).numpy()


@functools.cache
def plain_results(name: str, scheme: str) -> Values:
    decoder = plain_families.bundled(name)
    return np.array(
        [
            plain.result(decoder, block_hash="ABC", public_key="key", nonce=nonce, seq_len=SEQ_LEN, scheme=scheme)
            for nonce in nonces_of(scheme)
        ]
    )


def test_the_registry_has_the_schemes_of_the_protocol() -> None:
    assert list(SCHEMES) == list(plain.SCHEMES)
    assert all(scheme.name == name for name, scheme in SCHEMES.items())


@pytest.mark.parametrize("scheme", plain.SCHEMES)
def test_results_agree_with_the_plain_ones(model: Model, scheme: str) -> None:
    assert engine(model, scheme) == pytest.approx(plain_results(model.name, scheme), abs=TOLERANCE)


def test_schemes_do_not_disturb_each_other(model: Model) -> None:
    """Weights drawn for one round are gone in the next, whatever ran before."""
    alone = {scheme: engine(load_model(model.name, dtype="float32", device="cpu"), scheme) for scheme in SCHEMES}
    for scheme in [*SCHEMES, *reversed(SCHEMES)]:
        engine(model, scheme, block_hash="another")
        assert np.array_equal(engine(model, scheme), alone[scheme]), scheme


def test_schemes_differ_but_for_the_length_before_the_head() -> None:
    """`end-norm` only scales what `trained` gives to its head, and a distance knows no scale."""
    found = {scheme: plain_results(BUNDLED[0], scheme)[1] for scheme in DISTANCE_SCHEMES}
    assert found.pop("end-norm") == pytest.approx(found["trained"], abs=1e-12)
    values = sorted(map(float, found.values()))
    assert min(after - before for before, after in itertools.pairwise(values)) > 10 * TOLERANCE


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_command_computes_every_scheme(scheme: str) -> None:
    options = {
        "model": BUNDLED[0],
        "scheme": scheme,
        "block-hash": "ABC",
        "public-key": "key",
        "nonces": ",".join(map(str, nonces_of(scheme))),
        "seq-len": SEQ_LEN,
        "batch-size": 4,
        "dtype": "float32",
        "device": "cpu",
    }
    ended = pocd_here("compute", "--json", *(f"--{key}={value}" for key, value in options.items()))
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = [orjson.loads(line) for line in ended.stdout.splitlines()]
    assert [line["nonce"] for line in lines] == nonces_of(scheme)
    expected = plain_results(BUNDLED[0], scheme)
    if SCHEMES[scheme].output == "vector":
        found = np.concatenate([decode_vectors(line["vector_b64"]) for line in lines])
        assert found == pytest.approx(expected, abs=TOLERANCE, rel=2**-11)  # of float16
    else:
        assert [line["distance"] for line in lines] == pytest.approx(expected, abs=TOLERANCE)


# The implementation in plain torch, which knows poc2 alone.


@pytest.mark.parametrize("name", BUNDLED)
def test_plain_torch_agrees_with_plain_numpy(name: str) -> None:
    causal = load_model(name, dtype="float32", device="cpu").causal
    run = plain_torch.PlainRun(causal, "ABC", "key", SEQ_LEN)
    found = [run.distance(nonce) for nonce in NONCES]
    assert found == pytest.approx(plain_results(name, "poc2"), abs=TOLERANCE)
    for module in causal.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("entry", VECTORS["distances"], ids=lambda entry: entry["name"])
def test_plain_torch_agrees_with_the_vectors(entry: dict[str, Any]) -> None:
    causal = vector_models.build(entry)
    for value in entry["values"][::5]:
        run = plain_torch.PlainRun(causal, value["block_hash"], value["public_key"], entry["seq_len"])
        assert run.distance(value["nonce"]) == pytest.approx(value["distance"], abs=TOLERANCE)


@pytest.mark.parametrize("form", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_plain_torch_runs_every_family_of_the_llama_form(form: str) -> None:
    """Held against the other plain implementation, on a sequence longer than the sliding windows."""
    family = FAMILIES[form.lower()]
    causal = family.build()
    run = plain_torch.PlainRun(causal, "ABC", "key", 13)
    expected = plain.distance(family.plain(causal), block_hash="ABC", public_key="key", nonce=5, seq_len=13)
    assert run.distance(5) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.01), ("float16", 0.002)])
def test_plain_torch_in_half_precision_stays_near_float32(dtype: str, tolerance: float) -> None:
    causal = load_model(BUNDLED[0], dtype=dtype, device="cpu").causal
    run = plain_torch.PlainRun(causal, "ABC", "key", SEQ_LEN)
    found = [run.distance(nonce) for nonce in NONCES]
    exact = plain_results(BUNDLED[0], "poc2")
    assert found == pytest.approx(exact, abs=tolerance)
    assert (np.array(found) != exact).all()


def test_plain_torch_hashes_exactly() -> None:
    seeds = [0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678]
    index = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    for seed in seeds:
        found = plain_torch.hash32(torch.tensor(index), seed).tolist()
        assert found == [plain.hash32(i, seed) for i in index]
    assert plain_torch.hash32(torch.tensor([1]), 0).tolist() == [0x87BE548A]
