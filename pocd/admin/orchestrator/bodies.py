"""Bodies of the live network's orchestrators. Fields of `params` are exact; other unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field
from pydantic.dataclasses import dataclass

from pocd.admin.requests import CALLBACK_URL
from pocd.protocol.bodies import ShortName
from pocd.protocol.commitment import LARGEST_NONCE
from pocd.protocol.numbers import Count, Index
from pocd.protocol.schemes import VECTOR_SIZE
from pocd.validation.jobs import MOST_NONCES

MOST_NODES = 1024  # of one participant and model, so that a node does not run out of nonces of 31 bits
LARGEST_NODE = 1_000_000  # the number of a participant's newest node, who may have registered some again and again
LARGEST_GENERATE = 16 * 2**20  # bytes, for `MOST_NONCES` artifacts; 10,000 have 0.8 MB

Nonce = Annotated[int, Field(ge=0, le=LARGEST_NONCE)]


class Params(BaseModel):
    """The computation: an unknown field is refused, since it may decide a result."""

    model_config = ConfigDict(extra="forbid")

    model: ShortName
    seq_len: Count
    k_dim: Count = VECTOR_SIZE


class RoundBody(BaseModel):
    """A round of the live network, and whose share of its nonces is meant.

    Orchestrators number a participant's nodes from 1, those of all models together, and count the nodes of one model.
    So the number may be as large as the count, and larger: a node alone is number 1 of 1.
    """

    block_hash: ShortName
    block_height: Index
    public_key: Annotated[str, Field(min_length=1, max_length=1024)]
    node_id: Annotated[int, Field(ge=0, le=LARGEST_NODE)]
    node_count: Annotated[int, Field(ge=1, le=MOST_NODES)]
    params: Params
    url: Annotated[str, Field(max_length=2048, pattern=CALLBACK_URL)] | None = None
    poc_stronger_rng: bool = False


@dataclass(frozen=True, slots=True)  # 100,000 of them take a fifth of what pydantic's own models would
class ClaimedArtifact:
    """A nonce, and what its prover says its vector is."""

    nonce: Nonce
    vector_b64: Annotated[str, Field(max_length=4096)]


class ClaimedArtifacts(BaseModel):
    """Artifacts to be judged."""

    artifacts: Annotated[list[ClaimedArtifact], FailFast(), Field(max_length=MOST_NONCES)]


def _probability(value: object) -> float | None:
    """Return a number between 0 and 1; None for whatever else it is."""
    return value if isinstance(value, float) and 0 < value < 1 else None


class StatTest(BaseModel):
    """The terms of a verdict.

    `p_value_threshold` decides nothing, as with the network's own programs, so no value of it is refused.
    """

    dist_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    p_mismatch: Annotated[float, Field(gt=0, lt=1)] = 0.001
    fraud_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.01
    p_value_threshold: Annotated[float | None, BeforeValidator(_probability)] = None


class GenerateBody(RoundBody):
    """Nonces to be computed, and to be compared with `validation` where that is given."""

    nonces: Annotated[list[Nonce], FailFast(), Field(min_length=1, max_length=MOST_NONCES)]
    wait: bool = False
    validation: ClaimedArtifacts | None = None
    stat_test: Annotated[StatTest, BeforeValidator(lambda given: StatTest() if given is None else given)] = StatTest()
