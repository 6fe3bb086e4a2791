"""What decides a result, as a body may name it; and the refusal of a body that names what this daemon does not run.

An init and a batch to validate are both held to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from pocd.protocol.bodies import Count, Index, Name

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_UNKNOWN = 16  # names that a refusal lists
BY_NAME = {"model", "model_id", "revision"}  # what tells which weights are meant, by a word
BY_WEIGHTS = {"model_fingerprint", "fingerprint"}  # and by themselves
HINT = (
    ". Names are compared as model.name and model.revision spell them: for a folder of the same weights give the "
    "folder's name, or instead of names only the model_fingerprint, which GET /api/v1/pow/status tells"
)


class MismatchError(Exception):
    """A body names what is not what this daemon computes, so its result would be another one.

    Attributes:
        code: A word for programs.
        field: What differs; of `params` with the prefix "params.".
    """

    code = "mismatch"

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class Deciding(BaseModel):
    """Everything that decides a result and has a name. What is null or missing is not named.

    A body that names what this daemon does not run exactly so is refused.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    model: Annotated[Name | None, Field(description="As `model.name` spells it.")] = None
    model_id: Annotated[Name | None, Field(description="The same as `model`.")] = None
    revision: Annotated[Name | None, Field(description="As `model.revision` spells it.")] = None
    model_fingerprint: Annotated[Name | None, Field(description="Of the model's weights, as status tells it.")] = None
    fingerprint: Annotated[Name | None, Field(description="The same as `model_fingerprint`.")] = None
    scheme: Annotated[Name | None, Field(description="How distances are computed: `round.scheme`.")] = None
    poc_scheme: Annotated[Name | None, Field(description="The same as `scheme`.")] = None
    dtype: Annotated[Name | None, Field(description="The precision of the computation: `model.dtype`.")] = None
    seq_len: Annotated[
        Count | None,
        Field(description="Sequence length in positions. An init may ask for another one than `round.seq_len`."),
    ] = None
    poc_stronger_rng: Annotated[bool | None, Field(description="Inputs by 256-bit seeds: false here.")] = None
    group_id: Annotated[Index | None, Field(description="Which group of the node's nonces: 0 here.")] = None
    n_groups: Annotated[Count | None, Field(description="Among how many groups they are shared: 1 here.")] = None
    k_dim: Annotated[Index | None, Field(description="Length of a vector as the result: there is none here.")] = None
    max_tokens: Annotated[Index | None, Field(description="Tokens to decode: there are none here.")] = None
    quantization: Annotated[Name | None, Field(description="Of weights, beyond the checkpoint's: none here.")] = None
    kv_cache_dtype: Annotated[Name | None, Field(description="A precision of the cache: there is no cache here.")] = (
        None
    )


class Params(Deciding):
    """The round's parameters. An unknown name is refused with 409, since it may decide a result."""

    model_config = ConfigDict(extra="allow")

    batch_size: Annotated[Count | None, Field(description="Not used: no distance depends on it.")] = None


class Named(Deciding):
    """What decides a result, at the top of a body and in its `params`, which may not contradict each other."""

    params: Annotated[
        Params | None, Field(description="The same names, as orchestrators group them. Unknown ones are refused.")
    ] = None


def running(
    *, model: str, revision: str | None, fingerprint: str | None, scheme: str, dtype: str, seq_len: int
) -> dict[str, object]:
    """Return the one value that each field of `Deciding` may have; None where nothing here has such a thing."""
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
        "k_dim": None,
        "max_tokens": None,
        "quantization": None,
        "kv_cache_dtype": None,
    }


def said(body: Named) -> dict[str, dict[str, object]]:
    """Return what a body names: by the field's name, then by the place where it is named."""
    found: dict[str, dict[str, object]] = {}
    for prefix, part in (("", body), ("params.", body.params)):
        for name in Deciding.model_fields:
            value = getattr(part, name, None)
            if value is not None:
                found.setdefault(name, {})[prefix + name] = value
    return found


def refuse_mismatch(body: Named, runs: Mapping[str, object], phrase: str, done: str) -> None:
    """Refuse a body that names what is not what is computed.

    Args:
        body: What was received.
        runs: As `running` returns it. A name that was taken out is not compared, but may not be contradicted.
        phrase: Says that {asked} is not what {runs}.
        done: Says that nothing was done.

    Raises:
        MismatchError: Something differs, contradicts itself, or is unknown.
    """
    for name, places in said(body).items():
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
