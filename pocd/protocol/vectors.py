"""Vectors of nonces as they travel: float16, little endian, one after the other (docs/protocol.md section 3.2).

A daemon that mines looks at bytes alone; numpy is imported where vectors are made, or judged.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import TYPE_CHECKING

from pocd.protocol.schemes import VECTOR_BYTES, VECTOR_SIZE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

_FINITE = bytes(byte for byte in range(256) if byte & 0x7C != 0x7C)  # as a number's second byte: no exponent of ones


def are_finite(vectors: bytes) -> list[bool]:
    """Tell of each vector, packed one after the other, whether all its numbers are finite."""
    seconds, k = vectors[1::2], VECTOR_SIZE
    return [not seconds[start : start + k].translate(None, _FINITE) for start in range(0, len(seconds), k)]


def encode_vectors(vectors: ArrayLike) -> str:
    """Return vectors [n, VECTOR_SIZE], or one [VECTOR_SIZE], in base64, each number rounded to float16."""
    import numpy as np

    return b64encode(np.asarray(vectors, dtype="<f2").tobytes()).decode()


def rounding_variance(vectors: ArrayLike) -> NDArray[np.float64]:
    """Return the expected squared error that rounding to float16 makes of a number, by vector, of vectors [n, k].

    A number between two neighbours of float16 is off by a uniform error, whose variance is a twelfth of their squared
    distance.
    """
    import numpy as np

    sizes = np.minimum(np.abs(np.asarray(vectors, np.float64)), float(np.finfo(np.float16).max) / 2)
    gaps = np.spacing(sizes.astype(np.float16)).astype(np.float64)
    variance: NDArray[np.float64] = np.square(gaps).mean(axis=-1) / 12
    return variance


def decode_vectors(text: str) -> NDArray[np.float32]:
    """Return the vectors of a base64 text, float32 [n, VECTOR_SIZE].

    Raises:
        ValueError: The text is not base64, or not of whole vectors.
    """
    import numpy as np

    data = b64decode(text, validate=True)
    if len(data) % VECTOR_BYTES:
        raise ValueError(f"{len(data)} bytes are no whole number of vectors of {VECTOR_BYTES} bytes")
    return np.frombuffer(data, dtype="<f2").astype(np.float32).reshape(-1, VECTOR_SIZE)
