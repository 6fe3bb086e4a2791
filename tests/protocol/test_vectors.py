"""Vectors of float16 as they travel."""

from __future__ import annotations

import numpy as np

from pocd.protocol.schemes import VECTOR_SIZE
from pocd.protocol.vectors import are_finite


def test_a_vector_is_finite_where_all_its_numbers_are() -> None:
    every = np.arange(2**16, dtype="<u2").view("<f2")  # all that 16 bits can be
    vectors = np.ones((len(every), VECTOR_SIZE), "<f2")
    vectors[np.arange(len(every)), np.arange(len(every)) % VECTOR_SIZE] = every  # each of them at one place
    assert are_finite(vectors.tobytes()) == np.isfinite(every).tolist()
    assert are_finite(b"") == []
