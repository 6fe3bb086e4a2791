"""The single checks of `pocd check`: what each says of real nodes, receivers and files, and of what cards tell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import sqlite3
import stat
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest
from aiohttp import web

from pocd.chain.cometbft import CometBFT
from pocd.chain.make import CHAIN_TIMEOUT
from pocd.chain.rpc import Rpc
from pocd.chain.source import Block, ChainError, Head
from pocd.check import api, chain, devices, files, host, model, store
from pocd.check.chain import Expected
from pocd.check.devices import Driver
from pocd.check.finding import Finding, Level
from pocd.check.probe import Probe
from pocd.check.receivers import check_receiver
from pocd.clock import SYSTEM
from pocd.compute.toolchain import Lack
from pocd.config.listeners import AdminSettings
from pocd.config.settings import ModelSettings, StoreSettings, load
from pocd.delivery.posting import Receiver
from pocd.http.client import open_session
from pocd.http.server import listening
from pocd.http.webhooks import WebhookKeys
from pocd.pool.cards import CardReading, NoDriverError
from pocd.protocol.names import BUNDLED
from pocd.receiver.app import application
from pocd.receiver.store import Store
from pocd.store.outbox import Outbox
from tests.check.test_check import CPU, SECRET, TOKEN, configured, levels, secret_file
from tests.support.processes import Chain
from tests.support.waiting import PATIENCE
from tests.system.test_disk import unprivileged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from pocd.protocol.names import Compile

LACK = Lack("there is no C compiler (gcc)", "install one (Debian: gcc)")
CUDA = ModelSettings(name="bundled:tiny-llama", dtype="bfloat16", device="cuda:1")
GIB = 2**30


# What the daemon's workers measured


@pytest.mark.parametrize(
    ("rounding", "level", "text"),
    [
        (None, "yellow", "no worker has measured it yet"),
        (
            {"error": 0.0125, "flipped": 0.0, "own_share": 0.5, "alarm": None},
            "green",
            "results are off by at most 1.25% of their scatter; 50% of the outputs are the nonce's own",
        ),
        (
            {"error": 0.0125, "flipped": None, "own_share": 0.5, "turned": 0.125, "alarm": None},
            "green",
            (
                "results are off by at most 1.25% of their scatter; 50% of the outputs are the nonce's own; "
                "rounding turns a router's choice in 12.50% of nonces"
            ),
        ),
        ({"error": 0.9, "flipped": 0.4, "own_share": 0.5, "alarm": "rounding decides"}, "red", "rounding decides"),
    ],
)
async def test_rounding_is_what_the_workers_of_the_running_daemon_measured(
    tmp_path: Path, rounding: dict[str, object] | None, level: str, text: str
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"workers": [{"rounding": None}, {"rounding": rounding}]})

    app = web.Application()
    app.router.add_get("/api/v1/pow/status", answer)
    async with listening(app, "127.0.0.1", 0, shutdown_timeout=1) as url:
        admin = AdminSettings(port=int(url.rpartition(":")[2]))
        found = await api.check_rounding(admin, tmp_path, runs=True, limit=PATIENCE)
        assert (found.level, found.text) == (level, text)
    found = await api.check_rounding(admin, tmp_path, runs=True, limit=PATIENCE)
    assert found.level is Level.YELLOW
    assert found.text.startswith("the daemon does not tell: ")
    assert (await api.check_rounding(admin, tmp_path, runs=False, limit=PATIENCE)).level is Level.GREEN


# The chain and the clock


@contextlib.asynccontextmanager
async def nodes(*urls: str) -> AsyncIterator[list[CometBFT]]:
    async with open_session(CHAIN_TIMEOUT) as session:
        yield [CometBFT(Rpc(session, url, attempts=1)) for url in urls]


@pytest.mark.parametrize(
    ("fast_by", "level", "text"),
    [
        (0, "green", "agrees with the newest block"),
        (-90, "red", "slow: the newest block was made 90 s in its future"),
        (-30, "yellow", "slow"),
        (300, "yellow", "fast, or the chain stands"),
    ],
)
async def test_a_wrong_clock(fast_by: float, level: str, text: str) -> None:
    async with Chain(height=20).served() as node, nodes(node.url) as sources:
        newest = node.dev.block_time(20)
        findings = await chain.check_chain(
            sources, Expected(None, ""), confirmations=0, wall=lambda: newest + fast_by, limit=PATIENCE
        )
    assert levels(findings)[-1] == ("clock", level)
    assert text in findings[-1].text
    assert (findings[-1].remedy is None) == (level == "green")
    if fast_by == 300:  # of a block each second, with two of them allowed for
        assert "2 s are usual" in findings[-1].text


async def test_a_node_that_hangs_is_told_and_another_stands_in() -> None:
    async def hang(_request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    app = web.Application()
    app.router.add_get("/status", hang)
    async with (
        listening(app, "127.0.0.1", 0, shutdown_timeout=0.1) as url,
        Chain().served() as node,
        nodes(url, node.url) as both,
    ):
        ask = chain.check_chain
        findings = await ask(both, Expected(None, ""), confirmations=0, wall=time.time, limit=5.0)
        assert levels(findings)[:2] == [("chain", "yellow"), ("chain", "green")]
        assert "no answer within 5 s (another node stands in)" in findings[0].text
        findings = await ask(both[:1], Expected(None, ""), confirmations=0, wall=time.time, limit=0.1)
        assert levels(findings) == [("chain", "red"), ("clock", "yellow")]


def test_nodes_that_lag_or_differ() -> None:
    now = 1_700_000_000.0

    def head(age: float, chain_id: str = "a", *, catching_up: bool = False) -> Head:
        return Head(Block(chain_id, 7, "AB", datetime.fromtimestamp(now - age, UTC)), catching_up=catching_up)

    answers: dict[str, Head | ChainError] = {
        "well": head(5),
        "behind": head(5, catching_up=True),
        "stale": head(601),
        "other": head(5, "b"),
    }
    assert [each.level for each in chain.judge_nodes(answers, Expected(None, ""), now)] == [
        *("green", "yellow", "yellow", "red")
    ]
    assert "the first node says a" in chain.judge_nodes(answers, Expected(None, ""), now)[-1].text
    both = chain.judge_nodes({"down": ChainError("down"), "other": head(5, "b")}, Expected("a", "the store"), now)
    assert [each.level for each in both] == ["red", "red"]  # a node of another chain stands in for nobody
    differ = chain.expected("a", "b")
    assert isinstance(differ, Finding)
    assert "the store belongs to chain b" in differ.text


# Receivers


@pytest.mark.parametrize(
    ("status", "signed", "level", "text", "remedy"),
    [
        (200, True, "green", "accepts a signed probe", None),
        (422, False, "green", "refuses an unsigned but empty probe, as it may", None),
        (301, True, "red", "to http://***@elsewhere/?key=***", "redirects are not followed"),
        (403, True, "red", "HTTP 403", "secret"),
        (404, True, "yellow", "HTTP 404", "path of its url"),
        (405, True, "red", "HTTP 405", "check its url"),
        (410, True, "red", "HTTP 410", "wants nothing any more"),
        (429, True, "yellow", "HTTP 429", "tries again"),
        (500, True, "yellow", "HTTP 500: you are ***", "tries again"),
    ],
)
async def test_what_a_receiver_answers(status: int, *, signed: bool, level: str, text: str, remedy: str | None) -> None:
    keys = WebhookKeys.parse(SECRET)

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        assert orjson.loads(body) == {"probe": True, "nonces": []}
        assert request.headers["webhook-id"].startswith("pocd-check-")
        if signed:
            keys.verify(request.headers, body, time.time())
        headers = {"Location": "http://who:secret@elsewhere/?key=value"} if status == 301 else {}
        said = f"you are {request.headers['Authorization'].removeprefix('Basic ')}"
        return web.Response(status=status, text=said, headers=headers)

    app = web.Application()
    app.router.add_post("/in/generated", answer)
    async with listening(app, "127.0.0.1", 0, shutdown_timeout=1) as url:
        receiver = Receiver("main", f"{url.replace('://', '://user:hunter22@')}/in/", keys if signed else None)
        finding = await check_receiver(receiver, clock=SYSTEM, limit=PATIENCE)
    assert (finding.name, finding.level) == ("receiver main", level)
    assert text in finding.text.replace("HTTP 301: ", "to ")
    assert "hunter22" not in finding.text
    assert remedy is None or remedy in (finding.remedy or "")


async def test_receivers_that_are_not_called_or_do_not_answer() -> None:
    metadata = Receiver("main", "http://169.254.169.254", None)
    finding = await check_receiver(metadata, clock=SYSTEM, limit=PATIENCE)
    assert finding.level is Level.RED
    assert "169.254.169.254 is refused: it is link-local" in finding.text
    with socket.create_server(("127.0.0.1", 0)) as server:  # which never accepts
        silent = Receiver("main", f"http://127.0.0.1:{server.getsockname()[1]}", None)
        finding = await check_receiver(silent, clock=SYSTEM, limit=0.2)
    assert (finding.level, finding.text.rpartition(": ")[2]) == (Level.RED, "no answer within 0.2 s")


async def test_the_reference_receiver_keeps_no_probe(tmp_path: Path) -> None:
    kept = await Store.open(tmp_path / "receiver.db")
    try:
        async with listening(application(kept, None), "127.0.0.1", 0, shutdown_timeout=1) as url:
            finding = await check_receiver(Receiver("main", url, None), clock=SYSTEM, limit=PATIENCE)
            assert finding.level is Level.GREEN
            secured = Receiver("main", url.replace("http:", "https:"), None)
            finding = await check_receiver(secured, clock=SYSTEM, limit=PATIENCE)
            assert (finding.level, "SSL" in finding.text) == (Level.RED, True)
        assert await kept.page(0, 10, None) == ([], None)
    finally:
        await kept.close()


# The store


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


def test_a_read_only_folder_and_files_of_another_user(open_folder: Path) -> None:
    path = open_folder / "outbox.db"
    open_folder.chmod(0o555)
    with unprivileged():
        finding = store.check_store(path, None)
        assert (finding.level, finding.text.partition(" by ")[0]) == (Level.RED, f"{open_folder} cannot be written")
        assert "store.path" in (finding.remedy or "")
        assert store.check_syncs(path, time.monotonic) is None
        below = store.check_store(open_folder / "new" / "outbox.db", None)
        assert (below.level, f"make it the folder {open_folder / 'new'}" in (below.remedy or "")) == (Level.RED, True)
    open_folder.chmod(0o700)
    if os.geteuid() == 0:
        with unprivileged():
            closed = store.check_store(open_folder / "a" / "outbox.db", None)
            assert f"may not look at {open_folder / 'a'}" in closed.text
            assert (closed.level, "sudo pocd check" in (closed.remedy or "")) == (Level.RED, True)
            assert store.check_syncs(path, time.monotonic) is None
            hidden = CPU.model_copy(update={"name": str(open_folder / "model")})
            assert "Permission denied" in model.check(model.find(hidden), Probe(), hidden).text
    open_folder.chmod(0o777)
    Outbox.open(path).close()
    path.chmod(0o666)
    exposed = store.check_store(path, None)
    assert (exposed.level, exposed.remedy) == (Level.YELLOW, f"chmod o-w {open_folder}")
    assert "every user of this host may write" in exposed.text
    wal = secret_file(open_folder / "outbox.db-wal", "", 0o444)
    with unprivileged():
        finding = store.check_store(path, None)
    assert finding.level is Level.RED
    assert f"{wal} cannot be written by user" in finding.text
    assert f"chown --reference={open_folder} {wal}" in (finding.remedy or "")


def _database(path: Path, pragma: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mine (x)")
        connection.execute(pragma)
        connection.commit()


def _of_version(path: Path, version: int) -> None:
    Outbox.open(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")


@pytest.mark.parametrize(
    ("make", "level", "text"),
    [
        (lambda path: Outbox.open(path).close(), "green", "writable by user"),
        (lambda path: path.touch(), "green", "writable by user"),
        (lambda path: path.mkdir(), "red", "is not a file"),
        (lambda path: path.write_text("hello" * 100), "red", "is not a SQLite database"),
        (lambda path: _database(path, "PRAGMA application_id = 7"), "red", "another program's database"),
        (lambda path: _database(path, "PRAGMA user_version = 1"), "red", "another program's database"),
        (lambda path: _of_version(path, 99), "red", "made by a newer pocd"),
    ],
)
def test_what_is_at_the_store_s_path(tmp_path: Path, make: Callable[[Path], None], level: str, text: str) -> None:
    path = tmp_path / "outbox.db"
    make(path)
    before = sorted(tmp_path.iterdir())
    finding = store.check_store(path, None)
    assert (finding.level, text in finding.text) == (level, True), finding
    assert store.chain_of(path) is None
    assert sorted(tmp_path.iterdir()) == before


def test_a_slow_disk_and_a_full_one(tmp_path: Path) -> None:
    path, times = tmp_path / "new" / "outbox.db", iter(range(1000))
    slow = store.check_syncs(path, lambda: next(times) * 0.021)
    assert slow is not None
    assert (slow.level, slow.text.partition(" in ")[0]) == (Level.YELLOW, "21.0 ms")
    times = iter(range(1000))
    quick = store.check_syncs(path, lambda: next(times) * 0.019)
    assert quick is not None
    assert quick.level is Level.GREEN
    full = store.check_space(StoreSettings(path=path, free_space_mib=2**40))
    assert full is not None
    assert (full.level, "mining waits" in full.text) == (Level.RED, True)


# Secrets


@pytest.mark.parametrize(
    ("mode", "level"),
    [(0o600, None), (0o640, None), (0o644, "red"), (0o602, "red"), (0o660, "yellow")],
)
def test_the_mode_of_a_secret(tmp_path: Path, mode: int, level: str | None) -> None:
    path = secret_file(tmp_path / "token", TOKEN, mode)
    finding = files.check_mode("admin.token_file", path)
    assert (finding.level if finding else None) == level
    assert finding is None or f"{mode:04o}" in finding.text


def test_a_secret_of_another_user_a_bad_one_and_a_password_in_the_configuration(open_folder: Path) -> None:
    if os.geteuid() == 0:
        theirs = secret_file(open_folder / "theirs", SECRET, 0o640)
        os.chown(theirs, 12345, 0)
        with unprivileged():
            finding = files.check_mode("x", theirs)
        assert finding is not None
        assert "belongs to user 12345" in finding.text
    bad = secret_file(open_folder / "bad", "whsec_short")
    entry = f'{{ name = "main", url = "http://127.0.0.1:1", secret_file = "{bad}" }}'
    path = configured(open_folder, "http://user:hunter22@127.0.0.1:1", entry)
    path.chmod(0o644)
    found = files.check_secrets(load(path), path)
    assert [each.level for each in found] == ["red", "yellow"]
    assert found[0].text.startswith("delivery.receivers, main: ")
    assert f"{path} holds a URL with a password" in found[1].text
    assert "hunter22" not in str(found)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


# torch, cards, memory, and the model


def test_torch_driver_and_cards() -> None:
    good = Probe(torch="2.8.0", cuda_build="12.8", cards=("GPU-a", "GPU-b"))
    two = Driver("570.1", 2)
    assert devices.check_torch(good, CUDA).level is Level.GREEN
    assert devices.check_driver(two, CUDA).level is Level.GREEN
    without = replace(good, cuda_build=None, cards=())
    assert "was built without CUDA" in devices.check_torch(without, CUDA).text
    assert devices.check_torch(without, CPU).level is Level.GREEN
    assert devices.check_cards(without, CUDA) is None  # told already
    for driver, text in (
        (NoDriverError("NVML shared library not found"), "NVML"),
        (Driver("570.1", 1), "needs cuda:1"),
    ):
        finding = devices.check_driver(driver, CUDA)
        assert (finding.level, text in finding.text) == (Level.RED, True)
        assert devices.check_driver(driver, CPU).level is Level.GREEN
    none = devices.check_driver(Driver("570.1", 0), CUDA.model_copy(update={"device": "auto"}))
    assert none.level is Level.RED
    blind = devices.check_cards(replace(good, cards=None, cuda_error="driver too old"), CUDA)
    assert blind is not None
    assert (blind.level, "driver too old" in blind.text) == (Level.RED, True)
    assert devices.used_cards(good, CUDA) == ("GPU-b",)
    assert devices.used_cards(good, CUDA.model_copy(update={"device": "auto"})) == ("GPU-a", "GPU-b")


@pytest.mark.parametrize(
    ("lack", "model", "mode", "level"),
    [
        (None, CUDA, "auto", Level.GREEN),
        (LACK, CUDA, "auto", Level.YELLOW),
        (LACK, CUDA, "always", Level.RED),
        (LACK, CPU, "always", Level.RED),
        (LACK, CUDA, "never", None),
        (LACK, CPU, "auto", None),
    ],
)
def test_a_compiler_is_missed_where_something_is_to_be_compiled(
    lack: Lack | None, model: ModelSettings, mode: Compile, level: Level | None
) -> None:
    finding = devices.check_compiler(lack, model, mode)
    assert (finding and finding.level) == level
    if finding and lack:
        assert finding.text.startswith("there is no C compiler")
        assert finding.remedy == lack.remedy


@pytest.mark.parametrize("chosen", [None, "/chosen"])
async def test_the_compiler_is_looked_for_as_the_workers_will_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """For the kind of the configured device, with the cache that a worker is given, unless the environment has one."""
    asked: list[tuple[str, Path]] = []

    def find(device: str, _environment: object, *, cache: Path) -> Lack:
        asked.append((device, cache))
        return LACK

    monkeypatch.setattr(host, "find_lack", find)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if chosen:
        monkeypatch.setenv("TRITON_CACHE_DIR", chosen)
    for device, level in (("cpu", None), ("cuda", "yellow")):
        path = configured(tmp_path, "http://127.0.0.1:9", "", model__device=device, worker__cache=str(tmp_path / "own"))
        found = await host._compiler(load(path))
        assert [finding.level for finding in found] == ([level] if level else [])
    assert asked == [(device, Path(chosen or tmp_path / "own")) for device in ("cpu", "cuda")]


@pytest.mark.parametrize(
    ("used", "runs", "level"),
    [(1, False, "green"), (45, False, "yellow"), (79, False, "yellow"), (79, True, "green")],
)
def test_the_memory_that_others_leave(used: int, *, runs: bool, level: str) -> None:
    reading = CardReading(40.0, 100.0, used * GIB, 80 * GIB, 0.0)
    (finding,) = devices.check_memory({"GPU-b": reading}, ["GPU-b"], Probe(parameters=GIB), CUDA, runs=runs)
    assert (finding.level, "the weights need 2.0" in finding.text) == (level, True)


@pytest.mark.parametrize(
    ("total", "available", "device", "runs", "level"),
    [
        (8, 4, "cpu", False, "green"),
        (8, 2, "cpu", False, "yellow"),
        (8, 2, "cpu", True, "green"),
        (2, 2, "cpu", True, "red"),
        (8, 8, ["cpu"] * 4, False, "red"),
    ],
)
def test_the_memory_that_workers_on_the_cpu_need(
    total: int, available: int, device: str | list[str], *, runs: bool, level: str
) -> None:
    model = CPU.model_copy(update={"device": device, "dtype": "bfloat16"})
    memory = devices.Memory(total * GIB, available * GIB)
    (finding,) = devices.check_host_memory(memory, Probe(parameters=GIB), model, runs=runs)
    assert finding.level == level
    assert f"the weights need {2.0 if device == 'cpu' else 8.0} in bfloat16" in finding.text
    assert devices.check_host_memory(memory, Probe(), model, runs=runs) == []
    assert devices.check_host_memory(memory, Probe(parameters=GIB), CUDA, runs=runs) == []


def test_this_hosts_memory_is_read() -> None:
    memory = devices.host_memory()
    assert 0 < memory.available <= memory.total


def test_weights_that_no_card_holds() -> None:
    reading = CardReading(40.0, 100.0, 0, 8 * GIB, 0.0)
    args = ({"GPU-b": reading}, ["GPU-b"], Probe(parameters=7 * GIB))
    (finding,) = devices.check_memory(*args, CUDA, runs=True)
    assert (finding.level, "model.parallel" in (finding.remedy or "")) == (Level.RED, True)
    (finding,) = devices.check_memory(*args, CUDA.model_copy(update={"parallel": 4}), runs=False)
    assert finding.level is Level.GREEN
    (finding,) = devices.check_memory({}, ["GPU-b"], Probe(parameters=1), CUDA, runs=False)
    assert finding.level is Level.YELLOW


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub = CPU.model_copy(update={"name": "owner/name"})
    for offline, level in ((False, "yellow"), (True, "red")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        finding = model.check(model.find(hub), Probe(), hub)
        assert (finding.level, str(tmp_path) in finding.text) == (level, True)
    cached = tmp_path / "models--owner--name"
    shutil.copytree(BUNDLED / "tiny-llama", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert model.find(hub).folder == cached / "snapshots" / "abc"
    wrong = CPU.model_copy(update={"name": "some folder/of/mine"})
    assert model.check(model.find(wrong), Probe(), wrong).level is Level.RED


def test_a_fingerprint_that_takes_too_long_leaves_the_number_of_parameters() -> None:
    late = Probe(torch="2", parameters=7 * GIB, problem="no answer within 14 s", late=True)
    finding = model.check(model.find(CPU), late, CPU)
    assert (finding.level, f"{7 * GIB:,} parameters; its fingerprint" in finding.text) == (Level.YELLOW, True)
    assert "slow disk" in (finding.remedy or "")


def test_a_model_that_is_not_there() -> None:
    lost = CPU.model_copy(update={"name": "bundled:no-such-model"})
    finding = model.check(model.find(lost), Probe(), lost)
    assert (finding.level, "is not bundled" in finding.text) == (Level.RED, True)
    assert "correct model.name" in (finding.remedy or "")


# The configuration


def test_a_scheme_that_is_not_named_is_a_yellow_line_with_the_remedy(tmp_path: Path) -> None:
    entry = '{ name = "main", url = "http://127.0.0.1:9" }'
    path = configured(tmp_path, "http://127.0.0.1:9", entry)
    (finding,) = host.check_configuration(path, load(path))
    assert finding.level == "green"
    text = path.read_text()
    path.write_text(re.sub(r"(?m)^scheme = .*$", "", text))
    assert path.read_text() != text
    (finding,) = host.check_configuration(path, load(path))
    assert (finding.name, finding.level) == ("configuration", "yellow")
    assert "round.scheme is not named, so it is 'poc2'" in finding.text
    assert "'poc4'" in (finding.remedy or "")
    assert "name 'poc2' to keep it" in (finding.remedy or "")
