"""What a worker checks before it mines: known distances, which are those of the protocol, and a device that errs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pocd.compute.model import load_model
from pocd.protocol.errors import ComputeError, DeviceError
from pocd.protocol.names import DTYPES, Dtype
from pocd.protocol.schemes import SCHEMES
from pocd.worker.messages import Load
from pocd.worker.self_test import check_known, fit, read_known
from tests.reference import plain, plain_families

LOAD = Load("bundled:tiny-llama", "float32", ("cpu",), "poc2", 16, 8)
KNOWN = read_known()
TERMS = {key: KNOWN[key] for key in ("block_hash", "public_key", "seq_len")}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_known_distances_are_those_of_the_protocol(scheme: str) -> None:
    known, decoder = KNOWN["schemes"][scheme], plain_families.bundled(KNOWN["model"])
    found = [plain.distance(decoder, nonce=nonce, scheme=scheme, **TERMS) for nonce in known["nonces"]]
    assert known["distances"]["float32"] == pytest.approx(found, abs=2e-5)
    for dtype, tolerance in (("float16", 5e-4), ("bfloat16", 2e-3)):
        assert known["distances"][dtype] == pytest.approx(found, abs=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_this_machine_computes_them_in_each_dtype(dtype: Dtype) -> None:
    model = load_model(KNOWN["model"], dtype=dtype, device="cpu")
    for scheme in ("poc2", "poc3"):
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

    distances = BlockRun.distances
    asked: list[int] = []

    def drifting(run: BlockRun, nonces: range, *, batch_size: int) -> list[float]:
        asked.append(len(nonces))
        return [distance + 0.1 * len(asked) for distance in distances(run, nonces, batch_size=batch_size)]

    monkeypatch.setattr(BlockRun, "distances", drifting)
    with pytest.raises(ComputeError, match=r"nonce 7 has distance .* in a batch and .* alone"):
        fit(load_model(LOAD.model, dtype="float32", device="cpu"), LOAD)
    assert asked == [8, 1]
