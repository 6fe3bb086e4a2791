"""Docstrings and descriptions are read alone, in a hover or in /openapi.json: each names its subject in plain words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from pocd.admin.events import EventsApi
from pocd.admin.openapi import document
from pocd.admin.outbox import OutboxApi
from pocd.admin.pow import PowApi
from pocd.admin.server import AdminApi
from pocd.cli.main import app

ROOT = Path(__file__).parent.parent

LEANING = re.compile(
    r"""(?x)  # these beginnings, or words anywhere, lean on another line, or leave the reader to guess the subject
    ^(?:
        Of                                                      # of what? a phrase that hangs on the entry's name
        | It | Its | They | Their | Theirs | Them | Those | These | That | Whose  # who?
        | The\ same | Same | Such | Also | As\ (?:above|below|before|there|of|for|in|its?)  # as what?
        | See\ (?:there|it|above|below)                         # see what?
        | Whether\ (?:it|that|they|those|these) | What\ (?:it|they|he) | Only\ (?:these|those|this|of|in)
        | Why\ so | So | Then | Thus | And | Nor | Neither | But | Or  # half of a sentence that began elsewhere
    )\b
    | (?i:\b(?:likewise|as\ above|see\ there)\b)
    """
)
PRIVATE = re.compile(r"(?i)\b(?:wheel|meeting|standing|told|tells|(?<!dead )letters?)\b")
"""Metaphors of our own, where what users read has a word of the field: take control, reported, dead letter."""

SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")
ENTRY = re.compile(r" {4,}(?:\*{0,2}\w+: )?(\S.*)")
DESCRIBING = {"description", "help", "epilog"}


def read_alone(docstring: str) -> Iterator[tuple[int, str]]:
    """Give the texts of a docstring that are read alone, with their lines' offsets: the first, and each entry's."""
    section, indent = "", 0
    for offset, line in enumerate(docstring.splitlines()):
        if offset == 0:
            yield offset, line
        elif line.strip() in SECTIONS:
            section, indent = line.strip(), len(line) - len(line.lstrip()) + 4
        elif section and (found := ENTRY.fullmatch(line)) and len(line) - len(line.lstrip()) == indent:
            yield offset, found[1]


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Give the texts of a module that are read alone, with their lines: docstrings' and descriptions'."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):  # of modules, classes, functions and attributes
                yield from ((node.lineno + offset, line) for offset, line in read_alone(text))
            case ast.keyword(arg=str(name), value=value) if name in DESCRIBING:
                parts = [getattr(part, "value", None) for part in ast.walk(value)]
                yield value.lineno, "".join(part for part in parts if isinstance(part, str))


def leaning(source: str) -> list[tuple[int, str]]:
    return [(line, text) for line, text in texts(source) if LEANING.search(text)]


def modules() -> list[str]:
    paths = [path.relative_to(ROOT).as_posix() for top in ("pocd", "scripts") for path in (ROOT / top).rglob("*.py")]
    return sorted(paths)


def test_every_docstring_line_and_description_names_its_subject() -> None:
    found = [f"{path}:{line}: {text}" for path in modules() for line, text in leaning((ROOT / path).read_text())]
    assert not found, "name the subject, in plain words:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "bad",
    [
        '"""See there."""',
        'class A:\n    """A.\n\n    Attributes:\n        url: Of the model.\n    """',
        'def f():\n    """Do it.\n\n    Args:\n        b: S, likewise.\n    """',
        'def f():\n    """Do it.\n\n    Raises:\n        E: It cannot be begun now.\n    """',
        'def f():\n    """Do it.\n\n    Returns:\n        Those that were formed.\n    """',
        'f = Field(description="Why so.")',
        'f = Annotated[int, Option(help=f"Only in {state}.")]',
        'A = 1\n"""The same, for the CPU."""',
    ],
)
def test_a_line_without_a_subject_is_found(bad: str) -> None:
    assert leaning(bad)


def test_a_plain_line_is_not_found() -> None:
    assert not leaning(
        'def f():\n    """Return it.\n\n    Its unit is s.\n\n    Args:\n        a: Batch\n            of it.\n    """'
    )


def descriptions(value: object) -> Iterator[str]:
    """Give every text for people in an OpenAPI document."""
    if isinstance(value, list):
        for item in value:
            yield from descriptions(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in {"description", "summary"} and isinstance(item, str):
                yield item
            else:
                yield from descriptions(item)


def api_texts() -> list[str]:
    """Return the texts of /openapi.json; the table of operations is made without the daemon's parts."""
    parts = cast("Any", None)
    operations = [
        *PowApi(parts).operations(),
        *OutboxApi(parts).operations(),
        *EventsApi(parts, parts).operations(),
        *AdminApi.operations(AdminApi.__new__(AdminApi)),
    ]
    return list(descriptions(document(operations, ["GET"])))


def help_texts(command: Any) -> Iterator[str]:  # noqa: ANN401 - typer's commands are click's or its own copy's
    """Give the help of a command, its options and its commands."""
    yield command.help or ""
    yield from (getattr(parameter, "help", None) or "" for parameter in command.params)
    for each in getattr(command, "commands", {}).values():
        yield from help_texts(each)


def test_what_users_read_has_no_private_metaphor() -> None:
    public = {
        "/openapi.json": api_texts(),
        "--help": list(help_texts(typer.main.get_command(app))),
        **{
            path.name: path.read_text().splitlines()
            for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
            if path.name != "operations.md"  # it installs a wheel, which is Python's word
        },
    }
    assert all(len(lines) > 50 for lines in public.values()), "there is something to look at"
    found = [f"{where}: {line}" for where, lines in public.items() for line in lines if PRIVATE.search(line)]
    assert not found, "say it in the field's words:\n" + "\n".join(found)


@pytest.mark.parametrize("bad", ["Take the wheel.", "Its letters.", "As the node told.", "How it is standing."])
def test_a_private_metaphor_is_found(bad: str) -> None:
    assert PRIVATE.search(bad)
    assert not PRIVATE.search("A dead letter was given up; tell it from the reported one.")
