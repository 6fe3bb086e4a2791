"""`pocd fleet`: ask many daemons for their status, and draw them until the reader has seen enough."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pocd.admin.client import AdminError, call
from pocd.cli.api import echo
from pocd.cli.fleet_answer import check_answer
from pocd.cli.fleet_findings import Member, findings
from pocd.cli.fleet_view import FleetView, total
from pocd.cli.live import draw, is_drawable, print_once
from pocd.cli.report import as_json as to_json
from pocd.process import EXIT_CRASH, EndedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.cli.fleet_list import Address

ANSWER_SECONDS = 10.0  # for a status; the daemon makes one in milliseconds
AT_ONCE = 64  # daemons that are asked at a time


@dataclass(slots=True)
class Fleet:
    """The statuses of many daemons, kept up to date by `follow`."""

    addresses: Sequence[Address]
    _statuses: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)
    _away: dict[str, str] = field(default_factory=dict)

    def members(self) -> list[Member]:
        """Return what is known now, in the order of the addresses."""
        now = time.monotonic()
        found = []
        for address in self.addresses:
            at, status = self._statuses.get(address.url, (now, None))
            found.append(Member(address.name, address.url, status, now - at, self._away.get(address.url)))
        return found

    async def ask(self) -> None:
        """Ask every daemon once, some at a time."""
        slots = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for address in self.addresses:
                group.create_task(self._ask(address, slots), name=f"status of {address.name}")

    async def _ask(self, address: Address, slots: asyncio.Semaphore) -> None:
        try:
            async with slots, asyncio.timeout(ANSWER_SECONDS):
                status = await call(address.url, "GET", "/api/v1/pow/status", token=address.token)
            check_answer(status)
        except TimeoutError:
            self._away[address.url] = f"no answer within {ANSWER_SECONDS:g} s"
        except AdminError as error:
            self._away[address.url] = str(error)
        else:
            self._statuses[address.url] = time.monotonic(), status
            self._away.pop(address.url, None)

    async def follow(self, interval: float) -> None:
        """Ask all again and again, whatever they answer."""
        while True:
            await self.ask()
            await asyncio.sleep(interval)


async def watch(addresses: Sequence[Address], *, interval: float, as_json: bool) -> None:
    """Draw the daemons until q, Ctrl-C or SIGTERM; as JSON, or where there is no terminal, print them once.

    Args:
        addresses: Where the daemons are asked.
        interval: Seconds between two looks.
        as_json: Print all statuses, the sums and the findings as JSON.

    Raises:
        EndedError: What is printed once has no daemon that answers.
    """
    fleet, console = Fleet(addresses), Console(highlight=False)
    if not as_json and is_drawable(console):
        await draw(lambda: FleetView(fleet.members(), time.time()), console, {"statuses": fleet.follow(interval)})
        return
    await fleet.ask()
    members = fleet.members()
    if as_json:
        found = [asdict(finding) for finding in findings(members)]
        echo(to_json({"total": total(members), "findings": found, "daemons": [asdict(member) for member in members]}))
    else:
        print_once(FleetView(members, time.time()), console)
    if all(member.away for member in members):
        raise EndedError(EXIT_CRASH, f"none of {len(members)} daemons answers; the first: {members[0].away}")
