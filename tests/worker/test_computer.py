"""What a worker's computer answers, in this process."""

from __future__ import annotations

import numpy as np

from pocd.compute.engine import block_run
from pocd.compute.model import load_model
from pocd.protocol.proof import Round
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.vectors import decode_vectors
from pocd.worker.computer import DistanceComputer, result
from pocd.worker.messages import Compute, Distances, Load, Message, Recompute, RoundBegun, Vectors


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
