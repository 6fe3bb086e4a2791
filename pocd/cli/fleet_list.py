"""The daemons of a fleet, as they are named on the command line and in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pocd.config.secrets import read_token
from pocd.config.settings import DEFAULT_PATH, ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    """Where one daemon of the fleet is asked.

    Attributes:
        name: Name that it is shown by.
        url: Address of its admin API.
        token: Bearer token; None without.
    """

    name: str
    url: str
    token: str | None


def addresses(urls: list[str], file: Path | None, token_file: Path | None) -> list[Address]:
    """Return the daemons that are named on the command line and in a file.

    Args:
        urls: Addresses from the command line.
        file: A line for each further daemon: URL [NAME [TOKEN_FILE]]; None for no file.
        token_file: Token of all whose line names none; None for no token.

    Raises:
        ConfigError: The file or a token cannot be read, a line is wrong, none is named, or one is named twice.
    """
    lines = [(f"argument {url}", [url]) for url in urls]
    if file is not None:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {file} cannot be read: {error}") from error
        for number, line in enumerate(text.splitlines(), 1):
            if words := line.partition("#")[0].split():
                lines.append((f"{file}, line {number}", words))
    if not lines:
        raise ConfigError("no daemon is named: give URLs, or --file with one URL a line")
    found: dict[str, Address] = {}
    names: set[str] = set()
    for where, words in lines:
        url, name, own_token = (*words, None, None)[:3]
        if url is None or len(words) > 3 or not url.startswith(("http://", "https://", "unix:///")):
            raise ConfigError(f"{where}: expected http://HOST:PORT or unix://PATH, then a name and a token's file")
        url = url.rstrip("/")
        name = name or url
        if url in found or name in names:
            raise ConfigError(f"{where}: {url if url in found else name} is named twice")
        names.add(name)
        found[url] = Address(name, url, read_token(Path(own_token) if own_token else token_file, DEFAULT_PATH))
    return list(found.values())
