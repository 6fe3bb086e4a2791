"""Every command's help has examples that are true, and shells complete what there is."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.main import get_command

from pocd.cli.examples import EXAMPLES
from pocd.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Iterator


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - typer has no public type of it
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(commands(get_command(app)))


def test_every_command_has_examples_and_no_other() -> None:
    assert EXAMPLES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_its_help_shows_examples_that_it_would_take(name: str) -> None:
    command, depth = COMMANDS[name], len(name.split())
    told = command.get_help(command.make_context(f"pocd {name}", [], resilient_parsing=True))
    for example in EXAMPLES[name]:
        assert " ".join(example.split()) in " ".join(told.split())
        assert all(len(line) <= 80 for line in example.splitlines())
        words = shlex.split(example.replace("\\\n", " "))
        assert words[: 1 + depth] == ["pocd", *name.split()]
        command.make_context(f"pocd {name}", words[1 + depth :])  # parses, and runs nothing


def completing(**environment: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pocd"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr == ""
    return ended.stdout


def test_a_shell_is_told_what_can_follow() -> None:
    assert completing(_POCD_COMPLETE="complete_bash", COMP_WORDS="pocd outbox ret", COMP_CWORD="2").split() == ["retry"]
    assert "--interval" in completing(_POCD_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="pocd watch --")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_for_a_shell_calls_the_installed_command(shell: str) -> None:
    script = completing(_POCD_COMPLETE=f"source_{shell}")
    assert f"_POCD_COMPLETE=complete_{shell}" in script
    assert "python" not in script


def test_bash_completes_by_its_script() -> None:
    script = completing(_POCD_COMPLETE="source_bash")
    asks = 'COMP_WORDS=(pocd st); COMP_CWORD=1; _pocd_completion pocd; echo "${COMPREPLY[@]}"'
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-c", f"{script}\n{asks}"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == ["status", "stop"]
