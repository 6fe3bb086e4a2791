"""scripts/install and scripts/uninstall on a staging prefix, with a wheel that was really built.

A full install takes minutes, for torch. So the packages of this environment are lent to the new ones: pip resolves
pocd's dependencies by the pins, finds them there, and installs nothing but pocd and one small package, which it has to
take from a folder of wheels, without a network.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from pocd.config.settings import load
from tests.support.delivering import serving
from tests.support.processes import Chain, running
from tests.support.wheels import rebuild

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent.parent
PREVIOUS = ROOT / "tests" / "data" / "pocd_previous.toml"  # as the release before this one shipped it
SMALL = "nvidia-ml-py"
OWN = ("pocd", "__editable__", "pip", "_virtualenv", "__pycache__", "pynvml", "nvidia_ml_py")  # what is not lent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds this one's packages, but not its pocd."""
    lent = tmp_path_factory.mktemp("lent")
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(OWN) and package.suffix != ".pth":
            (lent / package.name).symlink_to(package)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("POCD_")}
    wheels = tmp_path_factory.mktemp("wheels")
    rebuild(SMALL, wheels)
    return kept | {
        "PYTHONPATH": str(lent),
        "PYTHON": sys.executable,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    (built,) = folder.iterdir()
    return built


class Stage:
    """A prefix, and the scripts run on it."""

    def __init__(self, prefix: Path, environment: dict[str, str]) -> None:
        self.prefix = prefix
        self.environment = environment
        self.config = prefix / "etc" / "pocd" / "pocd.toml"
        self.pocd = prefix / "opt" / "pocd" / "bin" / "pocd"
        self.shortcut = prefix / "usr" / "local" / "bin" / "pocd"

    def run(self, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a script from the folder above the prefix, all paths relative to it."""
        caller = self.prefix.parent
        relative = [os.path.relpath(each, caller) if isinstance(each, Path) else each for each in arguments]
        command = [os.path.relpath(ROOT / "scripts" / script, caller), "--prefix", self.prefix.name, *relative]
        return subprocess.run(command, env=self.environment, cwd=caller, capture_output=True, text=True, check=False)

    def install(self, *arguments: str | Path) -> str:
        done = self.run("install", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def releases(self) -> list[str]:
        return sorted(path.name for path in (self.prefix / "opt" / "pocd" / "releases").iterdir())

    def mode(self, path: str) -> int:
        return stat.S_IMODE((self.prefix / path).stat().st_mode)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], wheel: Path) -> Stage:
    """A host where pocd was just installed."""
    made = Stage(tmp_path_factory.mktemp("host") / "a prefix with blanks", environment)
    old = os.umask(0o077)  # as a careful root has it
    try:
        assert "kept" not in made.install("--wheel", wheel)
    finally:
        os.umask(old)
    return made


def test_the_wheel_holds_all_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("pocd/")}
    tree = (path for path in (ROOT / "pocd").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {str(path.relative_to(ROOT)) for path in tree}
    assert {"pocd/worker/known_distances.json", "pocd/models/tiny-llama/model.safetensors"} <= held


def test_an_install_is_complete(stage: Stage) -> None:
    assert stage.config.read_text() == (ROOT / "config" / "pocd.toml").read_text()
    for unit in ("pocd.service", "pocd@.service", "pocd-relay.service"):
        installed = stage.prefix / "etc" / "systemd" / "system" / unit
        assert installed.read_text() == (ROOT / "systemd" / unit).read_text()
        assert not installed.with_name(f"{unit}.d").exists()
    assert (stage.prefix / "etc" / "sysusers.d" / "pocd.conf").exists()
    assert stage.shortcut.readlink() == stage.pocd
    assert not stage.pocd.with_name("ray").is_symlink()
    # Secrets are not for everybody; the program is for the service's user, whatever root's umask.
    assert [stage.mode(path) for path in ("etc/pocd", "etc/pocd/pocd.toml", "var/lib/pocd")] == [0o750, 0o640, 0o750]
    assert all(stage.mode(f"opt/pocd/{path}") == 0o755 for path in ("", "bin", "releases"))
    assert stage.pocd.resolve().stat().st_mode & 0o005 == 0o005


def test_what_is_installed_computes_in_an_empty_directory(stage: Stage, tmp_path: Path) -> None:
    def pocd(*arguments: str) -> str:
        command = [str(stage.shortcut), *arguments]
        return subprocess.check_output(command, env=stage.environment, cwd=tmp_path, text=True)

    assert "Usage: pocd" in pocd("--help")
    arguments = ("--model", "bundled:tiny-qwen3", "--block-hash", "AB", "--public-key", "key", "--seq-len", "16")
    lines = pocd("compute", *arguments, "--nonces", "0:2", "--json").splitlines()
    assert [orjson.loads(line)["nonce"] for line in lines] == [0, 1]
    # What was not lent came from the folder of wheels, without an index.
    assert list(stage.pocd.resolve().parent.parent.glob("lib/python*/site-packages/pynvml.py"))
    # It is the wheel's code that ran: of the release, with its own models.
    assert not list(tmp_path.iterdir())
    assert list(stage.pocd.resolve().parent.parent.glob("lib/python*/site-packages/pocd/models/tiny-qwen3"))


def test_one_script_at_a_time_is_at_work(stage: Stage, wheel: Path) -> None:
    releases = stage.releases()
    held = os.open(stage.prefix / "opt", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        for script, arguments in {"install": ("--wheel", wheel), "uninstall": ()}.items():
            done = stage.run(script, *arguments)
            assert done.returncode == 1
            assert "another install or uninstall is at work" in done.stderr
    finally:
        os.close(held)
    assert stage.releases() == releases
    assert stage.pocd.resolve().exists()


@pytest.fixture
def running_release(stage: Stage) -> Iterator[Path]:
    """A release of two upgrades ago, on which a daemon still runs."""
    program = stage.prefix / "opt" / "pocd" / "releases" / "20200102T000000Z-1" / "bin" / "python"
    program.parent.mkdir(parents=True)
    shutil.copy(shutil.which("cat") or "", program)
    with subprocess.Popen([program], stdin=subprocess.PIPE) as process:
        yield program.parent.parent
        process.communicate()


UNITS_IN_A_CLUSTER = ("pocd-ray-worker.service", "pocd.service.d/ray.conf", "pocd.service.d/gpu.conf")


def assert_is_of_a_cluster(stage: Stage) -> None:
    """Assert that a host has all parts of a machine of a cluster, with the limit to GPUs."""
    units = stage.prefix / "etc" / "systemd" / "system"
    assert all((units / name).read_text() == (ROOT / "systemd" / name).read_text() for name in UNITS_IN_A_CLUSTER)
    assert not (units / "pocd-ray-head.service").exists()
    assert (stage.prefix / "etc" / "sysusers.d" / "pocd-ray.conf").exists()
    assert [stage.mode(path) for path in ("etc/pocd-ray", "etc/pocd-ray/ray.env")] == [0o750, 0o640]
    release = stage.pocd.readlink()
    assert stage.pocd.with_name("ray").readlink() == release.with_name("ray"), "Ray is of the release that pocd is of"


def test_an_upgrade_keeps_configuration_and_state_and_the_releases_in_use(
    stage: Stage, wheel: Path, running_release: Path
) -> None:
    (first,) = set(stage.releases()) - {running_release.name}
    stage.config.write_bytes(PREVIOUS.read_bytes())
    store = stage.prefix / "var" / "lib" / "pocd" / "outbox.db"
    store.write_bytes(b"proofs")
    drop_in = stage.prefix / "etc" / "systemd" / "system" / "pocd.service.d" / "override.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\n")
    (stage.prefix / "opt" / "pocd" / "releases" / "20200101T000000Z-1").mkdir()  # of an install long ago

    said = stage.install("--wheel", wheel, "--only-gpu-devices", "--ray", "10.0.0.1:6379")
    assert f"kept {stage.config}" in said
    assert stage.config.read_bytes() == PREVIOUS.read_bytes()
    assert store.read_bytes() == b"proofs"
    assert drop_in.exists()
    assert_is_of_a_cluster(stage)
    variables = stage.prefix / "etc" / "pocd-ray" / "ray.env"
    assert re.findall("^[^#].*", variables.read_text(), re.MULTILINE) == ["RAY_HEAD=10.0.0.1:6379"]
    in_use, before, current = stage.releases()
    assert (in_use, before) == (running_release.name, first), "daemons that were not restarted yet run on in them"
    assert stage.pocd.resolve().parent.parent.name == current


def test_an_upgrade_that_fails_leaves_the_old_version_in_use(stage: Stage, wheel: Path) -> None:
    """It fails late: the new version does not take the configuration that the one in use takes."""
    current, releases = stage.pocd.resolve(), stage.releases()
    good, program = stage.config.read_text(), current.read_text()
    stage.config.write_text(good.replace("[round]", "[round]\ncolour = 1"))
    current.write_text("#!/bin/sh\nexit 0\n")  # a version that knows the key
    done = stage.run("install", "--wheel", wheel)
    assert done.returncode == 1
    assert "does not take the configuration" in done.stderr
    assert "round.colour" in done.stderr
    assert "what was in use before still is" in done.stderr
    assert (stage.pocd.resolve(), stage.releases()) == (current, releases)
    stage.config.write_text(good)
    current.write_text(program)


def test_a_machine_of_a_cluster_stays_one_in_upgrades(stage: Stage, wheel: Path) -> None:
    variables = stage.prefix / "etc" / "pocd-ray" / "ray.env"
    variables.write_text(f"RAY_AUTH_MODE=token\n{variables.read_text()}")
    for name in UNITS_IN_A_CLUSTER:
        (stage.prefix / "etc" / "systemd" / "system" / name).write_text("of the version before")
    before = stage.pocd.with_name("ray").readlink()
    stage.install("--wheel", wheel)
    assert_is_of_a_cluster(stage)
    assert stage.pocd.with_name("ray").readlink() != before
    set_ = re.findall("^[^#].*", variables.read_text(), re.MULTILINE)
    assert set_ == ["RAY_AUTH_MODE=token", "RAY_HEAD=10.0.0.1:6379"], "what an operator wrote stays"


def test_uninstalling_keeps_what_cannot_be_made_again_unless_told(stage: Stage) -> None:
    prefix = stage.prefix
    done = stage.run("uninstall")
    assert done.returncode == 0, done.stderr
    files = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    kept = {
        "etc/pocd/pocd.toml",
        "etc/pocd-ray/ray.env",
        "var/lib/pocd/outbox.db",
        "etc/systemd/system/pocd.service.d/override.conf",
    }
    assert files == kept
    assert not (prefix / "opt" / "pocd").exists()
    assert stage.run("uninstall", "--purge").returncode == 0
    assert not [path for path in prefix.rglob("*") if path.is_file() or "pocd" in path.name]


def test_the_configuration_of_the_previous_release_is_still_good(tmp_path: Path) -> None:
    settings = load(PREVIOUS)
    assert settings.store.path == Path("/var/lib/pocd/outbox.db")
    # What it does not name has a default.
    lines = PREVIOUS.read_text().splitlines()
    path = tmp_path / "pocd.toml"
    path.write_text("\n".join(line for line in lines if not line.startswith("#")))
    assert load(path) == settings


async def test_a_daemon_on_the_configuration_and_a_store_of_before_delivers_what_waited(tmp_path: Path) -> None:
    store, path = tmp_path / "outbox.db", tmp_path / "pocd.toml"
    with contextlib.closing(sqlite3.connect(store)) as old:
        old.executescript((PREVIOUS.parent / "store_v3.sql").read_text())
    async with Chain().served() as chain, serving() as server:
        edits = {
            '"http://127.0.0.1:26657"': f'"{chain.url}"',
            '"Qwen/Qwen3-0.6B"': '"bundled:tiny-llama"',
            'device = "cuda"': 'device = "cpu"',
            "port = 8460": "port = 0",
            "/var/lib/pocd/outbox.db": str(store),
        }
        text = PREVIOUS.read_text()
        for placeholder, value in edits.items():
            assert placeholder in text
            text = text.replace(placeholder, value)
        path.write_text(f'{text}\n[[delivery.receivers]]\nname = "main"\nurl = "{server.url}"\n')
        async with running(path) as daemon:
            # One batch waited, another one is formed of a proof that waited; mining was stopped, and stays so.
            assert [request.sequence for request in await server.take(2)] == [2, 3]
            body = await daemon.status()
            assert (body["state"], body["funnel"]["checked"], body["funnel"]["stored"]) == ("STOPPED", 9, 5)
            assert await daemon.end() == 0


@pytest.mark.parametrize("script", ["install", "uninstall"])
def test_mistakes_in_the_call_change_nothing(script: str, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([ROOT / "scripts" / script, *arguments], capture_output=True, text=True, check=False)

    assert run("--help").stdout.startswith(f"usage: scripts/{script} ")
    wrong = run("--prefix", str(tmp_path), "--colour")
    assert wrong.returncode == 1
    assert "unknown argument --colour" in wrong.stderr
    assert run("--prefix").returncode == 1
    if script == "install":
        assert "expected HOST:PORT" in run("--prefix", str(tmp_path), "--ray", "10.0.0.1").stderr
        assert "not both" in run("--prefix", str(tmp_path), "--ray-head", "--ray", "10.0.0.1:6379").stderr
    assert not list(tmp_path.iterdir())


def looked_at(folder: Path, **environment: str) -> str:
    """Run what scripts/install runs of Python where there is an NVIDIA driver; Triton is there, but empty."""
    (source,) = re.findall(
        r"/python\" - <<'END'[^\n]*\n(.*?)\nEND\n", (ROOT / "scripts" / "install").read_text(), flags=re.DOTALL
    )
    (folder / "triton").mkdir(exist_ok=True)
    (folder / "triton" / "__init__.py").touch()
    known = {"PYTHONPATH": f"{folder}:{ROOT}", "HOME": str(folder), "PATH": "/usr/bin:/bin"} | environment
    done = subprocess.run([sys.executable, "-"], input=source, env=known, capture_output=True, text=True, check=True)
    return str(done.stdout)


def test_an_install_beside_a_driver_says_what_the_compiler_lacks(tmp_path: Path) -> None:
    assert looked_at(tmp_path, PATH=str(tmp_path)) == (
        "for full speed: there is no C compiler (gcc or clang); install one (Debian: gcc)\n"
    )
    (tmp_path / "gcc").touch(mode=0o755)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = f"for full speed: there is no {header}; install this Python's headers (Debian: python3-dev)\n"
    assert looked_at(tmp_path, PATH=str(tmp_path)) == ("" if header.is_file() else missing)
    if header.is_file() and os.statvfs("/proc").f_flag & os.ST_NOEXEC:
        told = looked_at(tmp_path, PATH=str(tmp_path), TRITON_CACHE_DIR="/proc/cache")
        assert told.startswith("for full speed: nothing in /proc/cache may be executed: it is mounted noexec; set wor")


def test_shellcheck_has_nothing_to_say() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
    scripts = [ROOT / "scripts" / name for name in ("install", "uninstall")]
    done = subprocess.run([program, *scripts], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
