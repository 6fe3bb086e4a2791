"""What a worker's computer answers, in this process."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch

from pocd.compute.engine import block_run
from pocd.compute.margins import measure_chances
from pocd.compute.model import adapt, load_model
from pocd.compute.reference import Comparison, compare
from pocd.protocol.errors import InputError, OutOfMemoryError
from pocd.protocol.proof import Round
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.vectors import decode_vectors
from pocd.worker import computer as computer_module
from pocd.worker.computer import DistanceComputer, result
from pocd.worker.messages import (
    BatchShrunk,
    Compared,
    Compute,
    Distances,
    Load,
    Message,
    Recompute,
    RoundBegun,
    Vectors,
)
from tests.support.family_models import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.compute.engine import BlockRun


def test_a_span_of_a_scheme_of_vectors_is_answered_by_one_text() -> None:
    """With more nonces than a batch takes, mined and recomputed alike."""
    load = Load("bundled:tiny-llama", "float32", ("cpu",), "poc4", 16, 4)
    round_ = Round("block_alpha", 1, "node_A", None, "poc4", load.model, load.seq_len)
    nonces = list(range(3, 17, 2))
    model, reported = load_model(load.model, dtype=load.dtype, device="cpu"), list[Message]()
    with block_run(model, SCHEMES["poc4"], block_hash="block_alpha", public_key="node_A", seq_len=16) as run:
        expected = run.values(nonces, batch_size=4).numpy().astype(np.float16)
    computer = DistanceComputer(model, load, 4, reported.append)
    for message in (Compute(7, round_, nonces), Recompute(7, round_, nonces, last=True)):
        answer = result(7, computer.start(message)())
        assert isinstance(answer, Vectors)
        assert answer.id == 7
        assert np.array_equal(decode_vectors(answer.vectors), expected)
    assert reported == [RoundBegun(round_.id, 1.0, "eager", "compiled code was not requested")]


def test_distances_are_answered_as_numbers() -> None:
    load = Load("bundled:tiny-llama", "float32", ("cpu",), "poc2", 16, 4)
    round_ = Round("block_alpha", 1, "node_A", 1.4, "poc2", load.model, load.seq_len)
    model = load_model(load.model, dtype=load.dtype, device="cpu")
    answer = result(1, DistanceComputer(model, load, 4, lambda _: None).start(Compute(1, round_, [0, 1, 2]))())
    assert isinstance(answer, Distances)
    assert len(answer.distances) == 3
    assert all(0 < distance < 2 for distance in answer.distances)


@pytest.mark.parametrize(("scheme", "numbers"), [("poc2", 1), ("poc4", 12)])
def test_a_recomputation_with_a_reference_answers_both_and_how_they_differ(scheme: str, numbers: int) -> None:
    load = Load("bundled:tiny-llama", "bfloat16", ("cpu",), scheme, 16, 4)
    mined, theirs = (Round(block, 1, "node_A", 1.4, scheme, load.model, load.seq_len) for block in ("one", "two"))
    model, nonces = load_model(load.model, dtype=load.dtype, device="cpu"), [9, 4, 6, 7, 1]
    with block_run(model, SCHEMES[scheme], block_hash="two", public_key="node_A", seq_len=16) as run:
        expected = run.values(nonces, batch_size=4).view(5, -1).numpy()
    computer = DistanceComputer(model, load, 4, lambda _: None)
    first = computer.start(Compute(1, mined, nonces))()
    answer = result(2, computer.start(Recompute(2, theirs, nonces, last=True, with_reference=True))())
    assert isinstance(answer, Compared)
    assert answer.id == 2
    assert np.array(answer.own) == pytest.approx(expected, abs=1e-6)
    assert [len(each) for each in answer.reference] == [numbers] * 5
    differences = np.abs(np.array(answer.reference) - expected).max(axis=1)
    assert (differences > 0).all()
    assert len(answer.errors) == 5
    assert min(answer.errors) > 0
    again = computer.start(Compute(3, mined, nonces))()
    assert isinstance(first, torch.Tensor)
    assert isinstance(again, torch.Tensor)
    assert torch.equal(first, again)


def test_a_reference_for_which_memory_is_short_takes_smaller_batches_or_has_no_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is mined goes on as before, whatever somebody wants judged."""
    tried: list[int] = []
    fits = 2

    def short(run: BlockRun, nonces: Sequence[int], *, batch_size: int) -> Comparison:
        tried.append(batch_size)
        if batch_size > fits:
            raise OutOfMemoryError("too large")
        return compare(run, nonces, batch_size=batch_size)

    monkeypatch.setattr(computer_module, "compare", short)
    load = Load("bundled:tiny-llama", "bfloat16", ("cpu",), "poc2", 16, 8)
    mined = Round("one", 1, "node_A", 1.4, "poc2", load.model, load.seq_len)
    theirs = dataclasses.replace(mined, block_hash="two")
    reported: list[Message] = []
    computer = DistanceComputer(load_model(load.model, dtype=load.dtype, device="cpu"), load, 8, reported.append)
    computer.start(Compute(1, mined, [1]))()
    for nonces in (list(range(8)), [1, 2, 3], [4]):
        found = computer.start(Recompute(2, theirs, nonces, last=True, with_reference=True))()
        assert isinstance(found, Comparison)
        assert len(found.errors) == len(nonces)
    assert tried == [8, 8, 4, 2, 2, 1], "at first without the other round beside it"
    fits = 0
    with pytest.raises(InputError, match="cannot judge claims by their differences"):
        computer.start(Recompute(3, theirs, [1, 2], last=True, with_reference=True))
    whole = computer.start(Compute(4, mined, list(range(8))))()
    assert isinstance(whole, torch.Tensor)
    assert len(whole) == 8
    assert not any(isinstance(message, BatchShrunk) for message in reported)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixtures_distances_are_recomputed_with_how_near_its_routers_came_to_another_choice(
    dtype: Literal["float32", "bfloat16"],
) -> None:
    """They are those that are mined; nothing of it is answered of vectors, of what is mined, or of a dense model."""
    model = adapt(FAMILIES["qwen3 moe"].build().to(getattr(torch, dtype)), name="mixture")
    load = Load("mixture", dtype, ("cpu",), "poc2", 16, 4)
    mined, theirs = (Round(block, 1, "node_A", 1.4, "poc2", load.model, load.seq_len) for block in ("one", "two"))
    computer, nonces, is_compared = (
        DistanceComputer(model, load, 4, lambda _: None),
        [9, 4, 6, 7, 1],
        dtype != "float32",
    )
    with block_run(model, SCHEMES["poc2"], block_hash="two", public_key="node_A", seq_len=16) as run:
        expected = run.values(nonces, batch_size=4).tolist()
        chances = measure_chances(run, nonces, batch_size=4)
    assert chances is not None
    first = result(1, computer.start(Compute(1, mined, nonces))())
    assert isinstance(first, Distances)
    assert first.turned is None
    for last in (False, True):
        asked = Recompute(2, theirs, nonces, last=last, with_reference=is_compared)
        answer = result(2, computer.start(asked)())
        assert isinstance(answer, Compared if is_compared else Distances)
        assert answer.turned == chances.tolist()
        own = [distance for (distance,) in answer.own] if isinstance(answer, Compared) else answer.distances
        assert own == pytest.approx(expected, abs=1e-6)
    assert result(1, computer.start(Compute(1, mined, nonces))()) == first
    vectors = dataclasses.replace(theirs, scheme="poc4", r_target=None)
    compared = result(3, computer.start(Recompute(3, vectors, nonces, last=True, with_reference=True))())
    assert isinstance(compared, Compared)
    assert compared.turned is None


def test_routers_are_watched_in_smaller_batches_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def short(run: BlockRun, nonces: Sequence[int], *, batch_size: int) -> torch.Tensor | None:
        tried.append(batch_size)
        if batch_size > 2:
            raise OutOfMemoryError("too large")
        return measure_chances(run, nonces, batch_size=batch_size)

    monkeypatch.setattr(computer_module, "measure_chances", short)
    load = Load("mixture", "float32", ("cpu",), "poc2", 16, 64)
    round_ = Round("one", 1, "node_A", 1.4, "poc2", load.model, load.seq_len)
    computer = DistanceComputer(adapt(FAMILIES["qwen3 moe"].build(), name="mixture"), load, 64, lambda _: None)
    answer = result(2, computer.start(Recompute(2, round_, [1, 2, 3], last=True))())
    assert isinstance(answer, Distances)
    assert answer.turned is not None
    assert len(answer.turned) == 3
    assert tried == [16, 8, 4, 2]
