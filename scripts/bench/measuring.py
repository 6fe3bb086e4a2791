"""Shared by the measuring scripts: samples taken by turns, a process's memory and CPU time, tables."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable


def in_turns(rounds: int, samplers: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Take `rounds` samples of each by turns, every other round backwards; after one of each that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(rounds + 1):
        for name in list(samplers)[:: -1 if turn % 2 else 1]:
            sample = samplers[name]()
            if turn:
                samples[name].append(sample)
    return samples


def ratio(found: list[float], base: list[float]) -> tuple[str, str]:
    """Return the median of the rounds' ratios, and their range, as text."""
    ratios = [a / b for a, b in zip(found, base, strict=True)]
    return f"{statistics.median(ratios):.3f}", f"{min(ratios):.2f}–{max(ratios):.2f}"


def resident(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6


def cpu_seconds(pid: int) -> float:
    """Return the CPU time in seconds that a process has used, without its children's (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def new_table(title: str, first: str, *others: str) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column(first)
    for other in others:
        table.add_column(other, justify="right")
    return table


def show(table: Table) -> None:
    """Print a table whole, also where there is no terminal."""
    Console(highlight=False, width=max(100, Console().width)).print(table)
