"""Refusals in the form that the network's own programs give them: `{"detail": …}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from pocd.admin.orchestrator.bodies import LARGEST_GENERATE
from pocd.http.parsing import apart, refuse_shape
from pocd.http.server import LARGE_BODY, RefusalError, json_answer
from pocd.protocol.bodies import VECTOR_FIELD
from pocd.store.errors import StoreUnavailableError
from pocd.validation.jobs import MOST_NONCES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.typedefs import Handler

Parsed = TypeVar("Parsed", bound=BaseModel)

MOST_COMMAS = 3 * MOST_NONCES + 1000  # in a body: between the nonces, the artifacts, and the fields of each


class DetailError(Exception):
    """A refused call: its HTTP status, and the detail, a text or an object."""

    def __init__(self, status: int, detail: object, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers or {}

    def answer(self) -> web.Response:
        """Return the answer."""
        answer = json_answer({"detail": self.detail}, self.status)
        answer.headers.update(self.headers)
        return answer


@web.middleware
async def errors_as_details(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every refusal in the one form: our own, those of the guards, of aiohttp, and of a store that fails."""
    try:
        return await handler(request)
    except DetailError as error:
        return error.answer()
    except RefusalError as error:
        return DetailError(error.status, str(error), error.headers).answer()
    except StoreUnavailableError as error:
        return DetailError(503, f"{error}; nothing was changed, try again later").answer()
    except TimeoutError:
        return DetailError(503, "the store did not answer in time; what it had begun may be done yet").answer()
    except web.HTTPClientError as error:  # raised again, for its headers
        error.body = DetailError(error.status, error.reason).answer().body
        error.content_type = "application/json"
        raise


@web.middleware
async def limit_bodies(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Take large bodies where many artifacts may come."""
    size = LARGEST_GENERATE if request.path.endswith("/pow/generate") else LARGE_BODY
    return await handler(request.clone(client_max_size=size))


async def parse(request: web.Request, model: type[Parsed]) -> Parsed:
    """Return the JSON body as a `model`.

    Raises:
        DetailError: 422 with the fields that are wrong.
        RefusalError: 400 for a body that is too large to be meant.
        web.HTTPRequestEntityTooLarge: The body is larger than the call allows.
    """
    raw = await request.read()

    def parsed() -> Parsed:
        refuse_shape(raw, MOST_COMMAS, VECTOR_FIELD)
        return model.model_validate_json(raw or b"{}")

    try:
        return await apart(parsed) if len(raw) > LARGE_BODY else parsed()
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        found = [{"type": each["type"], "loc": ["body", *each["loc"]], "msg": each["msg"]} for each in wrong]
        raise DetailError(422, found) from None
