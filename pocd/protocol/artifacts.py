"""The live network's JSON: bodies of artifacts, and proofs that they were committed to (docs/live.md)."""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass
from math import isfinite
from struct import Struct
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, PlainValidator
from pydantic_core import PydanticCustomError

from pocd.protocol.bodies import RoundBody, ShortName
from pocd.protocol.commitment import HASH_BYTES, LARGEST_COUNT, LARGEST_NONCE, MOST_DEPTH, Proof, Subtree
from pocd.protocol.numbers import Index
from pocd.protocol.proof import MOST_NONCES
from pocd.protocol.schemes import VECTOR_SIZE

VECTOR = Struct(f"<{VECTOR_SIZE}e")  # float16, little endian
SIBLING_BYTES = HASH_BYTES + 4


def _bytes(text: object, length: int) -> bytes:
    if not isinstance(text, str):
        raise PydanticCustomError("base64", "it has to be text in base64")
    try:
        data = b64decode(text, validate=True)
    except ValueError:
        raise PydanticCustomError("base64", "it has to be base64") from None
    if len(data) != length:
        raise PydanticCustomError("length", f"it has {len(data)} bytes, not {length}")
    return data


def _vector(text: object) -> bytes:
    data = _bytes(text, VECTOR.size)
    if not isfinite(sum(VECTOR.unpack(data))):  # no sum of so few float16 is infinite by itself
        raise PydanticCustomError("finite", "its numbers have to be finite")
    return data


def _sibling(text: object) -> Subtree:
    data = _bytes(text, SIBLING_BYTES)
    return Subtree(data[:HASH_BYTES], int.from_bytes(data[HASH_BYTES:], "little"))


Nonce = Annotated[int, Field(ge=0, le=LARGEST_NONCE)]


class _Body(BaseModel):
    """A body of the live network: no text where a number belongs; unknown fields are ignored, as the network does."""

    model_config = ConfigDict(strict=True, frozen=True)


class Encoding(_Body):
    """The form of the vectors: only this one is known."""

    dtype: Literal["f16"]
    k_dim: Literal[12]
    endian: Literal["le"]


Vector = Annotated[bytes, BeforeValidator(_vector)]


@dataclass(frozen=True, slots=True)  # a million of them take a fifth of what pydantic's own models would
class Artifact:
    """A nonce and the vector that was computed for it."""

    nonce: Nonce
    vector: Annotated[Vector, Field(alias="vector_b64")]


@dataclass(frozen=True, slots=True)
class BatchArtifact:
    """A nonce of pocd's own batches, which may be any, and the vector that was computed for it."""

    __pydantic_config__ = ConfigDict(strict=False)  # made from a dictionary as well

    nonce: Annotated[Index, Field(strict=True)]
    vector: Annotated[Vector, Field(alias="vector_b64")]


class ArtifactsBody(_Body):
    """The body that a node posts to `/generated`: some artifacts of one participant's round."""

    public_key: Annotated[str, Field(min_length=1, max_length=1024)]
    block_hash: ShortName
    block_height: Index
    artifacts: Annotated[list[Artifact], FailFast()]
    encoding: Encoding | None = None


class VectorsBody(RoundBody):
    """A ProofBatch of vectors, which is such a body too; unknown fields are ignored."""

    artifacts: Annotated[list[BatchArtifact], FailFast(), Field(min_length=1, max_length=MOST_NONCES)]
    encoding: Encoding

    @property
    def nonces(self) -> list[int]:
        """The nonces, in the order of the artifacts."""
        return [artifact.nonce for artifact in self.artifacts]


class CommittedArtifact(_Body):
    """An artifact, its index, and its siblings from the root's child down, each a hash and a count."""

    leaf_index: Annotated[int, Field(ge=0, lt=LARGEST_COUNT)]
    nonce_value: Nonce
    vector_bytes: Vector
    proof: Annotated[list[Annotated[Subtree, PlainValidator(_sibling)]], FailFast(), Field(max_length=MOST_DEPTH)]

    def as_proof(self) -> Proof:
        """Return the same for `commitment.verify`."""
        return Proof(self.leaf_index, self.nonce_value, self.vector_bytes, tuple(self.proof))


class ProofsBody(_Body):
    """A participant's answer to a request for proofs."""

    proofs: Annotated[list[CommittedArtifact], FailFast(), Field(min_length=1)]


def proof_as_json(proof: Proof) -> dict[str, Any]:
    """Return a proof as `CommittedArtifact` reads it."""
    siblings = (each.hash + each.count.to_bytes(4, "little") for each in proof.siblings)
    return {
        "leaf_index": proof.index,
        "nonce_value": proof.nonce,
        "vector_bytes": b64encode(proof.vector).decode(),
        "proof": [b64encode(each).decode() for each in siblings],
    }
