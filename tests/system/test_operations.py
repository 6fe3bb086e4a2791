"""docs/operations.md is true: its commands are run, in order, on a real daemon; and every alarm is in it."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.admin.test_api_docs import pattern, transcript
from tests.admin.test_outbox_api import Moody
from tests.support.processes import Chain, config, free_port
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "operations.md"

# What this machine lacks or is not to do: root, systemd and its journal, and minutes for an installation, which
# tests/system/test_install.py makes. The service is the daemon itself, started, stopped and reloaded by its signals.
STAND_INS = {
    "sudo": 'exec "$@"',
    "sudoedit": 'test -f "$1"',
    "usermod": 'test "$*" = "--append --groups pocd $USER"',
    "install": "echo installed",
    "uninstall": "echo uninstalled",
    "journalctl": 'cat "$FOLDER/log"',
    "pocd": 'exec "$PYTHON" -W error -m pocd "$@"',
    "systemctl": """
until_() {
  for _ in $(seq $((10 * PATIENCE))); do "$@" && return; sleep 0.1; done
  echo "waited in vain: $*" >&2
  exit 1
}
alive() { kill -0 "$(cat "$FOLDER/pid")" 2>/dev/null; }
gone() { ! alive; }
ready() { curl -sf "$API/readyz" >/dev/null; }
reloads() { grep -c '"action":"reload' "$FOLDER/log" || true; }
more() { [ "$(reloads)" -gt "$before" ]; }
stop() { if alive; then kill -TERM "$(cat "$FOLDER/pid")"; until_ gone; fi; }
start() {
  setsid "$PYTHON" -m pocd run --config "$CONFIG" >>"$FOLDER/log" 2>&1 </dev/null &
  echo $! >"$FOLDER/pid"
  until_ ready
}
case $* in
  "enable --now pocd" | "start pocd") start ;;
  "disable --now pocd" | "stop pocd") stop ;;
  "restart pocd") stop; start ;;
  "reload pocd") before=$(reloads); kill -HUP "$(cat "$FOLDER/pid")"; until_ more ;;
  *) echo "no such stand-in: systemctl $*" >&2; exit 1 ;;
esac
""",
}


def stand_in(folder: Path) -> Path:
    made = folder / "bin"
    made.mkdir()
    for name, script in STAND_INS.items():
        (made / name).write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{script}\n")
        (made / name).chmod(0o755)
    return made


async def replay(commands: list[str], environment: Mapping[str, str]) -> list[str]:
    """Run the commands in one shell, as an operator would, and return what each prints."""
    script = "\n".join(f"{command}\nprintf '\\0'" for command in commands)
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", script),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | environment,
        cwd=ROOT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    return out.decode().split("\0")[:-1]


async def test_every_command_is_run_and_prints_what_is_shown(tmp_path: Path) -> None:
    told = transcript(DOCUMENT.read_text())
    assert len(told) > 20
    etc, lib = tmp_path / "etc", tmp_path / "lib"
    etc.mkdir()
    lib.mkdir()
    (etc / "receiver-secret").write_text("whsec_" + "QUFB" * 10 + "\n")
    (etc / "receiver-secret").chmod(0o600)
    port, binaries = free_port(), stand_in(tmp_path)

    def here(command: str) -> str:
        command = command.replace("/etc/pocd", str(etc)).replace("/var/lib/pocd", str(lib))
        command = command.replace("./scripts/", f"{binaries}/")
        takes = r"\bpocd (status|check|config check|outbox \w+)"
        return re.sub(takes, rf"pocd \1 --config {etc / 'pocd.toml'}", command)

    async with Chain().served() as chain, Moody().served() as main, Moody().served() as old:
        old.status, old.choosy = 422, True
        path = config(etc, chain.url, {"main": main.url, "old": old.url}, admin__port=port)
        path.write_text(path.read_text().replace(str(etc / "outbox.db"), str(lib / "outbox.db")))
        environment = {
            "PATIENCE": f"{PATIENCE:.0f}",
            "USER": "operator",
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "FOLDER": str(tmp_path),
            "CONFIG": str(path),
            "API": f"http://127.0.0.1:{port}",
        }
        printed = await replay([here(command) for command, _ in told], environment)
    assert len(printed) == len(told), printed[-1:]
    for (command, expected), got in zip(told, printed, strict=True):
        assert re.fullmatch(pattern(here(expected).rstrip("\n")), got.rstrip("\n")), (
            f"$ {command}\n{got}\ninstead of\n{expected}"
        )
    assert (lib / "outbox-backup.db").stat().st_size > 0
    assert len((etc / "receiver-secret").read_text().splitlines()) == 1


def test_every_alarm_is_explained() -> None:
    alarms = re.findall(r"alert: (\w+)", (ROOT / "docs" / "prometheus" / "alerts.yml").read_text())
    assert re.findall(r"^### (\w+)", DOCUMENT.read_text(), re.MULTILINE) == alarms
