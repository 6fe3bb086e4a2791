"""A batch of claimed proofs as it comes from outside: checked once, here, for the API and the command line."""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import unpack
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    RootModel,
    Tag,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError

from pocd.protocol.artifacts import Encoding
from pocd.protocol.bodies import BatchBody, RoundBody, ShortName
from pocd.protocol.numbers import Count, Index
from pocd.protocol.proof import MOST_NONCES
from pocd.protocol.schemes import VECTOR_BYTES, VECTOR_SIZE, Output
from pocd.validation.conditions import BodyConditions

if TYPE_CHECKING:
    from pydantic.config import JsonDict

Numbers = Sequence[float]
"""Claimed numbers of one nonce: its distance, or those of its vector."""

LARGEST_CLAIM = 8 * 2**20  # bytes; the longest numbers, one a line, are 5 MiB

Model = TypeVar("Model", bound=BaseModel)


OF_DISTANCES: JsonDict = {
    "public_key": "gonka1abc",
    "block_hash": "9F2E5C",
    "block_height": 4100000,
    "nonces": [11, 27],
    "dist": [1.4031, 1.3987],
    "node_id": 0,
}
OF_VECTORS: JsonDict = {
    "public_key": "gonka1abc",
    "block_hash": "9F2E5C",
    "block_height": 4100000,
    "artifacts": [{"nonce": 11, "vector_b64": "zLE+LOqw86RaJ9S4BTThM8Ssorhis5Iz"}],
    "encoding": {"dtype": "f16", "k_dim": 12, "endian": "le"},
    "node_id": 0,
}


class BodyError(Exception):
    """A body that is not the JSON object expected.

    Attributes:
        code: Name of the error for programs: malformed_json or invalid_request.
        field: The field at fault; None where it is no single one.
    """

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class _Claim(RoundBody, BodyConditions):
    """What a batch of any kind may name beside its results."""

    node_count: Annotated[Count | None, Field(description="Number of nodes that share the nonces.")] = None
    batch_id: Annotated[ShortName | None, Field(description="Ignored: the verdict has an id of its own.")] = None


class Claim(BatchBody, _Claim):
    """A ProofBatch of distances as a miner sends it (docs/protocol.md section 5).

    Fields that name how the batch was made must agree with what this daemon runs; other unknown fields are ignored.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [OF_DISTANCES]})

    dist: Annotated[
        list[float | None],
        FailFast(),
        Field(
            description="Claimed distance of each nonce. A value that is no finite number (null, NaN, Infinity) counts "
            "against the miner."
        ),
    ]
    r_target: Annotated[float | None, Field(gt=0, le=2, allow_inf_nan=False)] = None

    @field_validator("dist")
    @classmethod
    def _null_for_no_number(cls, values: list[float | None]) -> list[float | None]:
        return [value if value is not None and math.isfinite(value) else None for value in values]

    @property
    def output(self) -> Output:
        """Kind of the results."""
        return "distance"

    @property
    def outputs(self) -> list[Numbers | None]:
        """Claimed numbers of each entry; None where they are no finite ones."""
        return [None if distance is None else (distance,) for distance in self.dist]


def _base64(text: str) -> str:
    try:
        b64decode(text, validate=True)
    except ValueError:
        raise PydanticCustomError("base64", "it has to be base64") from None
    return text


@dataclass(frozen=True, slots=True)
class ClaimedArtifact:
    """A nonce, and the vector that is claimed for it."""

    __pydantic_config__ = ConfigDict(strict=False)  # made from a dictionary as well

    nonce: Annotated[Index, Field(strict=True)]
    vector_b64: Annotated[
        Annotated[str, Field(strict=True), AfterValidator(_base64)] | None,
        Field(
            description="Claimed vector: 12 numbers, float16, little endian, in base64. One of another length, or with "
            "a number that is not finite, counts against the miner, as null does."
        ),
    ]

    @property
    def numbers(self) -> Numbers | None:
        """The numbers of the vector; None where it is none of so many finite ones."""
        data = b64decode(self.vector_b64 or "")
        if len(data) != VECTOR_BYTES:
            return None
        numbers = unpack(f"<{VECTOR_SIZE}e", data)
        return numbers if all(map(math.isfinite, numbers)) else None


class VectorClaim(_Claim):
    """A ProofBatch of vectors as a miner sends it (docs/protocol.md section 5).

    Fields that name how the batch was made must agree with what this daemon runs; other unknown fields are ignored.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [OF_VECTORS]})

    artifacts: Annotated[list[ClaimedArtifact], FailFast(), Field(min_length=1, max_length=MOST_NONCES)]
    encoding: Annotated[Encoding | None, Field(description="Form of the vectors; without it, this one.")] = None

    @property
    def output(self) -> Output:
        """Kind of the results."""
        return "vector"

    @property
    def r_target(self) -> None:
        """A batch of vectors has no target."""

    @property
    def nonces(self) -> list[int]:
        """Nonce of each entry."""
        return [artifact.nonce for artifact in self.artifacts]

    @property
    def outputs(self) -> list[Numbers | None]:
        """Claimed numbers of each entry; None where they are no vector of finite ones."""
        return [artifact.numbers for artifact in self.artifacts]


def _kind(body: object) -> Output:
    """Return which of the two a body is, by the field that only one has."""
    if isinstance(body, Mapping):
        return "vector" if "artifacts" in body else "distance"
    return body.output if isinstance(body, Claim | VectorClaim) else "distance"


OneClaim = Annotated[Claim, Tag("distance")] | Annotated[VectorClaim, Tag("vector")]


class AnyClaim(RootModel[Annotated[OneClaim, Discriminator(_kind)]]):
    """A ProofBatch as a miner sends it: of vectors where it has artifacts, else of distances."""

    model_config = ConfigDict(json_schema_extra={"examples": [OF_DISTANCES, OF_VECTORS]})


def parse_json(model: type[Model], raw: bytes) -> Model:
    """Parse a JSON object; numbers may also be the literals NaN, Infinity and -Infinity, which others write.

    Raises:
        BodyError: The body is not JSON or not an object, or a field is missing or wrong; the first such field is named.
    """
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise BodyError("malformed_json", first["msg"])
    place = first["loc"][1:] if issubclass(model, RootModel) else first["loc"]  # without which of several it is
    if not place:
        raise BodyError("invalid_request", "it has to be one JSON object")
    where = ".".join(map(str, place))
    raise BodyError("invalid_request", f"{where}: {first['msg'].removeprefix('Value error, ')}", str(place[0]))
