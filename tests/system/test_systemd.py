"""The service under a real systemd, from its installation to its removal: one boot, and each test goes on in it.

The packages of this environment are lent to what is installed there; see tests/system/test_install.py.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from pocd.process import EXIT_CONFIG, EXIT_CRASH, EXIT_TEMPORARY
from tests.support.container import CannotBootError, Container, booted
from tests.support.waiting import PATIENCE
from tests.support.wheels import rebuild

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKOUT, PACKAGES, LENT, WHEELS = "/srv/checkout", "/srv/packages", "/srv/lent", "/srv/wheels"
HAS_RAY = find_spec("ray") is not None
SECRET = "whsec_" + "QUFB" * 10
CONFIG = """
node.public_key = "key"
chain.urls = ["http://127.0.0.1:26657"]
chain.poll_interval = 0.5
round.every = 1
round.duration = 1
round.seq_len = 16
round.r_target = 1.414
model.name = "bundled:tiny-llama"
model.dtype = "float32"
model.device = "cpu"
worker.batch_size = 8
delivery.batch_seconds = 0.5
admin.token_file = "credential:token"
[[delivery.receivers]]
name = "main"
url = "http://127.0.0.1:8470"
secret_file = "credential:receiver-secret"
"""
# Packages that are lent, and shorter waits: tests/system/test_units.py holds those of the units against the daemon's.
DROP_IN = f"""
[Service]
Environment=PYTHONPATH={LENT} OMP_NUM_THREADS=1
LoadCredential=token:/etc/pocd/token
LoadCredential=receiver-secret:/etc/pocd/receiver-secret
RestartSec=1s
WatchdogSec=20s
"""
RAY_DROP_IN = f"""
[Service]
Environment=PYTHONPATH={LENT} OMP_NUM_THREADS=1
"""
# No check comes first, which would take seconds each time.
UNCHECKED = """
[Service]
ExecStartPre=
"""


def python() -> str:
    """A Python of this environment's version that a service can see."""
    version = f"python3.{sys.version_info.minor}"
    here = os.path.realpath(sys.executable)
    found = [each for each in (here, f"/usr/bin/{version}", f"/usr/local/bin/{version}") if Path(each).exists()]
    seen = [each for each in found if not each.startswith(("/root/", "/home/", "/run/", "/tmp/"))]
    if not seen:
        pytest.skip(f"a service sees no Python in a home directory, and there is no /usr/bin/{version}")
    return seen[0]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A booted host where pocd is installed and configured, beside a chain and a receiver; no daemon runs yet."""
    folder = tmp_path_factory.mktemp("host")
    purelib = Path(sysconfig.get_path("purelib"))
    mount, lent, wheels = (folder / name for name in ("box", "lent", "wheels"))
    for each in (mount, lent, wheels):
        each.mkdir()
    for package in purelib.iterdir():
        if not package.name.startswith(("pocd", "__editable__", "pip", "_virtualenv", "__pycache__")):
            (lent / package.name).symlink_to(f"{PACKAGES}/{package.name}")
    rebuild("pocd", wheels, ROOT / "pocd")
    bound = {ROOT: CHECKOUT, purelib: PACKAGES, lent: LENT, wheels: WHEELS}
    environment = {"PYTHON": python(), "PYTHONPATH": LENT, "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    try:
        with booted(mount, bound, environment) as container:
            install(container)
            configure(container)
            yield container
    except CannotBootError as error:
        pytest.skip(str(error))


def install(host: Container, *arguments: str) -> str:
    return host.shell(f"{CHECKOUT}/scripts/install --wheel {WHEELS}/*.whl {' '.join(arguments)}")


def release(host: Container) -> str:
    """The name of the release that is installed."""
    return host.shell("readlink -f /opt/pocd/bin/pocd | cut -d/ -f5")


def configure(host: Container) -> None:
    """Configure the service, and start a chain and a receiver beside it."""
    write(host, "/etc/pocd/pocd.toml", CONFIG)
    write(host, "/etc/pocd/receiver-secret", SECRET)
    write(host, "/etc/pocd/token", "a-token")
    for unit in ("pocd.service", "pocd@.service"):
        write(host, f"/etc/systemd/system/{unit}.d/test.conf", DROP_IN)
    write(host, "/etc/systemd/system/pocd@bad.service.d/test.conf", DROP_IN + UNCHECKED)
    host.shell(f"""
chmod 0600 /etc/pocd/token /etc/pocd/receiver-secret
useradd --no-create-home --groups pocd alice
useradd --no-create-home bob
systemctl mask --quiet systemd-networkd-wait-online  # the container has no network that would come
systemctl daemon-reload
run() {{ systemd-run --quiet --unit="$1" --setenv=PYTHONPATH={LENT} /opt/pocd/bin/pocd "${{@:2}}"; }}
run chain devchain --block-seconds 60
run receiver receiver --store /run/receiver.db --secret-file /etc/pocd/receiver-secret
""")


def write(host: Container, path: str, text: str) -> None:
    """Write a file, of which mode and owner stay where it is there already."""
    assert host.run("bash", "-euc", 'mkdir -p "$(dirname "$1")" && cat >"$1"', "write", path, text=text).returncode == 0


def shown(host: Container, name: str, unit: str = "pocd") -> str:
    """What systemd says of a unit."""
    return host.shell(f"systemctl show --property={name} --value {unit}")


# As `pocd status --json` asks, without the start of a Python for each question.
ASK = r"""
exec 3<>/dev/tcp/127.0.0.1/8460
printf 'GET /api/v1/pow/status HTTP/1.0\r\nAuthorization: Bearer a-token\r\n\r\n' >&3
cat <&3
"""


def until(host: Container, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Ask for the daemon's status until it answers and a condition holds; returns the status."""
    deadline = time.monotonic() + PATIENCE
    while True:
        done = host.run("bash", "-euc", ASK)
        head, _, text = done.stdout.partition("\n\n")  # a text's lines end as Python has them
        body: dict[str, Any] = orjson.loads(text) if " 200 " in head.partition("\n")[0] else {}
        if body and condition(body):
            return body
        assert time.monotonic() < deadline, done
        time.sleep(0.2)


def mines(body: dict[str, Any]) -> bool:
    """Whether a daemon's model is loaded, so that it mines unless it was told to stop."""
    return bool(body["worker"]["ready"])


def last_words(host: Container, unit: str) -> str:
    """The last line of ours in the journal that has the priority of errors."""
    lines = host.shell(f"journalctl --sync; journalctl --unit={unit} --priority=3 --output=cat --no-pager").splitlines()
    return [line for line in lines if line.startswith("pocd: ")][-1]


def test_the_service_starts_with_the_host_and_delivers(host: Container) -> None:
    host.shell("systemctl enable --now pocd")
    assert host.run("systemctl", "is-enabled", "pocd").stdout == "enabled\n"
    host.until('[ -n "$(systemctl show --property=StatusText --value pocd)" ]')
    until(host, lambda body: body["funnel"]["delivered"] > 0)
    told = orjson.loads(host.shell("pocd status --json"))
    assert told["funnel"]["delivered"] > 0, "root needs no token"
    modes = host.shell("stat --format='%a %U' /var/lib/pocd /var/lib/pocd/outbox.db /run/pocd").splitlines()
    assert modes == ["750 pocd", "600 pocd", "750 pocd"]
    host.shell("pocd stop")  # also across restarts: none of the next tests needs more proofs


def test_who_is_in_the_group_types_commands_as_they_are(host: Container) -> None:
    write(host, "/run/token", "a-token")
    host.shell("chown alice /run/token")
    done = host.run("pocd", "status", "--token-file", "/run/token", user="alice")
    assert (done.returncode, done.stderr) == (0, "")
    done = host.run("pocd", "config", "check", user="alice")
    expected = "credential:token, credential:receiver-secret, which only pocd.service can read"
    assert done.stdout == f"/etc/pocd/pocd.toml: good, but for {expected}\n", done.stderr
    # The store is not theirs to read: the daemon copies it.
    copy = ("pocd", "outbox", "backup", "--token-file", "/run/token", "/var/lib/pocd/copy.db")
    assert host.run(*copy, user="alice").stdout.startswith("/var/lib/pocd/copy.db: ")


@pytest.mark.parametrize(
    ("user", "hint"), [("alice", "a command needs sudo, or --token-file FILE"), ("bob", "join the group pocd")]
)
def test_who_may_not_is_told_in_one_line_what_to_do(host: Container, user: str, hint: str) -> None:
    done = host.run("pocd", "status", user=user)
    assert done.returncode == EXIT_CONFIG
    (line,) = done.stderr.splitlines()
    assert hint in line


def test_a_check_by_root_is_one_by_the_service(host: Container) -> None:
    """What root can read and the service cannot is red; secrets and store are the service's."""
    host.shell(f"mkdir -p /root/model && cp -r {CHECKOUT}/pocd/models/tiny-llama/* /root/model")
    write(host, "/etc/pocd/pocd.toml", CONFIG.replace("bundled:tiny-llama", "/root/model"))
    done = host.run("pocd", "check", "--json")
    write(host, "/etc/pocd/pocd.toml", CONFIG)
    found = {each["name"]: each for each in orjson.loads(done.stdout)}
    assert (found["secrets"]["level"], found["secrets"]["text"]) == ("green", "2 files, closed to others")
    assert (found["store"]["level"], "service" in found) == ("green", False)
    assert (found["model"]["level"], done.returncode) == ("red", EXIT_CRASH), found


def test_a_reload_tells_by_its_status_whether_it_was_good(host: Container) -> None:
    write(host, "/etc/pocd/pocd.toml", CONFIG.replace("r_target = 1.414", "r_target = 1.4"))
    host.shell("systemctl reload pocd")
    host.until('journalctl --unit=pocd --output=cat | grep -q \'"applied":\\["round.r_target"\\]\'')
    write(host, "/etc/pocd/pocd.toml", CONFIG.replace("r_target = 1.414", "r_target = 7"))
    before = shown(host, "MainPID")
    assert host.run("systemctl", "reload", "pocd").returncode != 0
    assert "round.r_target" in last_words(host, "pocd")
    assert (shown(host, "MainPID"), shown(host, "ActiveState")) == (before, "active")
    # What was not reloaded is named, as a warning.
    write(host, "/etc/pocd/pocd.toml", CONFIG.replace("batch_size = 8", "batch_size = 4"))
    host.shell("systemctl reload pocd")
    host.until('journalctl --unit=pocd --priority=4 --output=cat | grep -q \'"restart":\\["worker.batch_size"\\]\'')
    write(host, "/etc/pocd/pocd.toml", CONFIG)


def test_what_is_stopped_or_killed_is_replaced_and_goes_on_where_it_was(host: Container) -> None:
    write(host, "/etc/systemd/system/pocd.service.d/unchecked.conf", UNCHECKED)
    body = until(host, mines)
    worker, checked = body["worker"]["pid"], body["funnel"]["checked"]
    assert "pocd.worker" in host.shell(f"tr '\\0' ' ' </proc/{worker}/cmdline")
    host.shell(f"systemctl daemon-reload && kill -STOP {worker}")
    until(host, lambda body: body["worker"]["restarts"] == 1)
    before = shown(host, "MainPID")
    host.shell(f"kill -STOP {before}")  # the watchdog notices
    host.until('[ "$(systemctl show --property=NRestarts --value pocd)" = 1 ]')
    until(host, bool)  # the next life, whose worker still has to import much
    assert shown(host, "MainPID") != before
    host.shell("kill -KILL $(systemctl show --property=MainPID --value pocd)")
    host.until('[ "$(systemctl show --property=NRestarts --value pocd)" = 2 ]')
    assert until(host, mines)["funnel"]["checked"] >= checked > 0


def bad(host: Container, text: str, mode: str = "640") -> tuple[str, str]:
    """Start an instance with a configuration; returns its exit status, and its last words in the journal."""
    write(host, "/etc/pocd/bad.toml", text)
    host.shell(f"chown root:pocd /etc/pocd/bad.toml && chmod {mode} /etc/pocd/bad.toml")
    ends = "journalctl --sync; journalctl --unit=pocd@bad --output=cat --no-pager | grep -oE 'status=[0-9]+' || true"
    before = len(host.shell(ends).splitlines())
    host.run("systemctl", "start", "pocd@bad")
    host.until(f"[ $(({ends}) | wc -l) -gt {before} ]")
    return host.shell(ends).splitlines()[-1], last_words(host, "pocd@bad")


STORED = "store.path = '/var/lib/pocd/bad/outbox.db'\n"
OWN = f"admin.port = 8461\n{STORED}{CONFIG}"


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        (OWN.replace("bundled:tiny-llama", "/root/model"), "640", "ProtectHome="),
        (OWN, "600", "the group pocd"),
        (OWN.replace("/var/lib/pocd/bad", "/srv/elsewhere"), "640", "ReadWritePaths="),
        (OWN.replace("admin.port = 8461", 'admin.socket = "/srv/elsewhere/s"'), "640", "admin.socket"),
        (OWN.replace("credential:token", "credential:tokens"), "640", "LoadCredential=tokens:FILE"),
    ],
    ids=["model at home", "closed file", "store elsewhere", "socket elsewhere", "no such credential"],
)
def test_a_mistake_ends_the_service_for_good_with_one_line(host: Container, text: str, mode: str, told: str) -> None:
    code, line = bad(host, text, mode)
    assert (code, told in line) == (f"status={EXIT_CONFIG}", True), line
    host.until("systemctl is-failed --quiet pocd@bad")
    host.shell("systemctl reset-failed pocd@bad")


def program(host: Container, unit: str) -> str:
    """The program that a unit's main process runs."""
    return host.shell(f"tr '\\0' '\\n' </proc/$(systemctl show --property=MainPID --value {unit})/cmdline | head -n 1")


def test_upgrades_leave_the_release_that_runs(host: Container) -> None:
    runs = program(host, "pocd")
    install(host)
    said = install(host, "--ray-head" if HAS_RAY else "")
    assert "systemctl restart pocd" in said
    assert ("systemctl enable --now pocd-ray-head" in said) == HAS_RAY
    assert host.run("test", "-x", runs).returncode == 0
    until(host, mines)
    assert release(host) not in runs


def test_what_passes_is_tried_again(host: Container) -> None:
    """An instance on a taken port comes up when the port is free, of the new release and with folders of its own."""
    code, line = bad(host, STORED + CONFIG)
    assert (code, "another program has the port" in line) == (f"status={EXIT_TEMPORARY}", True), line
    host.shell("systemctl stop pocd")
    assert shown(host, "Result") == "success"
    host.until("systemctl is-active --quiet pocd@bad")
    assert release(host) in program(host, "pocd@bad")
    assert host.shell("stat --format='%a %U' /var/lib/pocd/bad /run/pocd-bad").splitlines() == ["750 pocd"] * 2
    host.shell("systemctl stop pocd@bad")


RAY_PROGRAM = """#!/opt/pocd/releases/{release}/bin/python
from ray.scripts.scripts import main
main()
"""
RAY_TOKEN = "0123456789abcdef" * 2


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'pocd[ray]'")
def test_a_cluster_under_its_unit_gives_the_daemon_a_worker_and_has_none_of_its_secrets(host: Container) -> None:
    started = f"/opt/pocd/releases/{release(host)}/bin/ray"  # as pip makes it where Ray is not lent
    write(host, started, RAY_PROGRAM.format(release=release(host)))
    write(host, "/etc/systemd/system/pocd-ray-head.service.d/test.conf", RAY_DROP_IN)
    write(host, "/etc/pocd-ray/token", RAY_TOKEN)
    token = "RAY_AUTH_MODE=token\nRAY_AUTH_TOKEN_PATH=/etc/pocd-ray/token\n"
    write(host, "/etc/pocd-ray/ray.env", token)
    write(host, "/etc/pocd/pocd.toml", f'worker.engine = "ray"\n{CONFIG}')
    host.shell(f"""
chmod 755 {started}
chown root:pocd-ray /etc/pocd-ray/token
chmod 640 /etc/pocd-ray/token
systemctl daemon-reload
systemctl start pocd-ray-head pocd
""")
    worker = until(host, mines)["workers"][0]
    host.shell("pocd resume")
    (pid,) = worker["pids"]
    assert worker["node"] == host.shell("hostname").strip()
    assert host.shell(f"stat --format=%U /proc/{pid}").strip() == "pocd-ray"
    delivered = until(host, mines)["funnel"]["delivered"]
    until(host, lambda body: body["funnel"]["delivered"] > delivered)
    seen = host.shell(f"tr '\\0' '\\n' </proc/{pid}/environ; tr '\\0' ' ' </proc/{pid}/cmdline")
    assert "CREDENTIALS_DIRECTORY" not in seen
    assert SECRET not in seen
    for path in ("/etc/pocd/pocd.toml", "/var/lib/pocd/outbox.db"):
        assert host.run("nsenter", "--target", str(pid), "--mount", "test", "-s", path).returncode == 1, path
    # Killed while the cluster computes: its workers end with it, and the next life goes on where it was.
    checked, restarts = until(host, mines)["funnel"]["checked"], int(shown(host, "NRestarts"))
    host.shell("kill -KILL $(systemctl show --property=MainPID --value pocd)")
    host.until(f"[ ! -e /proc/{pid} ]")
    host.until(f'[ "$(systemctl show --property=NRestarts --value pocd)" = {restarts + 1} ]')
    body = until(host, lambda body: mines(body) and body["funnel"]["checked"] > checked)
    assert pid not in [each for worker in body["workers"] for each in worker["pids"]]
    host.shell("systemctl stop pocd pocd-ray-head")


def test_nothing_is_left_of_an_uninstalled_service_but_its_state(host: Container) -> None:
    host.shell(f"{CHECKOUT}/scripts/uninstall")
    assert host.run("pgrep", "--full", "pocd run").returncode == 1
    assert shown(host, "LoadState") == "not-found"
    left = host.shell(
        "ls -d /opt/pocd /usr/local/bin/pocd /var/lib/pocd/outbox.db /etc/pocd/pocd.toml 2>/dev/null || true"
    )
    assert left.splitlines() == ["/etc/pocd/pocd.toml", "/var/lib/pocd/outbox.db"]
