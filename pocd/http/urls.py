"""URLs of others, sent as they are written, or refused with the reason."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import quote, urlsplit

from yarl import URL

from pocd.http.addresses import NUMERIC

_NO_NAME = re.compile(r"[!-,/:-@\[-^`{-~]")  # the punctuation of ASCII but . _ -


def as_written(url: str) -> URL:
    """Return `url` with its path and query as they are: whoever signs or compares them knows no other spelling.

    Raises:
        ValueError: `url` is not a URL.
    """
    parts = urlsplit(url)
    rest = parts._replace(scheme="", netloc="").geturl()
    ascii_only = re.sub("[^!-~]+", lambda found: quote(found[0]), rest)  # what no request line can hold
    return URL(str(URL(f"{parts.scheme}://{parts.netloc}")).rstrip("/") + ascii_only, encoded=True)


def below(url: str, path: str, query: str = "") -> URL:
    """Return the address of `path` below `url`, with the query of `url` before `query`; all of it as written.

    Raises:
        ValueError: `url` is not a URL.
    """
    address, _, own = url.partition("?")
    queries = "&".join(part for part in (own, query) if part)
    return as_written(f"{address.rstrip('/')}/{path}" + (f"?{queries}" if queries else ""))


def unusable(url: str) -> str | None:
    """Return what is wrong with a URL that no request can be sent to as it is written; None where one can.

    The text never quotes the URL, which may hold credentials.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        good = parts.scheme in {"http", "https"} and parts.port != 0
    except ValueError:  # its text would show the credentials
        host, good = None, False
    if host is None or not good or " " in url or not url.isprintable():
        return "must be an http:// or https:// URL with a host, a port of 1 to 65535 or none, and no blanks"
    if "#" in url:
        return "must have no fragment, which is never sent: write %23 for a #"
    if wrong := _unusable_host(host, bracketed="[" in parts.netloc):
        return wrong
    try:
        _ = as_written(url).host  # which decodes what is IDNA
    except ValueError:
        return "must have a host that can be looked up, and user info in which all but letters and digits is %-encoded"
    return None


def _unusable_host(host: str, *, bracketed: bool) -> str | None:
    try:
        if bracketed:
            wrong = "must have an IPv6 address in its brackets, without a scope, such as [2001:db8::1]"
            return wrong if ipaddress.IPv6Address(host).scope_id else None
        wrong = "must have a host of letters, digits and . _ -, or an IPv6 address in brackets"
        if _NO_NAME.search(host):
            return wrong
        if NUMERIC.fullmatch(host.removesuffix(".").rpartition(".")[2]):
            wrong = "must have a host name, or an IPv4 address as four decimal numbers, such as 127.0.0.1"
            ipaddress.IPv4Address(host)
        wrong = "must have a host with 1 to 63 characters between its dots"
        host.encode("idna")
    except ValueError:
        return wrong
    return None
