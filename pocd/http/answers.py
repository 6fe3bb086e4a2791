"""Reading answers: a status that came is believed, whatever else is wrong with what came after it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from aiohttp import ClientPayloadError, HttpVersion11, StreamReader
from aiohttp.http import RawResponseMessage
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict, CIMultiDictProxy

if TYPE_CHECKING:
    import asyncio

    from aiohttp.base_protocol import BaseProtocol
    from aiohttp.http_parser import HttpParser

    Messages = list[tuple[RawResponseMessage, StreamReader]]

HEAD_BYTES = 64 * 1024  # of an answer whose head the parser refuses; more than that is no answer
_STATUS_LINE = re.compile(rb"\s*HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?(?:\n|\Z)", re.IGNORECASE)
_HEAD_END = re.compile(rb"\n\r?\n")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:[ \t]*(.*?)[ \t]*")


class TolerantParser:
    """Aiohttp's parser of one answer; what it refuses is read once more for its status line and headers.

    Whether a receiver has accepted a batch is said by the status. Two lengths, a header without a colon or a body where
    there must be none make the body unknowable, not the status: reading that body fails.

    Args:
        parser: Aiohttp's parser.
        protocol: The connection.
        loop: The loop that the connection runs on.
    """

    def __init__(self, parser: HttpParser[Any] | None, protocol: BaseProtocol, loop: asyncio.AbstractEventLoop) -> None:
        assert parser is not None
        self._parser = parser
        self._protocol = protocol
        self._loop = loop
        self._answered = False  # the final answer's head was given on
        self._refused: HttpProcessingError | None = None
        self._came = b""  # so far, up to the final answer's head

    def feed_data(self, data: bytes) -> tuple[Messages, bool, bytes]:
        """Take bytes, and return the heads of answers that ended in them.

        Raises:
            HttpProcessingError: What came is no HTTP, or the body of the answer is broken.
        """
        if self._answered:
            return self._parser.feed_data(data) if self._refused is None else ([], False, b"")
        self._came += data
        if self._refused is None:
            try:
                messages, upgraded, tail = self._parser.feed_data(data)
            except HttpProcessingError as error:
                self._refused = error
            else:
                self._answered = any(not informational(message.code) for message, _ in messages)
                self._came = b"" if self._answered else _final(self._came)
                return messages, upgraded, tail
        return self._read_again(self._refused), False, b""

    def _read_again(self, refused: HttpProcessingError) -> Messages:
        status, headers = read_head(self._came)
        if status is None or headers is None:
            final = _final(self._came)
            to_come = status is not None or (len(final) < len(self._came) and b"\n" not in final)
            if to_come and len(self._came) <= HEAD_BYTES:
                return []  # the rest of the head, or the answer that was announced
            raise refused
        self._answered, self._came = True, b""
        raw = tuple((name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in headers.items())
        message = RawResponseMessage(
            HttpVersion11, status, "", CIMultiDictProxy(headers), raw, True, None, False, False
        )
        body = StreamReader(self._protocol, HEAD_BYTES, loop=self._loop)
        body.set_exception(ClientPayloadError(f"the body cannot be read: {refused.message}"))
        return [(message, body)]

    def feed_eof(self) -> RawResponseMessage | None:
        """Take notice that nothing more will come."""
        return self._parser.feed_eof() if self._refused is None else None

    def pause_reading(self) -> None:
        """Give on no more than what was taken, until the next bytes."""
        self._parser.pause_reading()


def informational(status: int) -> bool:
    """Tell whether another answer follows one of `status`: any 1xx but 101 (RFC 9110 section 15.2)."""
    return 100 <= status < 200 and status != 101


def read_head(came: bytes) -> tuple[int | None, CIMultiDict[str] | None]:
    """Read the final status and its headers from the beginning of what came on a connection, as far as they make sense.

    Returns:
        The status, None where what came does not begin with a status line; and the headers, None until all have come.
        Lines that are no header are left out.
    """
    came = _final(came)
    line = _STATUS_LINE.match(came)
    if line is None:
        return None, None
    end = _HEAD_END.search(came, line.end() - 1)
    if end is None:
        return int(line[1]), None
    text = came[line.end() : end.start()].decode("utf-8", "surrogateescape")
    found = (_HEADER.fullmatch(each.rstrip("\r")) for each in text.split("\n"))
    return int(line[1]), CIMultiDict((header[1], header[2]) for header in found if header)


def _final(came: bytes) -> bytes:
    """Leave out the answers that only announce another one."""
    while (line := _STATUS_LINE.match(came)) and informational(int(line[1])):
        end = _HEAD_END.search(came, line.end() - 1)
        if end is None:
            break
        came = came[end.end() :]
    return came
