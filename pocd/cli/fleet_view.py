"""The view of `pocd fleet`: a pure function of what is known of its daemons, for a terminal of any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from pocd.admin.text import age, funnel_text, local_time, speed
from pocd.cli.fleet_findings import SEVERE, Finding, Member, findings, told
from pocd.cli.watch_view import STATE_STYLES
from pocd.observe.mask import clean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, ConsoleOptions, JustifyMethod, OverflowMethod, RenderResult

FRAME = 3  # lines of the heading, of the table's head and of the line below it
LEFT = ("daemon", "state", "node")
COLUMNS = (*LEFT, "block", "1 min", "15 min", "checked", "delivered", "waiting", "workers")
LEFT_OUT = {"block", "15 min", "checked"}  # where there are fewer columns than these
NARROW = 110


def total(members: Sequence[Member]) -> dict[str, Any]:
    """Return the fleet's sums: daemons that answer, funnel, and nonces per second of those that answer now."""
    statuses = [member.status for member in members if member.status]
    present = [member.status for member in members if member.status and not member.away]
    return {
        "daemons": len(members),
        "answering": len(present),
        "generating": sum(status["state"] == "GENERATING" for status in present),
        "funnel": _sum([status["funnel"] for status in statuses]),
        "rates": _sum([status["rates"] for status in present]),
    }


def _sum(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of each field; none where there is no part."""
    return {name: sum(part[name] for part in parts) for name in parts[0]} if parts else {}


@dataclass(frozen=True, slots=True)
class FleetView:
    """A rich renderable: sums, what is wrong, and a line for each daemon, those in trouble first.

    Attributes:
        members: The fleet's daemons.
        now: Seconds since the epoch.
    """

    members: Sequence[Member]
    now: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines that fit; what does not is counted."""
        found = findings(self.members)
        is_cut = options.height is not None  # what is printed once has room for whole sentences
        lines = [_line(finding, is_cut=is_cut) for finding in found]
        ranks = _ranks(found)
        members = sorted(self.members, key=lambda member: ranks.get(member.name, len(found)))
        left_out, with_machines = 0, True
        if options.height is not None:
            lines = _cut(lines, max((options.height - FRAME) // 2, 1))
            room = max(options.height - FRAME - len(lines) - 1, 1)
            left_out, members = max(len(members) - room, 0), members[:room]
            with_machines = sum(1 + len(_machines(member)) for member in members) <= room
        yield _head(self.members, self.now)
        yield from lines
        yield _table(members, options.max_width, with_machines=with_machines)
        if left_out:
            yield Text(f"… {left_out} more daemons do not fit", "dim")


def _ranks(found: Sequence[Finding]) -> dict[str, int]:
    """Return the place of each daemon's worst finding; gaps and old releases are no trouble of one daemon."""
    troubles = [(place, finding) for place, finding in enumerate(found) if finding.kind not in {"gap", "version"}]
    return {name: place for place, finding in reversed(troubles) for name in finding.names}


def _cut(lines: list[Text], most: int) -> list[Text]:
    return (
        lines if len(lines) <= most else [*lines[: most - 1], Text(f"… {len(lines) - most + 1} more findings", "dim")]
    )


def _head(members: Sequence[Member], now: float) -> Text:
    sums = total(members)
    counts = "{answering} of {daemons} daemons answer, {generating} generate".format(**sums)
    text = Text.assemble((counts, "bold"), no_wrap=True, overflow="ellipsis")
    if sums["rates"]:
        text.append(f", {speed(sums['rates']['checked_per_second_1m'])}", "bold")
    if sums["funnel"]:
        text.append(f"  {funnel_text(sums['funnel'])}")
    return text.append(f"  {local_time(now)}", "dim")


def _line(finding: Finding, *, is_cut: bool) -> Text:
    style = "bold red" if finding.kind in SEVERE else "yellow" if finding.kind == "alarm" else "dim"
    overflow: OverflowMethod = "ellipsis" if is_cut else "fold"
    return Text(f"{finding.kind.upper():8} {clean(told(finding))}", style, no_wrap=is_cut, overflow=overflow)


def _table(members: Sequence[Member], width: int, *, with_machines: bool) -> Table:
    """Return a line for each daemon and, if asked for, each machine of its cluster.

    Where there is little room, it has of the columns those that tell most.
    """
    columns = [name for name in COLUMNS if width >= NARROW or name not in LEFT_OUT]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for name in columns:
        side: JustifyMethod = "left" if name in LEFT else "right"
        table.add_column(name, justify=side, no_wrap=name != "daemon", overflow="ellipsis")
    for member in members:
        for row in (_row(member), *(map(_machine, _machines(member)) if with_machines else ())):
            table.add_row(*(row.get(name, "") for name in columns))
    return table


def _machines(member: Member) -> list[dict[str, Any]]:
    """Return the machines of a daemon's cluster; none for a release of pocd that does not tell."""
    machines: list[dict[str, Any]] = (member.status or {}).get("machines", [])
    return machines


def _machine(machine: dict[str, Any]) -> dict[str, Text]:
    all_ready = machine["ready"] == machine["workers"]
    return {
        "daemon": _name(f"  on {machine['node']}", "dim"),
        "1 min": Text(f"{machine['computed_per_second_1m']:,.1f}", "dim"),
        "15 min": Text(f"{machine['computed_per_second_15m']:,.1f}", "dim"),
        "workers": Text(f"{machine['ready']}/{machine['workers']}", "dim" if all_ready else "yellow"),
    }


def _name(name: str, style: str) -> Text:
    """Return a name on one line; of all columns its own gets narrower first."""
    return Text(clean(name), style, no_wrap=True, overflow="ellipsis")


def _row(member: Member) -> dict[str, Text]:
    name = _name(member.name, "bold red" if member.away else "bold")
    status = member.status
    if status is None:
        return {"daemon": name, "state": Text("away", "bold red") if member.away else Text("asking …", "dim")}
    state = status["state"]
    shown = (
        Text(f"away {age(member.age_seconds)}", "bold red") if member.away else Text(state, STATE_STYLES.get(state, ""))
    )
    waiting = sum(receiver["pending_batches"] for receiver in status["receivers"])
    ready = sum(worker["ready"] for worker in status["workers"])
    all_ready = ready == len(status["workers"])
    return {
        "daemon": name,
        "state": shown,
        "node": Text("{node_id} of {node_count}".format(**status["node"])),
        "block": Text("–" if status["round"] is None else f"{status['round']['block_height']:,}"),
        "1 min": Text(f"{status['rates']['checked_per_second_1m']:,.1f}"),
        "15 min": Text(f"{status['rates']['checked_per_second_15m']:,.1f}", "dim"),
        "checked": Text(f"{status['funnel']['checked']:,}"),
        "delivered": Text(f"{status['funnel']['delivered']:,}"),
        "waiting": Text(f"{waiting:,}", "yellow" if waiting else "dim"),
        "workers": Text(f"{ready}/{len(status['workers'])}", "dim" if all_ready else "yellow"),
    }
