"""How the body of a batch is stored."""

from __future__ import annotations

import sqlite3
import zlib

PAGE_BYTES = 4096  # of the store's file
LEVEL = 2  # of zlib: vectors in base64 shrink to what they were before, in a millisecond for a thousand


class BodyError(sqlite3.DatabaseError):
    """A stored body is not what was stored: of a long text SQLite itself checks nothing."""

    sqlite_errorname = "SQLITE_CORRUPT"


def pack_body(body: bytes) -> bytes:
    """Return a batch's body, a JSON object, as it is stored: what is longer than a page is deflated."""
    return body if len(body) <= PAGE_BYTES else zlib.compress(body, LEVEL)


def unpack_body(stored: bytes) -> bytes:
    """Return the body that `pack_body` was given; bodies that versions before 5 stored are as they were sent.

    Raises:
        BodyError: The stored body cannot be read.
    """
    if stored.startswith(b"{"):
        return stored
    try:
        return zlib.decompress(stored)
    except zlib.error as error:
        raise BodyError(f"a stored batch cannot be read: {error}") from None
