"""Checks of the files with secrets: are they there, good, and closed to others?"""

from __future__ import annotations

import contextlib
import os
import stat
from functools import partial
from typing import TYPE_CHECKING

from pocd.check.finding import Finding, green, red, yellow
from pocd.config.secrets import ORCHESTRATOR_TOKEN, CredentialError, located, read_keys, read_token
from pocd.config.settings import ConfigError
from pocd.observe.mask import url_secrets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pocd.config.settings import Settings

NAME = "secrets"


def check_secrets(settings: Settings, config: Path) -> list[Finding]:
    """Look at the token, the receivers' secrets, and the configuration where a URL in it holds a password."""
    receivers = [each for each in settings.delivery.receivers if each.secret_file]
    findings = [_check_content(partial(read_keys, each.secret_file, config, each.name)) for each in receivers]
    files = {f"{each.name}'s secret_file": each.secret_file for each in receivers if each.secret_file}
    tokens = {"admin.token_file": settings.admin.token_file, ORCHESTRATOR_TOKEN: settings.orchestrator.token_file}
    for key, file in tokens.items():
        if file:
            files[key] = file
            findings.append(_check_content(partial(read_token, file, config, key)))
    for key, file in files.items():
        with contextlib.suppress(CredentialError):
            findings.append(check_mode(key, located(file, config)))
    problems = [finding for finding in findings if finding] + _check_config(settings, config)
    if problems:
        return problems
    return [green(NAME, f"{len(files)} files, closed to others" if files else "no file is configured")]


def _check_content(read: Callable[[], object]) -> Finding | None:
    try:
        read()
    except CredentialError as error:
        return yellow(NAME, f"not judged: {error}", "check as the service (sudo pocd check)")
    except ConfigError as error:
        return red(NAME, str(error), "write the file anew, readable by the daemon's user alone")
    return None


def check_mode(key: str, path: Path) -> Finding | None:
    """Return a finding about the permissions of a secret's file; None where they are good or the file is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    mode, us = found.st_mode, os.geteuid()
    text = f"{key} {path} (mode {stat.S_IMODE(mode):04o})"
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        return red(NAME, f"{text} is open to every user of this host", f"chmod o= {path}, and make a new secret")
    if mode & stat.S_IWGRP:
        return yellow(NAME, f"{text} can be written by its group", f"chmod g-w {path}")
    if us and found.st_uid not in {0, us}:
        return yellow(NAME, f"{text} belongs to user {found.st_uid}, not to root or us", f"chown root {path}")
    return None


def _check_config(settings: Settings, config: Path) -> list[Finding]:
    urls = [*settings.chain.urls, *(receiver.url for receiver in settings.delivery.receivers)]
    text = config.read_text(encoding="utf-8")
    holds = any(secret in text for url in urls for secret in url_secrets(url))
    if not holds or not config.stat().st_mode & stat.S_IROTH:
        return []
    return [
        yellow(
            NAME,
            f"{config} holds a URL with a password or a key, and every user of this host can read it",
            f"chmod o= {config}",
        )
    ]
