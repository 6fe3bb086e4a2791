"""The command line run in the test's own process: as a process of its own runs it, without seconds of imports."""

from __future__ import annotations

import contextlib
import io
import sys
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import pytest

from pocd.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

Ended = CompletedProcess[str]


def pocd_here(*arguments: str | Path) -> Ended:
    """Run `pocd ARGUMENTS…` to its end; for what neither listens nor changes the process."""
    command = ["pocd", *map(str, arguments)]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as error,
    ):
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main()
    code = end.value.code or 0
    assert isinstance(code, int)
    return Ended(command, code, out.getvalue(), error.getvalue())
