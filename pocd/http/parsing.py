"""Requests parsed by pydantic models; a wrong one is refused with the name of the field at fault.

The same models describe the calls in `/openapi.json`, so the document cannot promise what is not taken.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from aiohttp import web
from pydantic import BaseModel, ConfigDict, RootModel, ValidationError

from pocd.http.server import LARGE_BODY, RefusalError

if TYPE_CHECKING:
    from collections.abc import Callable

Parsed = TypeVar("Parsed", bound=BaseModel)
T = TypeVar("T")

MOST_NAMES = 4096  # of fields, and as many lists and objects, in a large body: no body of ours has more than dozens
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bodies")
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


async def apart(work: Callable[[], T]) -> T:
    """Run work on a large body in the one thread for that, and return its result.

    One piece at a time, in the order in which they came, each begun by the loop: so the loop gets a turn between any
    two of them, though each may keep the interpreter's lock from its begin to its end.
    """
    loop = asyncio.get_running_loop()
    async with _turns.setdefault(loop, asyncio.Lock()):
        return await loop.run_in_executor(_thread, work)


def refuse_shape(raw: bytes, most_values: int, pair: bytes | None = None) -> None:
    """Refuse a large body that no caller of ours can mean, before it is unpacked: that would take seconds, and memory.

    Args:
        raw: The body.
        most_values: Most values that a body may have.
        pair: A field, in quotes, that any number of objects may have beside another; None where no body has many.

    Raises:
        RefusalError: 400 `too_many_values`: more values than `most_values`, or more fields, lists or objects than
            `MOST_NAMES` and those with a `pair`.
    """
    if len(raw) <= LARGE_BODY:
        return
    if raw.count(b",") > most_values:
        raise RefusalError(400, "too_many_values", f"the body has more than {most_values} commas")
    pairs = raw.count(pair) if pair else 0
    if raw.count(b":") > MOST_NAMES + 2 * pairs or raw.count(b"[") + raw.count(b"{") > MOST_NAMES + pairs:
        raise RefusalError(400, "too_many_values", f"the body has more than {MOST_NAMES} fields, lists or objects")


class Input(BaseModel):
    """Base of the models that parse requests: no unknown names, and numbers that are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


async def parse_body(
    request: web.Request, model: type[Parsed], *, most_values: int = MOST_NAMES, pair: bytes | None = None
) -> Parsed:
    """Return the JSON body as a `model`; an empty body counts as `{}`.

    Strict: a string where a number belongs is refused.

    Args:
        request: The request.
        model: Model of the body.
        most_values: Most values in a large body, see `refuse_shape`.
        pair: A field that any number of objects may have, see `refuse_shape`.

    Raises:
        RefusalError: 400 `unreadable_body`, `malformed_json`, `too_many_values`, or `invalid_request` with the field.
        web.HTTPRequestEntityTooLarge: The body is larger than the operation allows.
    """
    try:
        raw = await request.read()
    except web.RequestPayloadError as error:  # broken chunks
        raise RefusalError(400, "unreadable_body", f"the body is cut short or malformed: {error}") from None

    def parse() -> Parsed:
        refuse_shape(raw, most_values, pair)
        return model.model_validate_json(raw or b"{}", strict=True)

    try:
        return await apart(parse) if len(raw) > LARGE_BODY else parse()
    except ValidationError as error:
        raise _refusal(error, model) from None


def parse_query(request: web.Request, model: type[Parsed]) -> Parsed:
    """Return the query as a `model`, whose fields are read from strings.

    Raises:
        RefusalError: 400 `invalid_request` with the field.
    """
    for name in request.query:
        if len(request.query.getall(name)) > 1:
            raise RefusalError(400, "invalid_request", f"{name}: may be given once only", name)
    try:
        return model.model_validate(dict(request.query))
    except ValidationError as error:
        raise _refusal(error, model) from None


def _refusal(error: ValidationError, model: type[BaseModel]) -> RefusalError:
    """Return the refusal for the first error: the field, the problem, and what is allowed instead."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return RefusalError(400, "malformed_json", message)
    place = first["loc"][1:] if issubclass(model, RootModel) else first["loc"]  # without which of several it is
    if not place:
        message = "the body has to be a JSON object" if kind == "model_type" else message
        return RefusalError(400, "invalid_request", message)
    if kind == "extra_forbidden" and len(place) == 1:
        message = f"there is no such field; known are {', '.join(_names(model)) or 'none'}"
    where = ".".join(map(str, place))
    return RefusalError(400, "invalid_request", f"{where}: {message}", str(place[0]))


def _names(model: type[BaseModel]) -> list[str]:
    properties: dict[str, Any] = model.model_json_schema()["properties"]
    return list(properties)
