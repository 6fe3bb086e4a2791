"""Tables of reports, as text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

from pocd.lab.calibration import WIDTH

if TYPE_CHECKING:
    from rich.table import Table


def rendered(table: Table) -> str:
    """Return the lines of a table without colours."""
    file = io.StringIO()
    Console(file=file, width=WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())
