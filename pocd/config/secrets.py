"""The secrets that the configuration names by their files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocd.config.settings import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def read_token(path: Path | None) -> str | None:
    """Read the admin API's token.

    Raises:
        ConfigError: The file cannot be read or holds nothing.
    """
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"admin.token_file {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"admin.token_file {path} cannot be read: {error}"
        ) from None  # the cause has the file's bytes
    if not token or not token.isascii():
        raise ConfigError(f"admin.token_file {path} must hold one token of ASCII characters")
    return token
