"""A check that is made as the service is: by its user, with its environment, and in its view of files and devices."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from pocd.config.secrets import unit_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BOOTED = Path("/run/systemd/system")  # is there while systemd runs this host: sd_booted(3)
MOST_SECONDS = 120  # of the check, which ends by itself much sooner
ASK_SECONDS = 10.0  # for an answer of the service manager
NOT_STARTED = 200  # and above: systemd's own statuses, such as 203 for a program that cannot be run (systemd.exec(5))
# What decides what a process may read, write and see; the rest of the unit does not change what a check finds.
TAKEN_OVER = (
    *("User", "Group", "SupplementaryGroups", "UMask", "Environment", "EnvironmentFiles"),
    *("ProtectHome", "ProtectSystem", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "PrivateTmp"),
    *("BindPaths", "BindReadOnlyPaths", "DevicePolicy", "DeviceAllow"),
)
FOLDERS = {"StateDirectory": "/var/lib", "CacheDirectory": "/var/cache", "RuntimeDirectory": "/run"}
ASKED = ("LoadState", "ExecStart", *TAKEN_OVER, *FOLDERS)


def as_service(config: Path, command: Sequence[str]) -> tuple[int | None, str | None]:
    """Run a command as the service of a configuration would; only root can.

    Returns:
        The command's exit status, or None where it was not run; then why, or None where there is no such service.
    """
    unit = unit_of(config)
    if not BOOTED.is_dir():
        return None, None
    try:
        shown = _ask("show", f"--property={','.join(ASKED)}", unit)
        if "LoadState=loaded\n" not in shown or f" --config {config.absolute()} " not in shown:
            return None, None
        found = [*properties(shown.splitlines()), *credentials(_ask("cat", unit).splitlines(), unit)]
        program = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--description=check of {unit}"]
        options = [f"--property={each}" for each in found]
        status = subprocess.run([*program, *options, *command], check=False, timeout=2 * MOST_SECONDS).returncode  # noqa: S603 - no shell
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{type(error).__name__}: {error}"
    if status >= NOT_STARTED:
        return None, f"the check cannot be started as {unit}, systemd's status {status}; journalctl has the reason"
    return status, None


def _ask(*question: str) -> str:
    """Return what the service manager answers."""
    command = ["systemctl", *question]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=ASK_SECONDS).stdout  # noqa: S603 - no shell, root's own PATH


def properties(shown: Iterable[str]) -> Iterator[str]:
    """Yield what a transient unit needs to see what a service sees.

    Args:
        shown: Lines of `systemctl show` for the service.
    """
    yield f"RuntimeMaxSec={MOST_SECONDS}"
    for line in shown:
        name, _, value = line.partition("=")
        if not value:
            continue
        if name in FOLDERS:  # they are the service's: a transient unit would remove some at its end
            paths = " ".join(f"-{FOLDERS[name]}/{each.partition(':')[0]}" for each in value.split())
            yield f"ReadWritePaths={paths}"
        elif name == "EnvironmentFiles":
            path, _, ignored = value.rpartition(" (ignore_errors=")
            yield f"EnvironmentFile={'-' if ignored.startswith('yes') else ''}{path}"
        elif name in TAKEN_OVER:
            yield line


def credentials(written: Iterable[str], unit: str) -> list[str]:
    """Return a service's LoadCredential= settings, which `systemctl show` cannot print.

    Args:
        written: Lines of the unit's files, in their order.
        unit: The service's name.
    """
    instance = unit.partition("@")[2].removesuffix(".service")
    found: list[str] = []
    for line in written:
        name, _, value = line.partition("=")
        if name == "LoadCredential":
            found = [*found, f"{name}={value.replace('%i', instance)}"] if value else []
    return found
