"""Text from outside made fit for people: no secrets, no character that a terminal obeys, one line."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Sequence

SHORTEST_SECRET = 4  # characters; to hide a shorter one would garble every text, and hide nothing

_CREDENTIALS = re.compile(r"""://[^\s/"'?#]*@""")
_BEGUN = re.compile(r"""://[^\s/"'?#]*\Z""")


def clean(text: str, *, keep: str = "") -> str:
    """Return text from outside with each character replaced that a terminal would not print but obey.

    These are control characters, format characters such as those that turn the direction of writing, and what is no
    character at all. A line end is one of them: text from outside is not to look like a line of ours.

    Args:
        text: From anybody.
        keep: Characters that stay all the same.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else "\ufffd" for c in text)


def escape_json(text: str) -> str:
    """Return JSON that means the same, with each character escaped that a terminal would not print but obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def mask_url(url: str) -> str:
    """Return `url` without what may be secret: user info, the query's values, the fragment.

    `https://user:pass@host/rpc?key=abc` becomes `https://***@host/rpc?key=***`. Works on anything, also on what is not
    a URL, and never raises; control characters become U+FFFD. A secret in the path stays: it cannot be told from a
    name.
    """
    address, question_mark, query = url.partition("#")[0].partition("?")
    scheme, separator, rest = address.partition("://") if "://" in address else ("", "", address)
    if "@" in rest:
        # Up to the last @, even after a slash: rather hide too much than half of a password that was not encoded.
        rest = "***@" + rest.rpartition("@")[2]
    masked = scheme + separator + rest + question_mark + "&".join(_mask_parameter(part) for part in query.split("&"))
    return clean(masked)


def _mask_parameter(part: str) -> str:
    name, equals, _ = part.partition("=")
    if equals:
        return f"{name}=***"
    return "***" if part else ""  # a bare word may be a key as well


def url_secrets(url: str) -> tuple[str, ...]:
    """Return the forms in which user info and query of `url` may come back from its host: as text, or as it was sent.

    The longest first, so that replacing them one after another leaves no piece of one.
    """
    address, _, query = url.partition("#")[0].partition("?")
    values = {parameter.partition("=")[2] or parameter for parameter in query.split("&")}
    forms = values | {unquote(value) for value in values}
    info, at, _ = address.partition("://")[2].partition("/")[0].rpartition("@")
    if at:
        user, _, password = info.partition(":")
        plain = f"{unquote(user)}:{unquote(password)}"
        forms |= {info, plain, password, unquote(password)}
        forms |= {base64.b64encode(plain.encode(encoding, "replace")).decode() for encoding in ("utf-8", "latin-1")}
    return tuple(sorted((form for form in forms if len(form.strip(":")) >= SHORTEST_SECRET), key=len, reverse=True))


def mask_credentials(text: str) -> str:
    """Return `text` with the user info of all URLs in it masked."""
    return _CREDENTIALS.sub("://***@", text)


def excerpt(data: bytes | str, limit: int = 80, *, secrets: Sequence[str] = (), cut: bool = False) -> str:
    """Return the first `limit` characters of `data` on one line and without secrets, or "(nothing)".

    Control characters and runs of white space become one space; bytes that are not UTF-8 become U+FFFD; an ellipsis
    says that more came. What is secret is masked before anything is cut away, and where `data` was cut already, a
    secret that begins at its end goes too.

    Args:
        data: From anybody.
        limit: In characters.
        secrets: To be masked, as of `url_secrets`; the user info of any URL is masked besides.
        cut: Whether `data` may be only the beginning of what came.
    """
    ample = data[: 16 * limit]  # enough for `limit` characters, and megabytes of HTML cost nothing
    cut = cut or len(ample) < len(data)
    text = ample.decode("utf-8", "replace") if isinstance(ample, bytes) else ample
    for secret in secrets:
        text = text.replace(secret, "***")
    text = mask_credentials(text)
    if cut:
        text = _drop_begun(text, secrets)
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    if cut or len(line) > limit:
        line = line[:limit] + "…"
    return line or "(nothing)"


def _drop_begun(text: str, secrets: Sequence[str]) -> str:
    """Drop from the end of `text` what may be the beginning of a secret, or of a URL's user info."""
    text = _BEGUN.sub("://", text.rstrip("\ufffd"))  # its last character may be cut too
    lengths = (length for secret in secrets for length in range(1, len(secret)) if text.endswith(secret[:length]))
    return text[: len(text) - max(lengths, default=0)]
