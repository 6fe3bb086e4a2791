"""Options and calls shared by the commands that talk to a running daemon."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pocd.config.settings import load_admin
from pocd.observe.mask import clean
from pocd.process import EXIT_CRASH, EndedError

ConfigOption = Annotated[Path, typer.Option("--config", help="The configuration file.", readable=False)]
UrlOption = Annotated[
    str | None, typer.Option("--url", help="The admin API: http://HOST:PORT, or unix://PATH. Default: as configured.")
]
TokenOption = Annotated[
    Path | None, typer.Option("--token-file", help="The API's token. Default: as configured.", readable=False)
]

AT_FAULT = {400, 409, 413, 422}  # HTTP statuses that say what the caller gave cannot be used


def echo(text: str, *, keep: str = "") -> None:
    """Print lines; where the reader of a pipe has gone, end with status 0.

    Whatever others wrote into `text` is cleaned, line by line.

    Args:
        text: One line or several.
        keep: Characters that stay as they are besides, such as the escapes of our own colours.
    """
    try:
        typer.echo(clean(text, keep=f"\n\t{keep}"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered goes nowhere
        raise typer.Exit from None


def address(config: Path, url: str | None, token_file: Path | None) -> tuple[str, str | None]:
    """Return the API's address, and its token where one is known: as given, or else as configured.

    Raises:
        ConfigError: The configuration or the token cannot be read.
    """
    from pocd.config.secrets import read_token

    if url is None and (os.path.lexists(config) or not os.access(config.parent, os.X_OK)):
        admin = load_admin(config, token_file)
        host = f"[{admin.host}]" if ":" in admin.host else admin.host
        url = f"unix://{admin.socket}" if admin.socket else f"http://{host}:{admin.port}"
        token_file = admin.token_file
    return url or "http://127.0.0.1:8460", read_token(token_file, config)


def call_api(
    method: str,
    path: str,
    config: Path,
    url: str | None,
    token_file: Path | None,
    *,
    query: dict[str, str] | None = None,
    body: dict[str, Any] | bytes | None = None,
    exit_of_refusal: int = EXIT_CRASH,
) -> dict[str, Any]:
    """Call the admin API at `url`, or where that is None, at the configured address.

    Args:
        method: HTTP method, GET or POST.
        path: Path of the API's operation, which begins with a slash.
        config: The configuration's file.
        url: The API's address, instead of the configuration's.
        token_file: The API's token, instead of the configuration's.
        query: Query of the URL, by parameter.
        body: An object to send as JSON, or JSON as bytes.
        exit_of_refusal: The exit status where `body` or `query` is at fault.

    Raises:
        ConfigError: The configuration or the token cannot be read.
        EndedError: The daemon cannot be reached, or refuses.
    """
    from pocd.admin.client import AdminError, call

    target, token = address(config, url, token_file)
    try:
        return asyncio.run(call(target, method, path, token=token, query=query, body=body))
    except AdminError as error:
        code = exit_of_refusal if error.status in AT_FAULT else EXIT_CRASH
        raise EndedError(code, str(error)) from error
