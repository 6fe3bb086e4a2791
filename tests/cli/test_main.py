"""The command line: what it prints, and how it ends; by processes of its own where these have a part in it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from pocd import __version__
from pocd.cli import main as cli
from pocd.process import EXIT_CONFIG, EXIT_CRASH, EXIT_NO_DEVICE, EXIT_OK, EXIT_TEMPORARY
from pocd.protocol.vectors import decode_vectors
from tests.support.command_line import pocd_here

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.command_line import Ended

ROOT = Path(__file__).resolve().parent.parent.parent
USAGE = 2
SECRET = "hunter2"
POCD = (sys.executable, "-W", "error", "-m", "pocd")
# Without a GPU everywhere, and never a look at the network.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.upper().startswith("POCD_")} | {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


def run(*command: str) -> Ended:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False)


def pocd(*arguments: str | Path) -> Ended:
    return run(*POCD, *map(str, arguments))


def refusal(ended: Ended, code: int) -> str:
    """The one line by which a command that failed says why."""
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("pocd: ")
    return line.removeprefix("pocd: ")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "pocd.toml"
    path.write_text(f'[node]\npublic_key = "key"\n[chain]\nurls = ["http://user:{SECRET}@chain.example"]\n')
    return path


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def silent() -> Iterator[int]:
    """A port on which nothing listens, and nothing else can begin to."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def test_the_version() -> None:
    ended = pocd_here("--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (EXIT_OK, f"pocd {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--bogus"], "--bogus"),
        (["mine"], "'mine'"),
        (["status", "--bogus"], "--bogus"),
        (["config", "check", "--config"], "--config"),
        (["devchain", "--port", "65536"], "65535"),
        (["compute", "--nonces", "1"], "--model"),
    ],
)
def test_a_mistyped_command_is_refused_in_a_line(arguments: list[str], reason: str) -> None:
    assert reason in refusal(pocd_here(*arguments), USAGE)


# The configuration.


def test_a_good_configuration(config: Path) -> None:
    ended = pocd_here("config", "check", "--config", config)
    assert (ended.returncode, ended.stdout, ended.stderr) == (EXIT_OK, f"{config}: good\n", "")


@pytest.mark.parametrize("command", [["config", "check"], ["config", "show"], ["run"], ["status"]])
def test_a_bad_configuration_names_file_and_key(config: Path, command: list[str]) -> None:
    config.write_text(config.read_text() + "[admin]\nport = 'http'\n")
    started = pocd if command == ["run"] else pocd_here
    reason = refusal(started(*command, "--config", config), EXIT_CONFIG)
    assert reason.startswith(f"{config}: admin.port: ")
    assert SECRET not in reason


def test_the_configuration_in_effect(config: Path) -> None:
    ended = pocd_here("config", "show", "--config", config)
    assert (ended.returncode, ended.stderr) == (EXIT_OK, "")
    shown = tomllib.loads(ended.stdout)
    assert shown["chain"]["urls"] == ["http://***@chain.example"]
    assert shown["round"]["every"] == 60


def test_a_reader_that_has_gone_is_no_failure(config: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [*POCD, "config", "show", "--config", config],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        check=False,
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (EXIT_OK, b"")


# Speaking to the daemon.


@pytest.mark.parametrize("command", ["status", "stop", "resume"])
def test_no_daemon_is_a_clear_line(silent: int, command: str) -> None:
    reason = refusal(pocd_here(command, "--url", f"http://127.0.0.1:{silent}"), EXIT_CRASH)
    assert reason.startswith(f"nothing listens on http://127.0.0.1:{silent}; is the daemon running")


def test_the_daemons_address_is_read_from_the_configuration(config: Path, silent: int) -> None:
    config.write_text(f"{config.read_text()}[admin]\nport = {silent}\n")
    assert f"nothing listens on http://127.0.0.1:{silent};" in refusal(
        pocd_here("status", "--config", config), EXIT_CRASH
    )


def test_an_unreadable_token_file_names_its_key(config: Path, tmp_path: Path) -> None:
    config.write_text(f"{config.read_text()}[admin]\ntoken_file = '{tmp_path / 'token'}'\n")
    reason = refusal(pocd_here("status", "--config", config), EXIT_CONFIG)
    assert reason.startswith(f"admin.token_file {tmp_path / 'token'} cannot be read")


def test_a_client_reads_no_more_than_where_the_api_is(config: Path, tmp_path: Path, silent: int) -> None:
    """Only the service has the credentials that the file names."""
    token = tmp_path / "token"
    token.write_text("secret")
    config.write_text(
        f"{config.read_text()}[admin]\nport = {silent}\ntoken_file = 'credential:token'\n"
        "[[delivery.receivers]]\nname = 'a'\nurl = 'http://a.example'\nsecret_file = 'credential:secret'\n"
    )
    known = refusal(pocd_here("status", "--config", config, "--token-file", token), EXIT_CRASH)
    assert f"nothing listens on http://127.0.0.1:{silent};" in known
    assert "admin.token_file" in refusal(pocd_here("status", "--config", config), EXIT_CONFIG)
    good = pocd_here("config", "check", "--config", config).stdout
    assert good == f"{config}: good, but for credential:token, credential:secret, which only pocd.service can read\n"
    shown = pocd_here("config", "show", "--config", config).stdout
    assert 'token_file = "credential:token"' in shown
    config.write_text("not TOML")
    reason = refusal(pocd_here("status", "--config", config, "--url", f"http://127.0.0.1:{silent}"), EXIT_CRASH)
    assert "nothing listens" in reason


@pytest.mark.parametrize("command", ["status", "run", "watch"])
def test_a_configuration_that_may_not_be_read_is_a_line_with_the_remedy(config: Path, command: str) -> None:
    config.chmod(0)
    me = [] if os.geteuid() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--reuid=0", "--no-new-privs"]
    if me and (shutil.which("setpriv") is None or run(*me, "cat", str(config)).returncode == 0):
        pytest.skip("root reads every file here")
    reason = refusal(run(*me, *POCD, command, "--config", str(config)), EXIT_CONFIG)
    assert reason.startswith(f"{config} cannot be read by user ")
    assert "the group pocd" in reason
    assert "--token-file" in reason


def test_the_last_line_is_an_error_in_the_journal(tmp_path: Path) -> None:
    sink = tmp_path / "stderr"
    with sink.open("wb") as stream:
        found = os.fstat(stream.fileno())
        journal = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        subprocess.run(
            [*POCD, "config", "check", "--config", tmp_path / "no"],
            stderr=stream,
            env=ENVIRONMENT | journal,
            check=False,
        )
    assert sink.read_text().startswith(f"<3>pocd: {tmp_path / 'no'} does not exist")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_do_no_harm(config: Path, closed: str) -> None:
    assert (
        run("sh", "-c", f'"$0" "$@" {closed}', *POCD, "config", "check", "--config", str(config)).returncode == EXIT_OK
    )


# The development programs.


@pytest.mark.parametrize("command", ["devchain", "receiver"])
def test_a_taken_port_is_a_clear_line(tmp_path: Path, taken: int, command: str) -> None:
    store: list[str | Path] = ["--store", tmp_path / "receiver.db"] if command == "receiver" else []
    reason = refusal(pocd_here(command, "--port", str(taken), *store), EXIT_TEMPORARY)
    assert reason.startswith(f"cannot listen on 127.0.0.1:{taken}: ")
    assert "already in use" in reason


def test_a_receivers_bad_secret_is_not_told(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(f"{SECRET}\n")
    reason = refusal(pocd_here("receiver", "--secret-file", secrets, "--store", tmp_path / "receiver.db"), EXIT_CONFIG)
    assert reason.startswith(f"{secrets}, line 1: ")
    assert SECRET not in reason


# Failures that nobody foresaw.


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Path) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(cli, "load", load)


@pytest.mark.usefixtures("broken")
def test_an_unforeseen_failure_is_a_line() -> None:
    reason = refusal(pocd_here("config", "check"), EXIT_CRASH)
    assert reason == "RuntimeError: unforeseen (pocd --debug … shows where)"


@pytest.mark.usefixtures("broken")
def test_debug_shows_where() -> None:
    ended = pocd_here("--debug", "config", "check")
    assert ended.returncode == EXIT_CRASH
    assert "Traceback (most recent call last)" in ended.stderr
    assert "in config_check" in ended.stderr


# Starting fast.


BIG = {"aiohttp", "numpy", "safetensors", "scipy", "torch", "transformers", "uvloop"}
# Commands one after the other, and after each all that has been imported, as far as it is big.
LOOKED_AT = f"""
import sys
from pocd.cli.main import main
for command in sys.argv[1:]:
    sys.argv = ["pocd", *command.split()]
    try:
        main()
    except SystemExit as end:
        print(command, end.code or 0, sorted({BIG} & sys.modules.keys()), file=sys.stderr)
"""


def test_small_commands_import_nothing_big(config: Path) -> None:
    commands = ["--version", f"config check --config {config}", f"config show --config {config}"]
    ended = run(sys.executable, "-c", LOOKED_AT, *commands)
    assert ended.stderr.splitlines() == [f"{command} 0 []" for command in commands]


# What `pocd run` imports before it looks at its configuration.
OF_THE_DAEMON = f"""
import sys
import pocd.daemon.daemon
from pocd.observe import logs, notify
print(sorted(({BIG} - {{"aiohttp", "uvloop"}}) & sys.modules.keys()))
"""


def test_a_daemon_that_judges_nothing_needs_no_numbers_of_arrays() -> None:
    assert run(sys.executable, "-c", OF_THE_DAEMON).stdout == "[]\n"


# Computing distances.


def compute(*, nonces: str = "0", **options: str) -> list[str]:
    values = {
        "model": "bundled:tiny-qwen3",
        "block-hash": "ABC",
        "public-key": "key",
        "nonces": nonces,
        "seq-len": "8",
        "batch-size": "1",
    }
    return ["compute", *(f"--{name}={value}" for name, value in (values | options).items())]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"nonces": "x"}, "nonces: 'x' is neither a number nor a range a:b"),
        ({"nonces": "1,0:5"}, "nonces: 1 is named twice"),
        ({"nonces": "5:5"}, "nonces: the range 5:5 is empty"),
        ({"nonces": str(2**63)}, f"nonces: {2**63} goes beyond 2**63 - 1"),
        ({"scheme": "poc9"}, "scheme 'poc9' is unknown; allowed are: trained, random-weights, "),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; allowed are: float32, float16, bfloat16"),
        ({"device": "gpu"}, "device 'gpu' is unknown; allowed are: cpu, cuda, cuda:N"),
        ({"model": "bundled:huge"}, "model 'bundled:huge' is not bundled; the bundled ones are: bundled:tiny-"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_a_line(options: dict[str, str], reason: str) -> None:
    assert refusal(pocd_here(*compute(**options)), EXIT_CONFIG).startswith(reason)


def test_a_missing_gpu_is_its_own_exit_status() -> None:
    reason = refusal(pocd_here(*compute(device="cuda:99")), EXIT_NO_DEVICE)
    assert reason.startswith("device 'cuda:99' ")


def test_distances_as_json() -> None:
    ended = pocd_here(*compute(nonces="7,3", dtype="float32"), "--json")
    assert (ended.returncode, ended.stderr) == (EXIT_OK, "")
    lines = [orjson.loads(line) for line in ended.stdout.splitlines()]
    assert [line.keys() for line in lines] == [{"nonce", "distance"}] * 2
    assert [line["nonce"] for line in lines] == [7, 3]
    assert all(0 < line["distance"] < 2 for line in lines)


def test_vectors_as_json_and_for_people() -> None:
    ended = pocd_here(*compute(nonces="7,3", dtype="float32", scheme="poc4"), "--json")
    assert (ended.returncode, ended.stderr) == (EXIT_OK, "")
    lines = [orjson.loads(line) for line in ended.stdout.splitlines()]
    assert [line.keys() for line in lines] == [{"nonce", "vector_b64"}] * 2
    assert [line["nonce"] for line in lines] == [7, 3]
    vectors = [decode_vectors(line["vector_b64"]) for line in lines]
    shown = pocd_here(*compute(nonces="7,3", dtype="float32", scheme="poc4")).stdout.splitlines()
    for line, nonce, vector in zip(shown, (7, 3), vectors, strict=True):
        first, *numbers = line.split()
        assert first == str(nonce)
        assert list(map(float, numbers)) == pytest.approx(vector[0].tolist(), abs=5.1e-5)


def test_a_reader_that_wants_one_line_ends_it() -> None:
    """More nonces than any test has time for, so that it ends for no other reason."""
    with subprocess.Popen(
        [*POCD, *compute(nonces=f"0:{2**60}")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in ENVIRONMENT.items() if name != "HF_HUB_OFFLINE"} | {"FORKED": "yes"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        nonce, _distance = process.stdout.readline().split("\t")
        process.stdout.close()
        assert (nonce, process.stderr.read(), process.wait()) == ("0", "", EXIT_OK)
