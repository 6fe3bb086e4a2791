"""Bodies and queries of the calls for rounds and validation (docs/api.md)."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, AliasChoices, ConfigDict, Field
from pydantic_core import PydanticCustomError

from pocd.http.parsing import Input
from pocd.protocol.numbers import MOST_NODES, Index
from pocd.protocol.proof import FRAUD_THRESHOLD, MOST_NONCES
from pocd.validation.conditions import BodyConditions

CALLBACK_URL = r"^https?://[^\s?#@\\]+$"  # paths are appended to it, and it may carry no credentials


def _not_zero(count: int) -> int:
    if count == 0:
        raise PydanticCustomError("range", f"Input should be from 1 to {MOST_NODES}, or -1 for the configured number")
    return count


class InitBody(BodyConditions):
    """A round to mine or to validate for.

    A field that decides a result is refused where it differs from what this daemon runs. Other unknown fields are
    ignored, and listed in the answer.
    """

    model_config = ConfigDict(
        extra="allow",
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {
                    "block_hash": "9F2E5C",
                    "block_height": 4100000,
                    "public_key": "gonka1abc",
                    "r_target": 1.4042,
                    "node_id": 0,
                    "node_count": 1,
                }
            ]
        },
    )

    block_hash: str = Field(min_length=1, max_length=256, description="Block hash, used exactly as written.")
    block_height: Index
    public_key: str = Field(
        min_length=1, max_length=1024, description="The miner's public key, used exactly as written."
    )
    r_target: Annotated[float, Field(gt=0, le=2)] | None = Field(
        default=None,
        description="A nonce is valid when its distance is below this. Required with a scheme of distances; with one "
        "of vectors there is none, as every nonce with a finite vector is valid.",
    )
    fraud_threshold: float = Field(
        default=FRAUD_THRESHOLD, gt=0, lt=1, description="Batches are fraud below this probability of honesty."
    )
    node_id: Annotated[int, Field(ge=-1, lt=MOST_NODES)] = Field(
        default=-1,
        description="Index of the node, which checks the nonces node_id + node_count · x. -1: as configured.",
    )
    # One type with a hole in it: of a union the refusal would name the first kind, and not the field with its range.
    node_count: Annotated[int, Field(ge=-1, le=MOST_NODES), AfterValidator(_not_zero)] = Field(
        default=-1,
        description="Number of the miner's nodes. -1: as configured.",
        json_schema_extra={"not": {"const": 0}},
    )
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Ignored: worker.batch_size decides, and no distance depends on it."
    )
    callback_url: Annotated[str, Field(max_length=2048, pattern=CALLBACK_URL)] | None = Field(
        default=None,
        validation_alias=AliasChoices("callback_url", "url"),
        description="Receiver of this round's batches, POSTed to the URL + /generated and /validated, beside the "
        "configured receivers. Its origin must be configured. `url` is another name of this field.",
    )

    @property
    def ignored(self) -> list[str]:
        """Names of the fields that were given and are ignored."""
        unused = {"batch_size": self.batch_size, "params.batch_size": self.params and self.params.batch_size}
        return [*(self.model_extra or {}), *(name for name, value in unused.items() if value is not None)]


class ValidateQuery(Input):
    """The query of `POST /api/v1/pow/validate`."""

    wait: bool = Field(default=True, description="True: answer when the verdict is there, or after 30 seconds.")
    sample: Annotated[int, Field(ge=1, le=MOST_NONCES)] | None = Field(
        default=None, description="Number of nonces to recompute, drawn by `seed`. Absent: all."
    )
    seed: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="Seed of the sample: equal seeds draw equal samples."
    )
