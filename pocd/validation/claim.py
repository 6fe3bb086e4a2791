"""A batch of claimed proofs as it comes from outside: checked once, here, for the API and the command line."""

from __future__ import annotations

import math
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator

from pocd.protocol.bodies import BatchBody, ShortName
from pocd.protocol.numbers import Count
from pocd.validation.conditions import BodyConditions

LARGEST_CLAIM = 8 * 2**20  # bytes; the longest numbers, one a line, are 5 MiB

Model = TypeVar("Model", bound=BaseModel)


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


class Claim(BatchBody, BodyConditions):
    """A ProofBatch as a miner sends it (docs/protocol.md section 5).

    Fields that name how the batch was made must agree with what this daemon runs; other unknown fields are ignored.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "public_key": "gonka1abc",
                    "block_hash": "9F2E5C",
                    "block_height": 4100000,
                    "nonces": [11, 27],
                    "dist": [1.4031, 1.3987],
                    "node_id": 0,
                }
            ]
        },
    )

    dist: Annotated[
        list[float | None],
        FailFast(),
        Field(
            description="Claimed distance of each nonce. A value that is no finite number (null, NaN, Infinity) counts "
            "against the miner."
        ),
    ]
    node_count: Annotated[Count | None, Field(description="Number of nodes that share the nonces.")] = None
    r_target: Annotated[float | None, Field(gt=0, le=2, allow_inf_nan=False)] = None
    batch_id: Annotated[ShortName | None, Field(description="Ignored: the verdict has an id of its own.")] = None

    @field_validator("dist")
    @classmethod
    def _null_for_no_number(cls, values: list[float | None]) -> list[float | None]:
        return [value if value is not None and math.isfinite(value) else None for value in values]


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
    if not first["loc"]:
        raise BodyError("invalid_request", "it has to be one JSON object")
    where = ".".join(map(str, first["loc"]))
    raise BodyError("invalid_request", f"{where}: {first['msg'].removeprefix('Value error, ')}", str(first["loc"][0]))
