"""The secrets that the configuration names: where their files are, and what they hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pocd.config.settings import ConfigError
from pocd.config.types import CREDENTIAL
from pocd.http.webhooks import SecretError, WebhookKeys

if TYPE_CHECKING:
    from pocd.config.settings import Settings


ORCHESTRATOR_TOKEN = "orchestrator.token_file"  # noqa: S105 - the name of a key


class CredentialError(ConfigError):
    """A credential of the service's unit is not here, or not for this user: the service alone can judge it."""


def unit_of(config: Path) -> str:
    """Return the systemd unit that runs on a configuration: pocd.service, or an instance of pocd@.service."""
    return "pocd.service" if config.stem == "pocd" else f"pocd@{config.stem}.service"


def located(file: Path, config: Path) -> Path:
    """Return the path of a file of secrets; of credential:NAME it is the copy that systemd makes for the service.

    The service finds its credentials in CREDENTIALS_DIRECTORY, and root beside it in the same folder (systemd.exec(5)).

    Raises:
        CredentialError: There is no such credential, or this user may not read it.
    """
    if not str(file).startswith(CREDENTIAL):
        return file
    name, unit = str(file).removeprefix(CREDENTIAL), unit_of(config)
    path = Path(os.environ.get("CREDENTIALS_DIRECTORY") or f"/run/credentials/{unit}") / name
    if not os.access(path, os.R_OK, effective_ids=True):
        raise CredentialError(
            f"{file} cannot be read at {path} by user {os.geteuid()}: it is there for the service and root, while "
            f"{unit} runs with LoadCredential={name}:FILE; a command needs sudo, or --token-file FILE"
        )
    return path


def read_token(file: Path | None, config: Path, key: str = "admin.token_file") -> str | None:
    """Read the token of an API; `key` names it in the configuration.

    Raises:
        ConfigError: The file cannot be read or holds nothing.
    """
    if file is None:
        return None
    try:
        path = located(file, config)
        token = path.read_text().strip()
    except CredentialError as error:
        raise CredentialError(f"{key}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{key} {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key} {path} cannot be read: {error}") from None  # the cause has the file's bytes
    if not token or not token.isascii():
        raise ConfigError(f"{key} {path} must hold one token of ASCII characters")
    return token


def read_keys(file: Path | None, config: Path, receiver: str) -> WebhookKeys | None:
    """Read the secrets that sign what a receiver gets.

    Raises:
        ConfigError: The file cannot be read or holds no secret.
    """
    if file is None:
        return None
    try:
        return WebhookKeys.from_file(located(file, config))
    except CredentialError as error:
        raise CredentialError(f"delivery.receivers, {receiver}: {error}") from None
    except SecretError as error:
        raise ConfigError(f"delivery.receivers, {receiver}: {error}") from error


def check_secrets(settings: Settings, config: Path) -> list[str]:
    """Read every secret, and return the credentials that are not for this user: the service alone can judge them.

    Raises:
        ConfigError: A file of secrets cannot be used.
    """
    unseen = []
    tokens = {"admin.token_file": settings.admin.token_file, ORCHESTRATOR_TOKEN: settings.orchestrator.token_file}
    for key, file in tokens.items():
        try:
            read_token(file, config, key)
        except CredentialError:
            unseen.append(str(file))
    for receiver in settings.delivery.receivers:
        try:
            read_keys(receiver.secret_file, config, receiver.name)
        except CredentialError:
            unseen.append(str(receiver.secret_file))
    return unseen
