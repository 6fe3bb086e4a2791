"""A run beside its reference: what is compared, and the size of the differences that is foretold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pocd.compute import reference
from pocd.compute.engine import block_run
from pocd.compute.model import load_model
from pocd.compute.reference import compare, reference_of
from pocd.compute.stages import find_separation
from pocd.compute.wide import WideDecoder
from pocd.protocol.errors import NonFiniteError, OutOfMemoryError
from pocd.protocol.schemes import SCHEMES


@pytest.mark.parametrize("scheme", ["poc2", "poc3", "poc4", "artifacts", "random-head"])
def test_the_errors_foretold_are_those_found(scheme: str) -> None:
    """On average over nonces and blocks: random targets and projections make of each error what they make of it."""
    model = load_model("bundled:tiny-llama", dtype="bfloat16", device="cpu")
    nonces, ratios = range(24), []
    for block in "abcdef":  # of one target for a whole block the errors are larger or smaller together
        with block_run(model, SCHEMES[scheme], block_hash=block, public_key="b", seq_len=12) as run:
            found = compare(run, nonces, batch_size=16)
            assert torch.allclose(found.own, run.values(nonces, batch_size=16), atol=1e-6)
            assert torch.allclose(found.reference, reference_of(run).values(nonces, batch_size=16), atol=1e-6)
        squares = (found.own - found.reference).double().square().view(24, -1).mean(dim=1)
        assert found.errors.shape == squares.shape
        ratios.append(squares / found.errors)
    assert float(torch.cat(ratios).mean()) == pytest.approx(1, abs=0.2 if scheme == "poc4" else 0.6)


def test_in_float32_the_reference_is_the_result_but_for_rounding() -> None:
    model = load_model("bundled:tiny-llama", dtype="float32", device="cpu")
    with block_run(model, SCHEMES["poc4"], block_hash="a", public_key="b", seq_len=12) as run:
        found = compare(run, [5], batch_size=4)
    assert float(found.errors) < 1e-9


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_the_separation_is_that_of_unit_vectors(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """In parts of the head of any size, and without a head."""
    monkeypatch.setattr("pocd.compute.stages.HEAD_CHUNK", rows * 8)
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randn(5, 8, generator=generator) for _ in range(2))
    head = torch.randn(11, 8, generator=generator)
    for matrix, used in ((head, head), (None, torch.eye(8))):
        outputs = [(each @ used.T).double().numpy() for each in (one, other)]
        units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in outputs]
        expected = np.square(units[0] - units[1]).sum(axis=1)
        assert find_separation(one, other, matrix).numpy() == pytest.approx(expected, rel=1e-5)


def test_what_gives_nan_is_named_and_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("bundled:tiny-llama", dtype="bfloat16", device="cpu")

    class Overflowing(WideDecoder):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - as they came
            states = super().__call__(*args, **kwargs)
            states[1] = torch.nan
            return states

    with block_run(model, SCHEMES["poc4"], block_hash="a", public_key="b", seq_len=12) as run:
        monkeypatch.setattr(reference, "WideDecoder", Overflowing)
        with pytest.raises(NonFiniteError, match="1 nonces, the first is 7"):
            compare(run, [5, 7], batch_size=2)

        def full(_layers: object) -> None:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(reference, "WideDecoder", full)
        with pytest.raises(OutOfMemoryError, match="2 × 12 positions in float32 do not fit into the memory of cpu"):
            compare(run, [5, 7], batch_size=2)
