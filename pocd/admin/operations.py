"""The table of the API's operations: the routes and the OpenAPI document are both made from it.

An operation's summary and description are its handler's docstring.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import orjson
from aiohttp import web
from pydantic import BaseModel, Field

from pocd.admin.guard import OPEN_PATHS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterable, Mapping

    from aiohttp.typedefs import Handler, Middleware

LARGEST_BODY = 64 * 1024  # bytes, where an operation names no other limit
METHODS = frozenset({"GET", "POST", "DELETE"})


class ErrorDetail(BaseModel):
    """An error: its code, its text for people, and the field at fault."""

    code: str = Field(description="Short name of the error, for programs.")
    message: str = Field(description="Text for people: the error, where it is, and what to do.")
    field: str | None = Field(description="The field at fault; null when it is no single one.")


class Error(BaseModel):
    """Body of every error answer; nothing was changed, but after `store_busy`, when what was begun may be done yet."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class Media:
    """An answer that is not JSON: its content type and its meaning."""

    type: str
    meaning: str


Answer = type[BaseModel] | Media | str
"""Description of an answer: a model of its JSON; another medium; or, for an `Error`, when it is given."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of the API.

    Attributes:
        tag: Heading of the operation in the documentation.
        query: Model of the query; None where the operation has none, and ignores any.
        body: Model of the JSON body; None where the operation has none, and ignores any.
        answers: Answers by HTTP status, apart from those that `all_answers` adds.
        largest_body: Largest body in bytes; a larger one is refused with 413.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    tag: str
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    answers: Mapping[int, Answer] = field(default_factory=dict)
    largest_body: int = LARGEST_BODY

    def is_secured(self, methods: Container[str]) -> bool:
        """Tell whether the operation needs the token, given the methods whose calls need it."""
        return self.method in methods and self.path not in OPEN_PATHS


def all_answers(operation: Operation, secured: Container[str]) -> dict[int, Answer]:
    """Return all answers of an operation by HTTP status: its own, and those that the server gives for it.

    Args:
        operation: The operation to describe.
        secured: HTTP methods whose calls need the token.
    """
    common: dict[int, Answer] = {
        403: "The `Host`, or a browser's `Origin` or `Sec-Fetch-Site`, is foreign (`foreign_host`, `foreign_origin`).",
    }
    if operation.is_secured(secured):
        common[401] = "The token is missing or wrong (`unauthorized`)."
    if operation.query or operation.body:
        common[400] = (
            "The request is malformed or a field is wrong (`invalid_request`, `malformed_json`, `unreadable_body`, "
            "`too_many_values`)."
        )
    if operation.body:
        common[408] = "The body did not come in time (`too_slow`)."
        common[413] = f"The body is larger than {operation.largest_body} bytes (`request_entity_too_large`)."
    if operation.path.startswith("/api/"):
        common[503] = "The store cannot do it now (`store_unavailable`, `store_busy`); try again later."
    return dict(sorted({**common, **operation.answers}.items()))


def answer(model: BaseModel, status: int = 200) -> web.Response:
    """Return `model` as a JSON answer, its fields in their order, with a line's end for people who use curl."""
    # What `model_dump_json` gives, in a third of the time; no model here has aliases or serialisers of its own.
    options = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    body = orjson.dumps(model, default=vars, option=options)
    return web.Response(body=body, status=status, content_type="application/json")


def routes(operations: Iterable[Operation]) -> list[web.RouteDef]:
    """Return the operations' routes; each GET answers HEAD too."""
    return [
        web.get(each.path, each.handler) if each.method == "GET" else web.route(each.method, each.path, each.handler)
        for each in operations
    ]


def limit_bodies(operations: Iterable[Operation]) -> Middleware:
    """Return the middleware that limits each body to its operation's `largest_body`; it precedes what reads bodies."""
    largest: dict[tuple[str, str], int] = {(each.method, each.path): each.largest_body for each in operations}

    @web.middleware
    async def limit(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        size = largest.get((request.method, resource.canonical), LARGEST_BODY) if resource else LARGEST_BODY
        return await handler(request.clone(client_max_size=size))

    return limit
