"""Who may call an API of the daemon: the host that is asked, the page that asks, the token (docs/protocol.md, 7)."""

from __future__ import annotations

import hmac
import ipaddress
import re
from typing import TYPE_CHECKING

from aiohttp import web

from pocd.config.listeners import LOOPBACK_HOSTS
from pocd.http.server import RefusalError

if TYPE_CHECKING:
    from collections.abc import Container

    from aiohttp.typedefs import Handler, Middleware

    from pocd.config.listeners import AdminSettings, OrchestratorSettings

OPEN_PATHS = frozenset(
    {"/", "/healthz", "/readyz", "/docs", "/openapi.json"}
)  # for probes and readers, who have no token
READS = frozenset({"GET", "HEAD"})
OWN_SITES = frozenset({"same-origin", "none"})  # none: what somebody typed into the browser, or has as a bookmark

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]*)?", re.ASCII)  # RFC 9110 section 7.2


def middlewares(
    served: AdminSettings | OrchestratorSettings, token: str | None, *, section: str = "admin", open_reads: bool = False
) -> list[Middleware]:
    """Return the middlewares that check every request before an API does, in this order.

    Args:
        served: Settings of the API, with the allowed host names.
        token: Bearer token that callers must give; None where none is needed.
        section: Section of the configuration that `served` is.
        open_reads: Whether reading needs no token.
    """
    names = LOOPBACK_HOSTS | {served.host.lower(), *served.allowed_hosts}
    guards = [_refuse_foreign_hosts(names, section, any_address=served.beyond_loopback), _refuse_foreign_origins]
    return [*guards, _require_token(token, section, open_reads=open_reads)] if token else guards


def is_own_host(header: str, names: Container[str], *, any_address: bool) -> bool:
    """Tell whether a Host header names this daemon.

    A web page whose name was made to point here (DNS rebinding) is, for its browser, of our origin; its name in Host
    gives it away. Ports do not count. An address is no name, so nobody can have pointed it here.

    Args:
        header: Value of the Host header.
        names: Allowed host names in lower case; IPv6 addresses without brackets.
        any_address: Whether every IP address is allowed.
    """
    found = _HOST.fullmatch(header)
    if found is None:
        return False
    host = found[1].strip("[]").lower()
    try:
        address = str(ipaddress.ip_address(host))
    except ValueError:
        return host in names
    return any_address or address in names


def _refuse_foreign_hosts(names: Container[str], section: str, *, any_address: bool) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        # HTTP/1.0 has no Host, and browsers always send one.
        if all(is_own_host(host, names, any_address=any_address) for host in request.headers.getall("Host", [])):
            return await handler(request)
        message = f"the API is not called by this name; {section}.allowed_hosts says by which ones it is"
        raise RefusalError(403, "foreign_host", message, "Host")

    return check


@web.middleware
async def _refuse_foreign_origins(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a browser sends for a page of another server, or of none (`null`).

    Of requests without an Origin, such as those that an image or a link makes, browsers tell the site in Sec-Fetch-Site
    (W3C Fetch Metadata). Such a page cannot read the answer, but could take all places of listeners. A link to one of
    the pages may be followed.
    """
    own = f"http://{request.headers.get('Host', '')}"
    headers = request.headers
    if not all(origin == own for origin in headers.getall("Origin", [])):
        raise RefusalError(403, "foreign_origin", "web pages of other servers may not call the API", "Origin")
    follows_link = headers.get("Sec-Fetch-Mode") == "navigate" and request.path in OPEN_PATHS
    if follows_link or all(site in OWN_SITES for site in headers.getall("Sec-Fetch-Site", [])):
        return await handler(request)
    raise RefusalError(403, "foreign_origin", "web pages of other servers may not call the API", "Sec-Fetch-Site")


def _require_token(token: str, section: str, *, open_reads: bool) -> Middleware:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        is_open = request.path in OPEN_PATHS or (open_reads and request.method in READS)
        if is_open or hmac.compare_digest(given, expected):
            return await handler(request)
        message = f"give the header 'Authorization: Bearer TOKEN' ({section}.token_file)"
        raise RefusalError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})

    return check
