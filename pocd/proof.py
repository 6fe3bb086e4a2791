"""What is proved, and the bytes that say so: rounds, batches, their canonical JSON and ids."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import orjson


def canonical_json(value: object) -> bytes:
    """Encode `value` with sorted keys and no white space, so that equal values are equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def content_id(value: object) -> str:
    """Name `value` by its content: the first 32 hex digits of SHA-256 of its canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Round:
    """The search for valid nonces under one block hash (docs/protocol.md section 5).

    Attributes:
        block_hash: The chain's hash, an opaque string, as the node wrote it.
        block_height: Height of that block.
        public_key: The miner's key, an opaque string.
        r_target: A nonce is valid when its distance (in [0, 2]) is below this.
        scheme: Name of the scheme, see `pocd.compute.schemes`.
        model: Name of the model, as configured.
        seq_len: Sequence length in positions.
    """

    block_hash: str
    block_height: int
    public_key: str
    r_target: float
    scheme: str
    model: str
    seq_len: int

    @property
    def id(self) -> str:
        """Hash of all the fields: another r_target or model is another round."""
        return content_id(asdict(self))


@dataclass(frozen=True, slots=True)
class Proof:
    """One valid nonce and its distance."""

    nonce: int
    distance: float


@dataclass(frozen=True, slots=True)
class ProofBatch:
    """Proofs of one round, as receivers get them (docs/protocol.md section 5).

    Attributes:
        model_fingerprint: Names the weights that they were computed with; None where an earlier version stored them.
        dtype: The precision, likewise.
    """

    kind: ClassVar = "generated"

    round: Round
    node_id: int
    model_fingerprint: str | None
    dtype: str | None
    proofs: tuple[Proof, ...]

    @property
    def size(self) -> int:
        """How many nonces it has."""
        return len(self.proofs)

    def _content(self) -> dict[str, Any]:
        return asdict(self.round) | {
            "node_id": self.node_id,
            "model_fingerprint": self.model_fingerprint,
            "dtype": self.dtype,
            "nonces": [proof.nonce for proof in self.proofs],
            "dist": [proof.distance for proof in self.proofs],
        }

    @property
    def id(self) -> str:
        """Hash of the content: the same proofs always travel under the same id."""
        return content_id(self._content())

    def to_json(self) -> bytes:
        """The exact bytes of every POST of this batch: canonical JSON with `batch_id`."""
        return canonical_json(self._content() | {"batch_id": self.id})
