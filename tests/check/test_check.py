"""`pocd check` on real files, sockets, receivers and daemons: green on a good host, and red for each planted fault."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web

from pocd.check import api, devices, host, model, report, store
from pocd.check.finding import Finding, Level, bounded, green, red, yellow
from pocd.check.model import Place
from pocd.check.probe import probe
from pocd.config.listeners import AdminSettings
from pocd.config.settings import ModelSettings, load
from pocd.http.server import listening
from pocd.http.webhooks import WebhookKeys
from pocd.process import EXIT_CONFIG, EXIT_CRASH, EXIT_OK
from pocd.protocol.names import BUNDLED
from pocd.receiver.app import application
from pocd.receiver.store import Store
from tests.support.command_line import pocd_here
from tests.support.processes import Chain, config, free_port, running
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER_SECRET = "whsec_AAAQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TOKEN = "t0ken-of-the-test"
PORT = free_port()
CPU = ModelSettings(name="bundled:tiny-llama", dtype="float32", device="cpu")


PATIENT = host.Limits(local=PATIENCE, call=PATIENCE, torch=PATIENCE)
# As `pocd`, and as patient as that.
COMMAND = f"""
from pocd.check import host
from pocd.cli.main import main
host.check_host.__kwdefaults__["limits"] = host.Limits(local={PATIENCE}, call={PATIENCE}, torch={PATIENCE})
main()
"""


async def command(path: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Run the command; returns its exit status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", COMMAND, "check", "--config", str(path), *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode is not None
    assert err == b""
    return process.returncode, out.decode()


async def look(path: Path) -> list[Finding]:
    """The same in this process, with time for a torch that other tests slow down."""
    return await host.check_host(path, load(path), limits=PATIENT)


def levels(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.name, finding.level) for finding in findings]


def secret_file(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def configured(folder: Path, chain_url: str, receivers: str, **changes: Any) -> Path:  # noqa: ANN401 - any setting
    """Write a configuration whose receivers have secrets: TOML's inline tables, separated by commas."""
    path = config(folder, chain_url, {}, **changes)
    path.write_text(path.read_text().replace("receivers = []", f"receivers = [{receivers}]"))
    return path


@contextlib.asynccontextmanager
async def reference_receiver(folder: Path, secret: str | None) -> AsyncIterator[str]:
    kept = await Store.open(folder / "receiver.db")
    try:
        keys = WebhookKeys.parse(secret) if secret else None
        async with listening(application(kept, keys), "127.0.0.1", 0, shutdown_timeout=1) as url:
            yield url
    finally:
        await kept.close()


@pytest.fixture
def dead() -> Iterator[str]:
    """A URL at which nothing listens, and nothing else can begin to."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


# The whole


async def test_a_good_host_is_green_and_its_secrets_stay_secret(tmp_path: Path) -> None:
    secret = secret_file(tmp_path / "secret", SECRET)
    token = secret_file(tmp_path / "token", TOKEN)
    async with Chain().served() as node, reference_receiver(tmp_path, SECRET) as url:
        entry = f'{{ name = "main", url = "{url}", secret_file = "{secret}" }}'
        with_password = node.url.replace("://", "://user:hunter22@")
        path = configured(
            tmp_path, with_password, entry, admin__port=PORT, admin__token_file=str(token), chain__id="pocd-dev"
        )
        path.chmod(0o640)
        found = await look(path)
    out = report.as_json(found)
    assert levels(found) == [
        (name, "green")
        for name in (
            *("configuration", "secrets", "torch", "driver", "model", "memory", "store", "fsync", "disk space"),
            *("chain", "clock", "receiver main", "admin API", "rounding"),
        )
    ], out
    assert "fingerprint v2-8c43e6bc409e3e4cc7a315927a46e1c9" in out
    assert not any(word in out for word in ("hunter22", TOKEN, SECRET, SECRET.removeprefix("whsec_")))
    assert not (tmp_path / "outbox.db").exists()
    assert not list(tmp_path.glob(".pocd-check-*"))


async def test_each_planted_fault_has_its_red_line_and_its_remedy(tmp_path: Path, dead: str) -> None:
    wrong = secret_file(tmp_path / "wrong", OTHER_SECRET)
    world = secret_file(tmp_path / "world", SECRET, 0o644)
    (tmp_path / "in-the-way").write_text("")
    damaged = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-llama", damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    async with (
        Chain().served() as node,
        reference_receiver(tmp_path, SECRET) as url,
        listening(web.Application(), "127.0.0.1", 0, shutdown_timeout=1) as another,
    ):
        taken = int(another.rpartition(":")[2])
        entries = (
            f'{{ name = "gone", url = "{dead}", secret_file = "{world}" }}, '
            f'{{ name = "other", url = "{url}", secret_file = "{wrong}" }}, {{ name = "unsigned", url = "{url}" }}'
        )
        path = configured(
            tmp_path,
            node.url,
            entries,
            chain__id="another-chain",
            store__path=str(tmp_path / "in-the-way" / "outbox.db"),
            admin__port=taken,
            model__name=str(damaged),
            node__public_key=host.EXAMPLE_KEY,
        )
        found = await look(path)
    lines = report.as_text(found, width=None, colour=False).splitlines()
    for name, text, remedy in (
        ("configuration", "node.public_key is the example's", "the miner's public key"),
        ("secrets", f"{world} (mode 0644) is open to every user", f"chmod o= {world}"),
        (
            "model",
            f"{damaged} cannot be read: {damaged}/model.safetensors cannot be loaded",
            "copy the model's folder again",
        ),
        ("store", f"{tmp_path / 'in-the-way'} is not a folder", "another store.path"),
        ("chain", "is on chain pocd-dev, but chain.id says another-chain", "chain.urls"),
        ("receiver gone", "no connection: Connect call failed", "firewalls"),
        ("receiver other", "HTTP 401", "put the secret that this receiver has into its secret_file"),
        ("receiver unsigned", "HTTP 401", "set its secret_file"),
        ("admin API", f"another program has 127.0.0.1:{taken}", "ss -lptn"),
    ):
        (at,) = (number for number, line in enumerate(lines) if line.startswith(f"red     {name}: "))
        assert text in lines[at]
        assert lines[at + 1].startswith("        remedy: ")
        assert remedy in lines[at + 1]
    assert lines[-1].endswith("9 red")


async def test_the_exit_status_is_1_where_anything_is_red(tmp_path: Path, dead: str) -> None:
    (tmp_path / "torch.py").write_text("__version__, version = '2.0', type('', (), {'cuda': None})")  # quick
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }
    async with Chain().served() as node:
        code, out = await command(config(tmp_path, node.url, {}, model__name="owner/name"), **environment)
        assert code == EXIT_OK, out
        lines = out.splitlines()
        assert lines[0] == "yellow  configuration: no receiver is configured: proofs are kept until there is one"
        assert lines[-1].endswith("2 yellow, 0 red")
        assert "owner/name is not in" in out
    code, out = await command(config(tmp_path, dead, {}, model__name="owner/name"), "--json", **environment)
    assert code == EXIT_CRASH, out
    assert [each["name"] for each in orjson.loads(out) if each["level"] == "red"] == ["chain"]


def test_a_configuration_that_cannot_be_used_is_a_red_line_and_78(tmp_path: Path) -> None:
    path = config(tmp_path, "http://127.0.0.1:1", {}, round__duration=2)
    ended = pocd_here("check", "--config", path, "--json")
    (finding,) = orjson.loads(ended.stdout)
    assert (ended.returncode, ended.stderr) == (EXIT_CONFIG, "")
    assert (finding["name"], finding["level"]) == ("configuration", "red")
    assert "duration 2 must be at most every 1" in finding["text"]


async def test_beside_a_running_daemon_all_is_green_and_it_goes_on(tmp_path: Path) -> None:
    async with Chain().served() as node, reference_receiver(tmp_path, None) as url:
        path = config(tmp_path, node.url, {"main": url}, admin__port=PORT)
        async with running(path) as daemon:
            await daemon.until(lambda body: body["chain"]["height"] and body["worker"]["ready"])
            node.height = int(time.time() - node.dev.genesis) + 1  # the daemon's start took a while
            found = await look(path)
            out = report.as_text(found, width=None, colour=False)
            assert {finding.level for finding in found} == {Level.GREEN}, out
            assert f"outbox.db is held by process {daemon.process.pid}: pocd runs" in out
            assert f"127.0.0.1:{PORT} is answered by pocd, which runs" in out
            other = await api.check_api(load(path).admin, runs=False, limit=PATIENCE)
            assert other.level is Level.RED
            assert "a pocd has" in other.text
            node.height += 1
            await daemon.until(lambda body: body["chain"]["height"] == node.height)
            assert await daemon.end() == 0
        assert store.holder(tmp_path / "outbox.db") is None
        assert store.chain_of(tmp_path / "outbox.db") == "pocd-dev"


# Checks that hang or fail


async def test_a_check_that_hangs_or_fails_is_a_red_finding() -> None:
    async def broken() -> list[Finding]:
        raise KeyError("http://user:password@host")

    async def endless() -> list[Finding]:
        await asyncio.Event().wait()
        return []

    (hung,) = await bounded("it", endless(), 0.01)
    assert (hung.level, hung.text) == (Level.RED, "no result within 0.01 s")
    (failed,) = await bounded("it", broken(), PATIENCE)
    assert (failed.level, failed.text) == (Level.RED, "the check itself failed: KeyError")


@pytest.mark.parametrize(
    ("source", "limit", "problem", "remedy"),
    [
        ("raise ImportError('libcudart.so.12: no such file')", PATIENCE, "libcudart.so.12", "install pocd again"),
        ("import threading; threading.Event().wait()", 0.5, "no answer within 0.5 s", "check again"),
    ],
)
async def test_a_torch_that_cannot_be_imported_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, limit: float, problem: str, remedy: str
) -> None:
    (tmp_path / "torch.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    found = await probe(None, cuda=False, limit=limit)
    finding = devices.check_torch(found, CPU)
    assert finding.level is Level.RED
    assert problem in finding.text
    assert remedy in (finding.remedy or "")
    assert model.check(Place(BUNDLED / "tiny-llama"), found, CPU).level is Level.YELLOW


# The API's address


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    admin = AdminSettings(socket=path)

    async def ask() -> Finding:
        return await api.check_api(admin, runs=False, limit=0.2)

    assert (await ask()).level is Level.GREEN
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert (await ask()).level is Level.GREEN  # nobody listens: a left-over
        server.listen()
        taken = await ask()
        assert (taken.level, taken.text) == (Level.RED, f"another program has {path}")
    path.unlink()
    path.write_text("")
    assert "something else than a socket" in (await ask()).text
    lost = await api.check_api(AdminSettings(socket=tmp_path / "no" / "admin.sock"), runs=False, limit=0.2)
    assert (lost.level, "is missing" in lost.text) == (Level.RED, True)


async def test_an_address_that_is_not_ours_or_was_changed() -> None:
    foreign = AdminSettings(host="192.0.2.1", token_file=Path("/token"))
    finding = await api.check_api(foreign, runs=False, limit=PATIENCE)
    assert finding.level is Level.RED
    assert "Cannot assign requested address" in finding.text
    assert (await api.check_api(AdminSettings(port=0), runs=True, limit=PATIENCE)).level is Level.GREEN
    changed = await api.check_api(AdminSettings(port=PORT), runs=True, limit=PATIENCE)
    assert (changed.level, "restart it" in (changed.remedy or "")) == (Level.YELLOW, True)


# The report


def test_the_report_fits_its_terminal() -> None:
    findings = [
        green("store", "word " * 30),
        yellow("clock", "short", "do it " * 20),
        red("chain", "short", "do it"),
    ]
    lines = report.as_text(findings, width=80, colour=False).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["green", "yellow", "red", "1"]
    assert lines[-1] == "1 green, 1 yellow, 1 red"
    assert len(report.as_text(findings, width=None, colour=False).splitlines()) == 6
    coloured = report.as_text(findings, width=80, colour=True)
    assert "\033[31mred     \033[0mchain: short" in coloured
    logged = report.as_text(findings, width=None, colour=False, journal=True).splitlines()
    assert [line[:3] for line in logged] == ["<6>", "<4>", "<4>", "<3>", "<3>", "1 g"]
    assert orjson.loads(report.as_json(findings))[0] == {
        "name": "store",
        "level": "green",
        "text": "word " * 30,
        "remedy": None,
    }
