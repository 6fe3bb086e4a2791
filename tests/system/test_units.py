"""The unit and the user file, read by systemd's own programs, and held against the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pocd.config.settings import DEFAULT_PATH, StoreSettings
from pocd.daemon import daemon
from pocd.pool.limits import WorkerLimits
from pocd.process import EXIT_CONFIG, EXIT_NO_DEVICE
from pocd.store.opening import HELD_SECONDS

FOLDER = Path(__file__).resolve().parent.parent.parent / "systemd"
UNIT = FOLDER / "pocd.service"
TEMPLATE = FOLDER / "pocd@.service"
RELAY = FOLDER / "pocd-relay.service"
ONLY_GPUS = FOLDER / "pocd.service.d" / "gpu.conf"
RAY = [FOLDER / "pocd-ray-head.service", FOLDER / "pocd-ray-worker.service"]
USERS = FOLDER / "sysusers.d" / "pocd.conf"
BINARY = "/opt/pocd/bin/pocd"


def values(key: str) -> list[str]:
    """What the unit sets `key` to, once for each line."""
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE)


def value(key: str) -> str:
    (only,) = values(key)
    return only


def seconds(key: str) -> int:
    minutes, is_minutes, rest = value(key).partition("min")
    return 60 * int(minutes) if is_minutes and not rest else int(value(key).removesuffix("s"))


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed; it belongs to systemd")
    return path


def verified(text: str, folder: Path, name: str = "pocd.service") -> str:
    """What `systemd-analyze verify` says of a unit, whose program is put in place: this machine has no /opt/pocd."""
    unit = folder / name
    unit.write_text(text.replace(BINARY, "/bin/true").replace("/opt/pocd/bin/ray", "/bin/true"), encoding="utf-8")
    done = subprocess.run(
        [program("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", unit],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout or ("" if done.returncode == 0 else f"exit status {done.returncode}")


@pytest.mark.parametrize("path", [UNIT, TEMPLATE, RELAY, *RAY], ids=lambda path: path.name)
def test_systemd_has_nothing_to_say_about_the_unit(path: Path, tmp_path: Path) -> None:
    assert verified(path.read_text(encoding="utf-8"), tmp_path, path.name) == ""


def test_systemd_has_nothing_to_say_about_the_drop_in(tmp_path: Path) -> None:
    text = UNIT.read_text(encoding="utf-8") + ONLY_GPUS.read_text(encoding="utf-8")
    assert verified(text, tmp_path) == ""


def test_systemd_has_nothing_to_say_about_the_examples_in_the_unit(tmp_path: Path) -> None:
    text = re.sub(r"^#(?=[A-Z]\w+=)", "", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert "\nLoadCredential=" in text
    said = verified(text, tmp_path).splitlines()
    assert [line for line in said if "nvidia-modprobe is not executable" not in line] == []


def test_systemd_would_have_said_something(tmp_path: Path) -> None:
    text = UNIT.read_text(encoding="utf-8").replace("OOMPolicy=", "OOMPolice=")
    assert "Unknown key" in verified(text, tmp_path)


def confined(unit: Path) -> tuple[int, str]:
    """Whether systemd's own judgement of a unit is 2.0 or better (as an exit status), and all of it."""
    done = subprocess.run(
        [program("systemd-analyze"), "security", "--offline=true", "--threshold=20", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("path", [UNIT, TEMPLATE, *RAY], ids=lambda path: path.name)
def test_systemd_finds_the_service_well_confined(path: Path, tmp_path: Path) -> None:
    status, judgement = confined(Path(shutil.copy(path, tmp_path)))
    assert status == 0, judgement


def test_systemd_would_have_found_a_service_that_is_not(tmp_path: Path) -> None:
    unit = tmp_path / "pocd.service"
    text = UNIT.read_text(encoding="utf-8")
    unit.write_text(text.replace("\nSystemCallFilter=", "\n#"), encoding="utf-8")
    assert confined(unit)[0] != 0


def test_every_directive_that_is_left_out_is_explained(tmp_path: Path) -> None:
    """What systemd would like to see set, beside what a service on the network cannot do without."""
    status, judgement = confined(Path(shutil.copy(UNIT, tmp_path)))  # without the optional drop-ins beside it
    assert status == 0
    missing = {line.split()[1].partition("=")[0] for line in judgement.splitlines() if line.startswith("✗")}
    comments = " ".join(line for line in UNIT.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    named = {"DeviceAllow": "DevicePolicy", "RestrictAddressFamilies": "Sockets for", "SystemCallFilter": "@resources"}
    assert {name for name in missing if named.get(name, name) not in comments} == set()


def test_the_template_is_the_unit_but_for_the_instance() -> None:
    single, template = (path.read_text(encoding="utf-8").partition("\n[Unit]")[2] for path in (UNIT, TEMPLATE))
    changes = {
        "Proof-of-Compute daemon": "Proof-of-Compute daemon, instance %i",
        "/etc/pocd/pocd.toml": "/etc/pocd/%i.toml",
        "RuntimeDirectory=pocd\n": "RuntimeDirectory=pocd-%i\n",
        "StateDirectory=pocd\n": "StateDirectory=pocd/%i\n",
        "/run/pocd (": "/run/pocd-%i (",
        "/var/lib/pocd (": "/var/lib/pocd/%i (",
    }
    for one, of_an_instance in changes.items():
        assert one in single
        single = single.replace(one, of_an_instance)
    assert template == single


def test_systemd_makes_the_services_user() -> None:
    done = subprocess.run(
        [program("systemd-sysusers"), "--dry-run", USERS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (user,) = [line.split() for line in USERS.read_text().splitlines() if line.startswith("u ")]
    assert (user[1], user[-1]) == (value("User"), "/var/lib/pocd")
    assert value("Group") == value("User")


def test_directories_are_those_of_the_settings() -> None:
    shown = (FOLDER.parent / "config" / "pocd.toml").read_text(encoding="utf-8")
    assert f'socket = "/run/{value("RuntimeDirectory")}/admin.sock"' in shown
    assert str(StoreSettings().path.parent) == f"/var/lib/{value('StateDirectory')}"
    assert str(DEFAULT_PATH.parent) == f"/etc/{value('ConfigurationDirectory')}"
    caches = [line.partition("=")[2] for line in values("Environment")]
    assert caches
    assert all(cache.startswith(f"/var/cache/{value('CacheDirectory')}/") for cache in caches)


@pytest.mark.parametrize("path", RAY, ids=lambda path: path.name)
def test_the_units_of_a_cluster_keep_its_workers_from_the_daemons_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "\nInaccessiblePaths=-/etc/pocd -/var/lib/pocd -/run/pocd\n" in text
    (user,) = re.findall(r"^User=(.*)$", text, flags=re.MULTILINE)
    assert user != value("User")
    (group,) = re.findall(
        r"^SupplementaryGroups=(.*)$", (UNIT.with_suffix(".service.d") / "ray.conf").read_text(), re.MULTILINE
    )
    assert group == user, "the daemon's bridge reaches Ray's sockets"
    folder = re.findall(r"--temp-dir=(\S+)", text)
    assert folder == ["/run/pocd-ray/ray"], "Ray opens it to everybody, so that it lies in one that is closed"
    assert "\nRuntimeDirectoryMode=0750\n" in text
    hardening = UNIT.read_text(encoding="utf-8").partition("NoNewPrivileges=")[2].partition("[Install]")[0]
    assert [line for line in hardening.splitlines() if line[:1].isupper() and line not in text] == []


def test_the_command_is_one_that_pocd_has() -> None:
    assert value("ExecStart") == f"{BINARY} run --config {DEFAULT_PATH}"


def test_a_check_comes_first_and_hinders_nothing() -> None:
    assert value("ExecStartPre") == f"-{BINARY} check --config {DEFAULT_PATH}"


def test_reloading_is_a_check_and_then_the_signal_that_the_daemon_heeds() -> None:
    check, signal = values("ExecReload")
    assert check == f"{BINARY} config check --config {DEFAULT_PATH}"
    assert signal.split() == ["/bin/kill", "-HUP", "$MAINPID"]


def test_only_a_bad_configuration_stays_down() -> None:
    assert value("Restart") == "on-failure"
    assert value("RestartPreventExitStatus").split() == [str(EXIT_CONFIG)]
    assert str(EXIT_NO_DEVICE) not in values("SuccessExitStatus")


def test_systemd_is_more_patient_than_the_daemon() -> None:
    limits = WorkerLimits(batch=0)
    assert seconds("TimeoutStartSec") > HELD_SECONDS
    assert seconds("TimeoutStopSec") > 2 * (daemon.FINISH_SECONDS + daemon.DELIVER_SECONDS + limits.exit)


def test_the_daemon_and_its_unit_speak_the_same_protocol() -> None:
    assert (value("Type"), value("NotifyAccess"), value("KillMode")) == ("notify", "main", "mixed")
    assert seconds("WatchdogSec") >= 30
    assert value("OOMPolicy") == "continue"


@pytest.mark.parametrize(
    "directive",
    ["PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute", "ProcSubset"],
)
def test_nothing_that_would_take_the_gpu_away(directive: str) -> None:
    assert values(directive) == []
