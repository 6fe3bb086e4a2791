"""Findings for people and for programs."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING

import orjson

from pocd.check.finding import Level
from pocd.observe.journal import marked
from pocd.observe.mask import clean, escape_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.check.finding import Finding

ANSI = {Level.GREEN: 32, Level.YELLOW: 33, Level.RED: 31}
LOGGED = {Level.GREEN: "info", Level.YELLOW: "warning", Level.RED: "error"}
INDENT = " " * 8


def as_text(findings: Sequence[Finding], *, width: int | None, colour: bool, journal: bool = False) -> str:
    """Return a line for each finding, its remedy below it, and a count.

    Args:
        findings: In their order.
        width: Columns, at which long lines go on below; None for as long as they are.
        colour: Whether the levels are coloured, by ANSI's sequences.
        journal: Whether each line begins with its priority, as the journal takes it.
    """
    lines: list[str] = []
    for finding in findings:
        level = f"{finding.level:<8}"
        told = _wrap(clean(f"{level}{finding.name}: {finding.text}"), width)
        told = told.replace(level, f"\033[{ANSI[finding.level]}m{level}\033[0m", 1) if colour else told
        if finding.remedy:
            told += "\n" + _wrap(clean(f"{INDENT}remedy: {finding.remedy}"), width)
        lines.append(marked(told, LOGGED[finding.level]) if journal else told)
    counts = Counter(finding.level for finding in findings)
    lines.append(", ".join(f"{counts[level]} {level}" for level in Level))
    return "\n".join(lines)


def _wrap(line: str, width: int | None) -> str:
    if width is None:
        return line
    # Paths and fingerprints stay whole, for whoever copies them.
    wrapped = textwrap.wrap(
        line, width, subsequent_indent=INDENT, drop_whitespace=True, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapped)


def as_json(findings: Sequence[Finding]) -> str:
    """Return a JSON list of {name, level, text, remedy}."""
    return escape_json(orjson.dumps(findings, option=orjson.OPT_INDENT_2).decode())
