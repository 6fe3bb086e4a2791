"""Who may call the admin API: by which name, from which page, with which token; and a daemon that is beset."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pocd.admin import guard
from pocd.admin.client import AdminError, call
from pocd.config.listeners import AdminSettings
from pocd.http.server import errors_as_json, json_answer, listening
from tests.support.command_line import pocd_here
from tests.support.processes import Chain, config, fails, running
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOKEN = "correct-horse-battery"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LOOPBACK = AdminSettings(allowed_hosts=["miner.example"])
BEYOND = AdminSettings(host="0.0.0.0", token_file=Path("token"), allowed_hosts=["miner.example"])


@contextlib.asynccontextmanager
async def guarded(admin: AdminSettings, token: str | None = None) -> AsyncIterator[str]:
    """An app behind the guard; yields its URL."""

    async def answer(request: web.Request) -> web.Response:
        return json_answer(await request.text())

    app = web.Application(middlewares=[errors_as_json, *guard.middlewares(admin, token, open_reads=admin.open_reads)])
    app.router.add_route("*", "/{path:.*}", answer)
    async with listening(app, "127.0.0.1", 0, shutdown_timeout=0.1) as url:
        yield url


async def ask(url: str, method: str = "GET", path: str = "/x", **headers: str) -> tuple[int, str | None]:
    """The status, and the code of an error."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as session, session.request(method, url + path, headers=named) as response:
        body = await response.json() if method != "HEAD" else None
        return response.status, body["error"]["code"] if isinstance(body, dict) else None


OK = (200, None)
FOREIGN_HOST = (403, "foreign_host")
FOREIGN_ORIGIN = (403, "foreign_origin")
UNAUTHORIZED = (401, "unauthorized")


# The host


@pytest.mark.parametrize(
    ("host", "on_loopback", "beyond"),
    [
        ("localhost", OK, OK),
        ("LocalHost:1", OK, OK),
        ("127.0.0.1", OK, OK),
        ("127.0.0.1:8460", OK, OK),
        ("[::1]", OK, OK),
        ("[0:0::1]:8460", OK, OK),
        ("miner.example", OK, OK),
        ("Miner.Example:80", OK, OK),
        ("10.0.0.7:8460", FOREIGN_HOST, OK),
        ("[fd00::7]", FOREIGN_HOST, OK),
        ("0.0.0.0", FOREIGN_HOST, OK),
        ("evil.example", FOREIGN_HOST, FOREIGN_HOST),
        ("evil.example:8460", FOREIGN_HOST, FOREIGN_HOST),
        ("localhost.evil.example", FOREIGN_HOST, FOREIGN_HOST),
        ("miner.example.evil", FOREIGN_HOST, FOREIGN_HOST),
        ("localhost.", FOREIGN_HOST, FOREIGN_HOST),
        ("127.1", FOREIGN_HOST, FOREIGN_HOST),
        ("2130706433", FOREIGN_HOST, FOREIGN_HOST),
        ("127.0.0.1.nip.io", FOREIGN_HOST, FOREIGN_HOST),
        ("user@localhost", FOREIGN_HOST, FOREIGN_HOST),
        ("localhost evil.example", FOREIGN_HOST, FOREIGN_HOST),
        ("", FOREIGN_HOST, FOREIGN_HOST),
    ],
)
async def test_a_host_is_one_of_ours_or_foreign(
    host: str, on_loopback: tuple[int, str | None], beyond: tuple[int, str | None]
) -> None:
    async with guarded(LOOPBACK) as url:
        assert await ask(url, Host=host) == on_loopback
        assert await ask(url, path="/healthz", Host=host) == on_loopback
    async with guarded(BEYOND, TOKEN) as url:
        assert await ask(url, Host=host, **BEARER) == beyond


async def test_a_host_may_be_missing_as_it_is_in_http_1_0() -> None:
    async with guarded(LOOPBACK) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /x HTTP/1.0\r\n\r\n")
        assert b" 200 " in await asyncio.wait_for(reader.readline(), PATIENCE)
        writer.close()
        await writer.wait_closed()


@given(header=st.text(), any_address=st.booleans())
def test_no_text_in_a_host_header_is_an_error_or_a_name_of_ours_by_chance(header: str, *, any_address: bool) -> None:
    if guard.is_own_host(header, {"own"}, any_address=any_address):
        assert header.lower().startswith("own") or any_address


# The page


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://{host}", OK),
        ("https://{host}", FOREIGN_ORIGIN),
        ("http://localhost", FOREIGN_ORIGIN),
        ("http://{host}.evil.example", FOREIGN_ORIGIN),
        ("http://evil.example", FOREIGN_ORIGIN),
        ("null", FOREIGN_ORIGIN),
        ("", FOREIGN_ORIGIN),
        ("http://{host}/", FOREIGN_ORIGIN),
    ],
)
async def test_a_page_is_our_own_or_foreign(origin: str, expected: tuple[int, str | None]) -> None:
    async with guarded(LOOPBACK) as url:
        said = origin.format(host=url.removeprefix("http://"))
        assert await ask(url, "POST", Origin=said) == expected
        assert await ask(url, "GET", Origin=said) == expected
        assert await ask(url, "OPTIONS", Origin=said) == expected


@pytest.mark.parametrize("path", ["/api/v1/pow/events", "/metrics", "/"])
@pytest.mark.parametrize(
    ("site", "mode", "on_calls", "on_pages"),
    [
        ("same-origin", "cors", OK, OK),
        ("none", "navigate", OK, OK),
        ("cross-site", "no-cors", FOREIGN_ORIGIN, FOREIGN_ORIGIN),
        ("same-site", "no-cors", FOREIGN_ORIGIN, FOREIGN_ORIGIN),  # another port of this host
        ("cross-site", "navigate", FOREIGN_ORIGIN, OK),  # a link
        ("", "navigate", FOREIGN_ORIGIN, OK),
    ],
)
async def test_what_a_page_of_another_site_loads_is_refused_though_it_names_no_origin(
    path: str, site: str, mode: str, on_calls: tuple[int, str | None], on_pages: tuple[int, str | None]
) -> None:
    async with guarded(LOOPBACK) as url:
        expected = on_pages if path == "/" else on_calls
        assert await ask(url, path=path, Sec_Fetch_Site=site, Sec_Fetch_Mode=mode) == expected


async def test_of_several_hosts_or_pages_none_may_be_foreign() -> None:
    async with guarded(LOOPBACK) as url:
        own = url.removeprefix("http://")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        lines = f"GET /x HTTP/1.1\r\nHost: {own}\r\nOrigin: {url}\r\nOrigin: http://evil.example\r\n\r\n"
        writer.write(lines.encode())
        assert b" 403 " in await asyncio.wait_for(reader.readline(), PATIENCE)
        writer.close()
        await writer.wait_closed()


# The token


@pytest.mark.parametrize(
    "given_", ["", "Bearer", "Bearer ", "Bearer wrong", f"bearer {TOKEN}", f"Bearer {TOKEN} ", TOKEN]
)
async def test_only_the_token_opens(given_: str) -> None:
    async with guarded(AdminSettings(token_file=Path("token")), TOKEN) as url:
        headers = {"Authorization": given_} if given_ else {}
        expected = OK if given_.strip() == f"Bearer {TOKEN}" else UNAUTHORIZED  # HTTP itself takes the blank away
        assert await ask(url, "GET", **headers) == expected
        assert await ask(url, "POST", **headers) == expected
        assert await ask(url, **BEARER) == OK


async def test_a_refusal_says_how_to_come_in() -> None:
    async with guarded(AdminSettings(token_file=Path("token")), TOKEN) as url:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/x") as response:
            assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert TOKEN not in await response.text()


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
async def test_probes_and_readers_need_no_token(path: str) -> None:
    async with guarded(AdminSettings(token_file=Path("token")), TOKEN) as url:
        assert await ask(url, path=path) == OK
        assert await ask(url, path=f"{path}/x") == UNAUTHORIZED
        assert await ask(url, path=f"/{path}") == UNAUTHORIZED


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("open_reads", [False, True])
async def test_looking_may_be_open_while_changing_is_not(method: str, *, open_reads: bool) -> None:
    admin = AdminSettings(token_file=Path("token"), open_reads=open_reads)
    async with guarded(admin, TOKEN) as url:
        status, _ = await ask(url, method)
        assert status == (200 if open_reads and method in {"GET", "HEAD"} else 401)
        assert (await ask(url, method, **BEARER))[0] == 200


async def test_host_and_page_are_judged_before_the_token() -> None:
    async with guarded(AdminSettings(token_file=Path("token"), open_reads=True), TOKEN) as url:
        assert await ask(url, "POST", Host="evil.example", Origin="http://evil.example") == FOREIGN_HOST
        assert await ask(url, "POST", Origin="http://evil.example") == FOREIGN_ORIGIN
        assert await ask(url, "GET", Host="evil.example", **BEARER) == FOREIGN_HOST
        assert await ask(url, "POST") == UNAUTHORIZED


# A daemon


async def pocd(*arguments: str) -> tuple[int, str, str]:
    ended = await asyncio.to_thread(pocd_here, *arguments)
    return ended.returncode, ended.stdout, ended.stderr


async def test_a_daemon_beset_by_silence_answers_and_is_guarded(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    async with Chain().served() as chain:
        path = config(tmp_path, chain.url, {}, admin__token_file=str(token), admin__open_reads=True)
        async with running(path) as daemon:
            address = ("127.0.0.1", int(daemon.url.rpartition(":")[2]))
            with contextlib.ExitStack() as silent:
                for _ in range(1000):
                    silent.enter_context(socket.create_connection(address, timeout=PATIENCE))
                for _ in range(3):
                    assert (await daemon.status())["state"]
                code, out, err = await pocd("status", "--config", str(path), "--url", daemon.url)
                assert (code, err) == (0, ""), err
                assert "delivered" in out
                status = "/api/v1/pow/status"
                assert await ask(daemon.url, path=status, Host="evil.example") == FOREIGN_HOST
                assert await ask(daemon.url, path=status, Origin="null") == FOREIGN_ORIGIN
                assert await ask(daemon.url, "POST", "/api/v1/pow/stop") == UNAUTHORIZED
                stopped = await call(daemon.url, "POST", "/api/v1/pow/stop", token=TOKEN)
                assert stopped["state"] == "STOPPED"
            assert await daemon.end() == 0
            assert TOKEN not in daemon.log.read_text()


async def test_a_daemon_on_a_unix_socket(tmp_path: Path) -> None:
    at = tmp_path / "admin.sock"
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with Chain().served() as chain:
        path = config(tmp_path, chain.url, {}, admin__socket=str(at))
        resource.setrlimit(resource.RLIMIT_NOFILE, (most // 2, most))
        async with running(path) as daemon:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE) == (most, most)
            assert daemon.url == f"unix://{at}"
            assert stat.S_IMODE(at.stat().st_mode) == 0o660
            code, out, err = await pocd("status", "--config", str(path))
            assert (code, "delivered" in out, err) == (0, True, "")
            other = tmp_path / "other"
            other.mkdir()
            code, line = await fails(config(other, chain.url, {}, admin__socket=str(at)))
            assert (code, f"cannot listen on {at}: another program listens there" in line) == (75, True)
            assert (await call(daemon.url, "POST", "/api/v1/pow/stop"))["state"] == "STOPPED"
            assert await daemon.end() == 0
        assert not at.exists()
        code, _, err = await pocd("status", "--config", str(path))
        assert (code, f"nothing listens on unix://{at}" in err) == (1, True)


async def test_a_socket_of_others_is_a_clear_line(tmp_path: Path) -> None:
    path, us = tmp_path / "admin.sock", os.geteuid()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        path.chmod(0)
        if us == 0:
            os.seteuid(65534)  # root may everything
        try:
            with pytest.raises(AdminError, match="is for its owner and group only"):
                await call(f"unix://{path}", "GET", "/healthz")
        finally:
            os.seteuid(us)
