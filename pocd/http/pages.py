"""Browsers kept out of programs that only other programs call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from pocd.http.server import RefusalError

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler


@web.middleware
async def refuse_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a browser sends for a web page, of whatever name it has made point here (DNS rebinding).

    Browsers name the page in Origin whenever a call may change something; senders of proofs are no browsers.
    """
    if "Origin" in request.headers:
        raise RefusalError(403, "foreign_origin", "web pages may not call this", "Origin")
    return await handler(request)
