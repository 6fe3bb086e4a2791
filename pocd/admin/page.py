"""The status page, `GET /`: one file without outside resources, which reads the API as any client does."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from aiohttp import web

from pocd.admin.operations import Media, Operation

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def policy(page: str) -> str:
    """Return the Content-Security-Policy that lets a page's own style and script run, and nothing else.

    They are named by their hashes (CSP level 3, section 2.3.1), so what got into the page otherwise would not run.
    """
    style, script = (
        " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in found)
        for found in (re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("style", "script"))
    )
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


HEADERS = {
    "Content-Security-Policy": policy(PAGE),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def page(_request: web.Request) -> web.Response:
    """Return the status page for a browser, which updates itself.

    The page itself holds no data. It reads `/api/v1/pow/status` and `/api/v1/pow/events`, and asks its reader for the
    token where they do.
    """
    return web.Response(text=PAGE, content_type="text/html", headers=HEADERS)


OPERATION = Operation("GET", "/", page, "daemon", answers={200: Media("text/html", "The page.")})
