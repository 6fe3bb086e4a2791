"""Fields of a body that decide a result, and the refusal of a body in which they differ from what this daemon runs.

They are the same for an init and for a batch to validate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from pocd.protocol.bodies import ShortName
from pocd.protocol.numbers import Count, Index
from pocd.protocol.schemes import SCHEMES, VECTOR_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_UNKNOWN = 16  # names that a refusal lists
BY_NAME = {"model", "model_id", "revision"}  # fields that name the weights
BY_WEIGHTS = {"model_fingerprint", "fingerprint"}  # fields that identify the weights by their values
HINT = (
    ". Names are compared as model.name and model.revision spell them: for a folder of the same weights give the "
    "folder's name, or instead of names only the model_fingerprint, which GET /api/v1/pow/status returns"
)


class MismatchError(Exception):
    """A body asks for a computation that this daemon does not do, so the result would be another one.

    Attributes:
        code: Name of the error for programs.
        field: Field that differs; those of `params` have the prefix "params.".
    """

    code = "mismatch"

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class Conditions(BaseModel):
    """All fields that decide a result. A field that is null or missing does not count.

    A body with a field that differs from what this daemon runs is refused.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    model: Annotated[ShortName | None, Field(description="Name of the model, exactly as in `model.name`.")] = None
    model_id: Annotated[ShortName | None, Field(description="Another name of the field `model`.")] = None
    revision: Annotated[
        ShortName | None, Field(description="Revision of the model, exactly as in `model.revision`.")
    ] = None
    model_fingerprint: Annotated[
        ShortName | None, Field(description="Fingerprint of the model's weights, as in the status.")
    ] = None
    fingerprint: Annotated[ShortName | None, Field(description="Another name of the field `model_fingerprint`.")] = None
    scheme: Annotated[ShortName | None, Field(description="Name of the scheme: `round.scheme`.")] = None
    poc_scheme: Annotated[ShortName | None, Field(description="Another name of the field `scheme`.")] = None
    dtype: Annotated[ShortName | None, Field(description="Precision of the computation: `model.dtype`.")] = None
    seq_len: Annotated[
        Count | None,
        Field(description="Sequence length in positions. An init may ask for another one than `round.seq_len`."),
    ] = None
    poc_stronger_rng: Annotated[
        bool | None, Field(description="Whether inputs are drawn by 256-bit seeds: must be false.")
    ] = None
    group_id: Annotated[Index | None, Field(description="Index of the group of the node's nonces: must be 0.")] = None
    n_groups: Annotated[Count | None, Field(description="Number of groups of the node's nonces: must be 1.")] = None
    k_dim: Annotated[
        Index | None, Field(description="Length of a result vector: 12 with a scheme of vectors, else must be absent.")
    ] = None
    max_tokens: Annotated[
        Index | None, Field(description="Number of tokens to decode: not supported, must be absent.")
    ] = None
    quantization: Annotated[
        ShortName | None,
        Field(description="Quantisation of weights beyond the checkpoint's: not supported, must be absent."),
    ] = None
    kv_cache_dtype: Annotated[
        ShortName | None, Field(description="Precision of the KV cache: not supported, must be absent.")
    ] = None


class Params(Conditions):
    """The round's parameters. An unknown name is refused with 409, since it may decide a result."""

    model_config = ConfigDict(extra="allow")

    batch_size: Annotated[Count | None, Field(description="Ignored: no distance depends on it.")] = None


class BodyConditions(Conditions):
    """Fields that decide a result, at the top of a body and in its `params`, which may not contradict each other."""

    params: Annotated[
        Params | None,
        Field(description="Fields that decide a result, grouped as orchestrators send them. Unknown ones are refused."),
    ] = None


def running(
    *, model: str, revision: str | None, fingerprint: str | None, scheme: str, dtype: str, seq_len: int
) -> dict[str, object]:
    """Return the one value that each field of `Conditions` may have; None where the field must be absent."""
    return {
        "model": model,
        "model_id": model,
        "revision": revision,
        "model_fingerprint": fingerprint,
        "fingerprint": fingerprint,
        "scheme": scheme,
        "poc_scheme": scheme,
        "dtype": dtype,
        "seq_len": seq_len,
        "poc_stronger_rng": False,
        "group_id": 0,
        "n_groups": 1,
        "k_dim": VECTOR_SIZE if SCHEMES[scheme].output == "vector" else None,
        "max_tokens": None,
        "quantization": None,
        "kv_cache_dtype": None,
    }


def named(body: BodyConditions) -> dict[str, dict[str, object]]:
    """Return the fields that a body has: values by field name, then by the place where they are given."""
    found: dict[str, dict[str, object]] = {}
    for prefix, part in (("", body), ("params.", body.params)):
        for name in Conditions.model_fields:
            value = getattr(part, name, None)
            if value is not None:
                found.setdefault(name, {})[prefix + name] = value
    return found


def refuse_mismatch(body: BodyConditions, runs: Mapping[str, object], phrase: str, done: str) -> None:
    """Refuse a body in which a field differs from what is computed.

    Args:
        body: The body that was received.
        runs: Allowed values, as `running` returns them; fields left out of it may have any one value.
        phrase: Text of the difference, with placeholders {asked} and {runs}.
        done: Text which says that nothing was done.

    Raises:
        MismatchError: A field differs, contradicts itself, or is unknown.
    """
    for name, places in named(body).items():
        first, *_ = places
        for place, value in places.items():
            if name in runs and value != runs[name]:
                held = "none" if runs[name] is None else repr(runs[name])
                hint = HINT if name in BY_NAME else ""
                raise MismatchError(f"{place}: {phrase.format(asked=repr(value), runs=held)}; {done}{hint}", place)
            if value != places[first]:
                message = f"{place}: {value!r} contradicts {first}, which is {places[first]!r}; {done}"
                raise MismatchError(message, place)
    unknown = list((body.params.model_extra if body.params else None) or ())
    if unknown:
        shown = ", ".join(f"{name[:64]!r}" for name in unknown[:MOST_UNKNOWN])
        more = f" and {len(unknown) - MOST_UNKNOWN} more" if len(unknown) > MOST_UNKNOWN else ""
        message = f"params: {shown}{more}: this daemon does not know them, and they may decide a result; {done}"
        raise MismatchError(message, "params")
