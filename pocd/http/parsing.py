"""Requests parsed by pydantic models; a wrong one is refused with the name of the field at fault.

The same models describe the calls in `/openapi.json`, so the document cannot promise what is not taken.
"""

from __future__ import annotations

from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from pocd.http.server import RefusalError

Parsed = TypeVar("Parsed", bound=BaseModel)


class Input(BaseModel):
    """Base of the models that parse requests: no unknown names, and numbers that are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


async def parse_body(request: web.Request, model: type[Parsed]) -> Parsed:
    """Return the JSON body as a `model`; an empty body counts as `{}`.

    Strict: a string where a number belongs is refused.

    Raises:
        RefusalError: 400 `unreadable_body`, `malformed_json`, or `invalid_request` with the field.
        web.HTTPRequestEntityTooLarge: The body is larger than the operation allows.
    """
    try:
        raw = await request.read()
    except web.RequestPayloadError as error:  # broken chunks
        raise RefusalError(400, "unreadable_body", f"the body is cut short or malformed: {error}") from None
    try:
        return model.model_validate_json(raw or b"{}", strict=True)
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
    if not first["loc"]:
        message = "the body has to be a JSON object" if kind == "model_type" else message
        return RefusalError(400, "invalid_request", message)
    if kind == "extra_forbidden" and len(first["loc"]) == 1:
        message = f"there is no such field; known are {', '.join(_names(model)) or 'none'}"
    where = ".".join(map(str, first["loc"]))
    return RefusalError(400, "invalid_request", f"{where}: {message}", str(first["loc"][0]))


def _names(model: type[BaseModel]) -> list[str]:
    properties: dict[str, Any] = model.model_json_schema()["properties"]
    return list(properties)
