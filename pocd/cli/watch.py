"""`pocd watch`: a running daemon, live on the terminal."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from pocd.cli.api import ConfigOption, TokenOption, UrlOption, address
from pocd.config.settings import DEFAULT_PATH

IntervalOption = Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2, max=60)]


def watch(
    *,
    config: ConfigOption = DEFAULT_PATH,
    url: UrlOption = None,
    token_file: TokenOption = None,
    interval: IntervalOption = 1.0,
) -> None:
    """Watch the daemon work, live: q or Ctrl-C ends it. Without a terminal one view is printed."""
    from pocd.cli import viewer

    asyncio.run(viewer.watch(*address(config, url, token_file), interval=interval))
