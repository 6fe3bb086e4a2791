"""What a worker checks before it mines: known distances, which are those of the protocol, and a device that errs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pocd.compute.model import load_model
from pocd.protocol.conditioning import Conditioning
from pocd.protocol.errors import ComputeError, DeviceError, OutOfMemoryError
from pocd.protocol.names import DTYPES, TOLERANCE, VECTOR_TOLERANCE, Dtype
from pocd.protocol.schemes import SCHEMES
from pocd.worker import self_test
from pocd.worker.messages import Load
from pocd.worker.self_test import check_known, check_rounding, fit, read_known
from tests.reference import plain, plain_families

LOAD = Load("bundled:tiny-llama", "float32", ("cpu",), "poc2", 16, 8)
KNOWN = read_known()
TERMS = {key: KNOWN[key] for key in ("block_hash", "public_key", "seq_len")}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_known_distances_are_those_of_the_protocol(scheme: str) -> None:
    known, decoder = KNOWN["schemes"][scheme], plain_families.bundled(KNOWN["model"])
    found = np.array([plain.result(decoder, nonce=nonce, scheme=scheme, **TERMS) for nonce in known["nonces"]])
    results = known[f"{SCHEMES[scheme].output}s"]
    limits = VECTOR_TOLERANCE if SCHEMES[scheme].output == "vector" else TOLERANCE | {"float32": 2e-5}
    for dtype in DTYPES:
        assert np.array(results[dtype]) == pytest.approx(found, abs=limits[dtype], rel=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_this_machine_computes_them_in_each_dtype(dtype: Dtype) -> None:
    model = load_model(KNOWN["model"], dtype=dtype, device="cpu")
    for scheme in ("poc2", "poc3", "poc4"):
        check_known(model, dataclasses.replace(LOAD, dtype=dtype, scheme=scheme))


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_a_device_that_computes_wrongly_is_refused(wrong: float) -> None:
    model = load_model(KNOWN["model"], dtype="float32", device="cpu")
    with torch.no_grad():
        model.causal.model.layers[2].mlp.down_proj.weight[0] *= wrong  # as if one row of a product went wrong
    with pytest.raises(ComputeError) as refused:
        check_known(model, LOAD)
    if wrong == wrong:  # noqa: PLR0124 - it is a number
        assert isinstance(refused.value, DeviceError)
        assert str(refused.value).startswith(
            f"the self-test failed: {KNOWN['model']} gives distances on cpu in float32"
        )
        assert "and 1e-05 is allowed" in str(refused.value)


def test_a_batch_whose_rows_do_not_agree_with_one_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pocd.compute.engine import BlockRun

    values = BlockRun.values
    asked: list[int] = []

    def drifting(run: BlockRun, nonces: range, *, batch_size: int) -> torch.Tensor:
        asked.append(len(nonces))
        return values(run, nonces, batch_size=batch_size) + 0.1 * len(asked)

    monkeypatch.setattr(BlockRun, "values", drifting)
    with pytest.raises(ComputeError, match=r"nonce 7 has distance .* in a batch and .* alone"):
        fit(load_model(LOAD.model, dtype="float32", device="cpu"), LOAD)
    assert asked == [8, 1]


RED = Conditioning(error=1.0, flipped=0.5, own_share=0.5)


def test_rounding_that_decides_is_told_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(LOAD.model, dtype="bfloat16", device="cpu")
    found = check_rounding(model, LOAD)
    assert found is not None
    assert found.error is not None
    assert 0 < found.error < 0.2
    assert found.alarm is None
    monkeypatch.setattr(self_test, "measure_conditioning", lambda _run, batch_size: RED if batch_size == 4 else None)
    assert check_rounding(model, LOAD) == RED
    with pytest.raises(ComputeError, match=r"^rounding decides too much .* 50.00% .* worker.conditioning = 'warn'$"):
        check_rounding(model, dataclasses.replace(LOAD, conditioning="refuse"))


def test_without_memory_rounding_is_measured_in_smaller_batches_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(LOAD.model, dtype="bfloat16", device="cpu")
    tried: list[int] = []
    fits = 2

    def measure(_run: object, *, batch_size: int) -> Conditioning:
        tried.append(batch_size)
        if batch_size > fits:
            raise OutOfMemoryError("too large")
        return RED

    monkeypatch.setattr(self_test, "measure_conditioning", measure)
    assert check_rounding(model, LOAD) == RED
    fits = 0
    assert check_rounding(model, LOAD) is None
    assert tried == [4, 2, 4, 2, 1]
