"""Credentials that a stranger sends back, wherever his text is cut: nothing of them is shown."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import aiohttp
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from pocd.chain.cometbft import CometBFT
from pocd.chain.evm import EVM
from pocd.chain.rpc import MAX_ANSWER_BYTES, Rpc
from pocd.chain.source import ChainError
from pocd.check.receivers import check_receiver
from pocd.cli import main as cli
from pocd.clock import SYSTEM
from pocd.delivery.posting import ANSWER_BYTES, Receiver
from pocd.observe.mask import excerpt, mask_url, url_secrets
from tests.support.delivering import Bench, prepared, running, talking
from tests.support.waiting import PATIENCE, soon

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator
    from pathlib import Path

INFO = "ABCDEFGH:JKLMNOPQRSTUVW"  # of which no delivery is in what tells of it, but for those that are masked
SENT = base64.b64encode(INFO.encode()).decode()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with prepared(tmp_path / "store.db") as one:
        yield one


def pieces(secret: str) -> set[str]:
    """What is too much of a secret to be shown: any three letters of it in a row."""
    return {secret[start : start + 3] for start in range(len(secret) - 2)}


def shows(text: str) -> set[str]:
    return {piece for piece in pieces(INFO) | pieces(SENT) if piece in text}


def test_of_an_address_credentials_and_all_values_of_its_query_are_masked() -> None:
    masked = mask_url("https://user:hunter2@rpc.example/x?key=hunter2&hunter2&a=")
    assert masked == "https://***@rpc.example/x?key=***&***&a=***"


@given(
    st.text("xyz .\n\t\0", max_size=400),
    st.text("abcé:@/", min_size=4, max_size=40),
    st.text("xyz .\n", max_size=40),
    st.integers(0, 500),
    st.integers(1, 60),
    st.booleans(),
)
def test_no_letter_of_a_secret_is_shown_wherever_the_text_is_cut(
    before: str,
    secret: str,
    after: str,
    read: int,
    limit: int,
    as_bytes: bool,  # noqa: FBT001 - likewise
) -> None:
    whole = f"{before}{secret}{after}"
    data: bytes | str = whole.encode() if as_bytes else whole
    shown = excerpt(data[:read], limit, secrets=(secret,), cut=read < len(data))
    assert not set("abcé") & set(shown.replace("(nothing)", ""))
    assert len(shown) <= max(limit + 1, len("(nothing)"))


@given(st.text("xyz .\n", max_size=200), st.integers(0, 300), st.integers(1, 60))
def test_nor_of_the_credentials_in_any_url(before: str, read: int, limit: int) -> None:
    whole = f"{before}http://abc:d@e@host/path"
    shown = excerpt(whole[:read], limit, cut=read < len(whole))
    assert not set("abde") & set(shown.partition("host")[0].replace("(nothing)", "")) - set("http")


def test_a_whole_text_keeps_its_end_though_a_secret_begins_so() -> None:
    assert excerpt("unauthorized", secrets=("dXNlcjpwYXNz",)) == "unauthorized"
    assert excerpt("unauthorized", secrets=("dXNlcjpwYXNz",), cut=True) == "unauthorize…"


def test_user_info_that_is_not_ascii_may_come_back_as_it_was_sent() -> None:
    known = url_secrets("http://user:p%C3%A4ssword@host")
    for encoding in ("latin-1", "utf-8"):  # aiohttp's, and what it may become
        assert base64.b64encode("user:pässword".encode(encoding)).decode() in known


def test_a_key_in_the_query_may_come_back_as_it_is_written_or_as_it_is_meant() -> None:
    known = url_secrets("https://host/path@x?apikey=k%2Fey&secret-word&v=1#frag")
    assert excerpt("no k%2Fey, no k/ey and no secret-word, of 1 and host", secrets=known) == (
        "no ***, no *** and no ***, of 1 and host"
    )


# Of receivers, over real sockets

ECHOES = [
    pytest.param(b"x" * 190 + INFO.encode(), id="at what is shown"),
    pytest.param(b"x" * 190 + SENT.encode(), id="at what is shown, as it was sent"),
    pytest.param(b" " * (16 * 200 - 9) + INFO.encode(), id="at what is looked at"),
    pytest.param(b" " * (16 * 160 - 9) + INFO.encode(), id="at what is looked at, of a check"),
    pytest.param(b" " * (ANSWER_BYTES - 9) + INFO.encode(), id="at what is read"),
    pytest.param(b"you are " + INFO[:15].encode(), id="where the connection breaks"),
    pytest.param(b"you are " + SENT[:15].encode(), id="where the connection breaks, as it was sent"),
]


async def echo(writer: asyncio.StreamWriter, body: bytes) -> None:
    """Answer, and break off before what was promised."""
    writer.write(b"HTTP/1.1 403 No\r\nContent-Length: 1000000\r\n\r\n" + body)
    await writer.drain()


@pytest.mark.parametrize("body", ECHOES)
async def test_a_receiver_that_sends_credentials_back_is_told_without_them(bench: Bench, body: bytes) -> None:
    await bench.store(1, "a")
    async with talking(lambda _, writer: echo(writer, body)) as url:
        dispatcher = bench.dispatcher(url.replace("://", f"://{INFO}@"))
        with structlog.testing.capture_logs() as logs:
            async with running(dispatcher):
                await soon(dispatcher.settled.wait())
    assert dispatcher.state.error is not None
    assert dispatcher.state.error.startswith("HTTP 403: ")
    assert not shows(repr((logs, await bench.deliveries(), dispatcher.state, dispatcher.alarm)))


@pytest.mark.parametrize("body", ECHOES)
async def test_so_is_one_that_is_checked(body: bytes) -> None:
    async with talking(lambda _, writer: echo(writer, body)) as url:
        receiver = Receiver("main", url.replace("://", f"://{INFO}@"), None)
        finding = await check_receiver(receiver, clock=SYSTEM, limit=PATIENCE)
    assert "HTTP 403: " in finding.text
    assert not shows(repr(finding))


@pytest.mark.parametrize(
    "head",
    [
        f"HTTP/1.1 302 Found\r\nLocation: /{'x' * 190}{INFO}\r\n",
        f"HTTP/1.1 503 Busy\r\nRetry-After: {'x' * 32}{INFO}\r\n",
        f"HTTP/1.1 {'x' * 9}{INFO}\r\n",
    ],
)
async def test_nor_does_the_head_of_an_answer(bench: Bench, head: str) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{head}Content-Length: 0\r\n\r\n".encode())
        await writer.drain()

    await bench.store(1, "a")
    async with talking(talk) as plain:
        url = plain.replace("://", f"://{INFO}@")
        dispatcher = bench.dispatcher(url)
        async with running(dispatcher):
            await soon(dispatcher.settled.wait())
        finding = await check_receiver(Receiver("main", url, None), clock=SYSTEM, limit=PATIENCE)
    assert dispatcher.state.error
    assert not shows(repr((finding, dispatcher.state, dispatcher.alarm)))


# Of the chain's nodes


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, "x" * 70 + INFO),
        (200, "x" * 70 + INFO),
        (200, f'["{"x" * 70}{INFO}"]'),
        (200, f'{{"error": {{"message": "{"x" * 150}{INFO}"}}}}'),
        (200, f'{{"error": "{"x" * 150}{SENT}"}}'),
        (200, f'{{"error": {{"code": 1, "hint": "{"x" * 130}{SENT}"}}}}'),
        (200, f'{{"result": "{"x" * 70}{INFO}"}}'),
        (200, f'{{"result": {{"sync_info": {{"latest_block_height": "{"x" * 70}{INFO}"}}}}}}'),
        (200, f'{{"result": {{"x": "{"x" * 60}{INFO}"}}}}'),
        (200, " " * (16 * 80 - 9) + INFO + " " * MAX_ANSWER_BYTES),
        (200, " " * (1024 - 9) + INFO + " " * MAX_ANSWER_BYTES),
    ],
)
@pytest.mark.parametrize("kind", [CometBFT, EVM])
async def test_a_node_that_sends_credentials_back_is_told_without_them(
    kind: type[CometBFT | EVM], status: int, body: str
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        rpc = Rpc(session, str(server.make_url("/")).replace("://", f"://{INFO}@"), attempts=1)
        node = EVM(rpc, confirmations=0) if kind is EVM else CometBFT(rpc)
        with pytest.raises(ChainError) as caught:
            await node.head()
        assert not shows(str(caught.value))


# Of the command line


def test_the_last_line_of_a_command_that_fails_masks_urls(capsys: pytest.CaptureFixture[str]) -> None:
    cli._fail(1, f"chain failed: ValueError: http://{INFO}@host/ is no URL")
    assert capsys.readouterr().err == "pocd: chain failed: ValueError: http://***@host/ is no URL\n"
