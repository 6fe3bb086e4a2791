"""The JSON body of a batch that comes from outside, with the limits of each field."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pocd.protocol.numbers import Index
from pocd.protocol.proof import MOST_NONCES

MOST_VALUES = 9 * MOST_NONCES  # in a body: eight lists as long as can be, and room for what is ignored
VECTOR_FIELD = b'"vector_b64"'  # of each artifact, beside its nonce
ShortName = Annotated[str, Field(min_length=1, max_length=256)]

Values = TypeVar("Values", list[float], list[float | None], list[str], list[str | None])


class RoundBody(BaseModel):
    """What a batch of any kind says of its round and its node (docs/protocol.md section 5)."""

    model_config = ConfigDict(strict=True, frozen=True)

    public_key: Annotated[str, Field(min_length=1, max_length=1024)]
    block_hash: ShortName
    block_height: Index
    node_id: Index = 0
    batch_id: ShortName | None = None


class BatchBody(RoundBody):
    """A ProofBatch of distances without these, which subclasses declare (docs/protocol.md section 5)."""

    nonces: Annotated[list[Index], FailFast(), Field(min_length=1, max_length=MOST_NONCES)]

    # Fields are checked in order, so the nonces are known here unless they were refused themselves.
    @field_validator("dist", "received_dist", "vectors", "received_vectors", check_fields=False)
    @classmethod
    def _one_for_each_nonce(cls, values: Values, info: ValidationInfo) -> Values:
        expected = len(info.data.get("nonces", values))
        if len(values) != expected:
            raise PydanticCustomError("length", f"{len(values)} values for {expected} nonces")
        return values
