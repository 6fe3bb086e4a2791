"""What our HTTP servers share: JSON answers, one form of error, and a server that runs as long as its context."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp.typedefs import Handler


class RefusalError(Exception):
    """A request is refused: the HTTP status, a word for programs, and which field is at fault, if one is."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field

    def body(self) -> dict[str, object]:
        """The one form of error (docs/protocol.md section 7)."""
        return {"error": {"code": self.code, "message": str(self), "field": self.field}}


def json_answer(value: object, status: int = 200) -> web.Response:
    """Return `value` as a JSON answer, with a line's end for people who use curl."""
    return web.Response(
        body=orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE), status=status, content_type="application/json"
    )


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer refusals, and aiohttp's own (no such route, body too large), in the one form of error."""
    try:
        return await handler(request)
    except RefusalError as error:
        return json_answer(error.body(), error.status)
    except web.HTTPClientError as error:  # raised again, for its headers
        refusal = RefusalError(error.status, error.reason.lower().replace(" ", "_"), error.text or error.reason)
        error.body = orjson.dumps(refusal.body())
        error.content_type = "application/json"
        raise


@asynccontextmanager
async def listening(app: web.Application, host: str, port: int, *, shutdown_timeout: float) -> AsyncIterator[str]:
    """Serve `app` while the context lasts, and give its URL.

    Args:
        app: What to serve.
        host: Address to bind.
        port: TCP port; 0 takes a free one.
        shutdown_timeout: Seconds that requests under way have to end, when the context ends.

    Raises:
        OSError: The address cannot be bound.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=shutdown_timeout)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        address, bound = runner.addresses[0][:2]
        yield f"http://[{address}]:{bound}" if ":" in address else f"http://{address}:{bound}"
    finally:
        await runner.cleanup()
