"""`pocd check`: find what keeps this host from mining and delivering."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from typing import Annotated

import typer

from pocd.cli.api import ConfigOption, echo
from pocd.config.settings import DEFAULT_PATH, ConfigError, load
from pocd.observe.journal import goes_to_journal
from pocd.process import EXIT_CONFIG, EXIT_CRASH, EXIT_OK


def check(
    *,
    config: ConfigOption = DEFAULT_PATH,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of {name, level, text, remedy}.")] = False,
    as_caller: Annotated[
        bool, typer.Option("--as-caller", help="Check as the user that calls, also where that is root.")
    ] = False,
) -> None:
    """Look for what keeps this host from mining and delivering; each red line comes with its remedy.

    It changes nothing, and may be run beside the daemon. Run by root it checks as the systemd service of this
    configuration, with its user, environment and view of files; else as the caller. Exit status: 0 where nothing is
    red, 1 where something is, 78 where the configuration cannot be used at all.
    """
    from pocd.check import report
    from pocd.check.finding import Level, red, yellow
    from pocd.check.service import as_service

    unjudged = None
    if os.geteuid() == 0 and not as_caller:
        command = [sys.executable, "-m", "pocd", "check", "--as-caller", "--config", str(config.absolute())]
        status, unjudged = as_service(config, [*command, "--json"] if as_json else command)
        if status is not None:
            raise typer.Exit(status)
    try:
        settings = load(config)
    except ConfigError as error:
        findings, status = (
            [red("configuration", str(error), "correct it; config/pocd.toml explains every key")],
            EXIT_CONFIG,
        )
    else:
        from pocd.check import host

        findings = asyncio.run(host.check_host(config, settings))
        status = EXIT_CRASH if any(finding.level is Level.RED for finding in findings) else EXIT_OK
    if unjudged is not None:
        findings.append(yellow("service", f"not checked as the service, but as root: {unjudged}", "mend that first"))
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    colour = terminal and "NO_COLOR" not in os.environ
    if as_json:
        echo(report.as_json(findings))
    else:
        text = report.as_text(findings, width=width, colour=colour, journal=goes_to_journal(1))
        echo(text, keep="\033" if colour else "")
    raise typer.Exit(status)
