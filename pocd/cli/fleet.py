"""`pocd fleet`: many daemons in one view."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

UrlsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[URL]...", help="Admin APIs: http://HOST:PORT, or unix://PATH.")
]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file", help="More of them, one a line: URL [NAME [TOKEN_FILE]]; # begins a comment.", readable=False
    ),
]
TokenOption = Annotated[
    Path | None, typer.Option("--token-file", help="Token for all whose line names none.", readable=False)
]


def fleet(
    urls: UrlsArgument = None,
    *,
    file: FileOption = None,
    token_file: TokenOption = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.5, max=600)] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all statuses, sums and findings once.")] = False,
) -> None:
    """Watch many daemons at once: q or Ctrl-C ends it. Without a terminal one view is printed."""
    from pocd.cli.fleet_list import addresses
    from pocd.cli.fleet_viewer import watch

    asyncio.run(watch(addresses(urls or [], file, token_file), interval=interval, as_json=as_json))
