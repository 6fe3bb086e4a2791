"""Answers with a flawed head: the status is believed, a body that cannot be told apart is not."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import ClientPayloadError
from hypothesis import given
from hypothesis import strategies as st

from pocd.http.answers import HEAD_BYTES, read_head
from pocd.http.client import open_session
from tests.support.delivering import talking
from tests.support.waiting import PATIENCE, soon

TIMEOUT = aiohttp.ClientTimeout(total=PATIENCE)
CHUNKED = "Transfer-Encoding: chunked"


def head(*lines: str, status: str = "HTTP/1.1 200 OK", end: str = "\r\n") -> bytes:
    return (end.join([status, *lines]) + 2 * end).encode()


FLAWED = {
    "a length beside chunks": head("Content-Length: 2", CHUNKED) + b"2\r\nok\r\n0\r\n\r\n",
    "chunks beside a length": head(CHUNKED, "Content-Length: 2") + b"2\r\nok\r\n0\r\n\r\n",
    "the same length twice": head("Content-Length: 2", "Content-Length: 2") + b"ok",
    "two lengths": head("Content-Length: 2", "Content-Length: 3") + b"ok",
    "a list of lengths": head("Content-Length: 2, 2") + b"ok",
    "a negative length": head("Content-Length: -5"),
    "identity beside a length": head("Transfer-Encoding: identity", "Content-Length: 2") + b"ok",
    "a line without a colon": head("X-Served-By node7") + b"ok",
    "a blank before the colon": head("X-Time : 3") + b"ok",
    "a blank in a name": head("X Served By: n") + b"ok",
    "HTTP in lower case": head(status="http/1.1 200 OK"),
    "bare line ends and a flaw": head("Content-Length: 2, 2", end="\n") + b"ok",
    "a header of 10,000 bytes": head("X-Policy: " + "x" * 10_000),
    "300 headers": head(*["X-Another: one"] * 300),
    "an announcement before": head(status="HTTP/1.1 103 Early") + head("Content-Length: 2, 2") + b"ok",
    "no chunk where one should be": head(CHUNKED) + b"ok",
}
EMPTY = {
    "an empty body in chunks": head(CHUNKED, status="HTTP/1.1 204 No Content") + b"0\r\n\r\n",
    "a body": head("Content-Length: 2", status="HTTP/1.1 204 No Content") + b"ok",
}


async def status_of(answer: bytes, *, cut: int | None = None) -> tuple[int, str]:
    """Let a server say `answer` after a request, in two parts; return the status that is read, and a header."""

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer[:cut])
        await writer.drain()
        if cut is not None:
            await soon(arrived(writer))
            writer.write(answer[cut:])

    async with (
        talking(talk) as url,
        open_session(TIMEOUT) as session,
        session.post(url, data=b"{}") as response,
    ):
        return response.status, response.headers.get("Retry-After", "")


async def arrived(writer: asyncio.StreamWriter) -> None:
    for _ in range(20):  # the client is on this loop too
        await asyncio.sleep(0)
    assert writer.transport.get_write_buffer_size() == 0


@pytest.mark.parametrize("answer", FLAWED.values(), ids=FLAWED)
async def test_a_status_is_believed_whatever_is_wrong_with_the_headers(answer: bytes) -> None:
    assert (await status_of(answer))[0] == 200
    assert (await status_of(answer, cut=len(answer) - 3))[0] == 200


async def test_an_answer_with_a_flawed_announcement_may_be_cut_anywhere() -> None:
    answer = head("X Y", status="HTTP/1.1 103 Early Hints") + head("Content-Length: 2") + b"ok"
    for cut in range(1, len(answer)):
        assert (await status_of(answer, cut=cut))[0] == 200, cut


async def test_announcements_without_an_answer_are_none() -> None:
    flood = head("X Y", status="HTTP/1.1 103 Early Hints") * HEAD_BYTES
    with pytest.raises(aiohttp.ClientResponseError):
        await status_of(flood[: 2 * HEAD_BYTES])


@pytest.mark.parametrize("answer", EMPTY.values(), ids=EMPTY)
async def test_a_204_is_believed_whatever_follows(answer: bytes) -> None:
    assert (await status_of(answer))[0] == 204


async def test_what_a_flawed_answer_asks_for_is_heeded() -> None:
    refusal = head("X-Served-By node7", "Retry-After: 7", status="HTTP/1.1 503 Busy")
    assert await status_of(refusal) == (503, "7")


async def test_the_body_of_a_flawed_answer_is_not_believed() -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(FLAWED["two lengths"])

    async with talking(talk) as url, open_session(TIMEOUT) as session, session.post(url, data=b"{}") as response:
        with pytest.raises(ClientPayloadError, match="cannot be read"):
            await response.read()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 99999 Odd\r\n\r\n",
        b"HTTP/1.1 020 Odd\r\n\r\n",
        b"HTTP/1.1 600 Odd\r\n\r\n",
        b"HTTP/1.1 200OK\r\n\r\n",
        b"HTTP/2.0 200 OK\r\nContent-Length: 2, 2\r\n\r\n",
        b"x HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_what_is_no_status_line_is_no_answer(answer: bytes) -> None:
    assert read_head(answer) == (None, None)


async def test_a_head_that_never_ends_is_no_answer() -> None:
    answer = head("X-Served-By node7")[:-4] + b"\r\nX: y" * HEAD_BYTES
    with pytest.raises(aiohttp.ClientResponseError):
        await status_of(answer)


@given(st.binary(max_size=60) | st.lists(st.sampled_from([*FLAWED.values(), b"\r\n", b"\n"])).map(b"".join))
def test_no_bytes_break_the_reader(came: bytes) -> None:
    status, headers = read_head(came)
    assert status is None or 100 <= status < 600
    assert status is not None or headers is None
