"""The admin API's view of the outbox: list, show, send again, give up (docs/delivery.md).

Pydantic models at the edge, one bounded call to the store's thread after another behind it.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import orjson
from pydantic import ConfigDict, Field, model_validator

from pocd.admin import answers
from pocd.admin.operations import Operation, answer
from pocd.admin.status import receivers
from pocd.http.parsing import Input, parse_body, parse_query
from pocd.http.server import RefusalError, json_answer
from pocd.store import deliveries, selections
from pocd.store.backup import BackupError, back_up
from pocd.store.errors import StoreUnavailableError
from pocd.store.selections import DeliveryState, PurgeableState, Selection, SetAsideState

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from pocd.admin.parts import Parts

STORE_SECONDS = 15.0  # for each piece of store work; a hung disk must not keep callers
PIECES_SECONDS = 5.0  # until no further piece of one call is begun: callers see how far it went, and ask again
MOST_IDS = 1000
AFTER = r"^[A-Za-z0-9._-]{1,64}:[0-9]{1,18}$"


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
BatchId = Annotated[str, Field(min_length=1, max_length=256)]
BatchIds = Annotated[tuple[BatchId, ...], Field(min_length=1, max_length=MOST_IDS)]


class ListQuery(Input):
    """The query of `GET /api/v1/outbox`."""

    state: DeliveryState | None = Field(
        default=None, description="List batches in this state only. Absent: in every state but delivered."
    )
    receiver: Name | None = Field(default=None, description="List batches of this receiver only.")
    after: Annotated[str, Field(pattern=AFTER)] | None = Field(
        default=None, description="List what follows this place: `next` of the page before."
    )
    limit: int = Field(default=100, ge=1, le=1000, description="Most batches on the page.")


class _Which(Input):
    """Selection of batches: all that match every given field. A selection without any field is refused."""

    ids: BatchIds | None = Field(default=None, description="Select these batches, by id.")
    receiver: Name | None = Field(default=None, description="Select batches of this receiver.")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(value is None for _, value in self):
            raise ValueError("say which batches: ids, receiver or states")
        return self


def _in_json(example: dict[str, Any]) -> ConfigDict:
    """State in JSON Schema, too, that at least one field is needed."""
    nothing: dict[str, Any] = {"properties": {key: {"type": "null"} for key in ("ids", "receiver", "states")}}
    return ConfigDict(json_schema_extra={"examples": [example], "not": nothing})


class RetryBody(_Which):
    """Batches to send again: all that match every given field, at least one."""

    model_config = _in_json({"receiver": "main"})

    states: Annotated[tuple[SetAsideState, ...], Field(min_length=1)] | None = Field(
        default=None, description="Select batches in these states. Absent: dead and expired; with `ids` also withdrawn."
    )


class PurgeBody(_Which):
    """Batches to give up: all that match every given field, at least one."""

    model_config = _in_json({"states": ["expired"]})

    states: Annotated[tuple[PurgeableState, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Select batches in these states. Absent: dead, expired, withdrawn. Pending only of a receiver that "
        "is no longer configured.",
    )


class BackupBody(Input):
    """Where to write a copy of the store."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"file": "/var/lib/pocd/outbox-backup.db"}]})

    file: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4096)] = Field(
        description="Absolute path of a new file on the daemon's host, where the daemon may write."
    )


class OutboxApi:
    """The routes for the outbox."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._copying: tuple[str, asyncio.Task[int]] | None = None

    def operations(self) -> list[Operation]:
        """Return the operations of these routes."""
        unknown = "The batch or receiver is unknown (`not_found`)."
        served = "The receiver of these pending batches is still configured (`still_served`)."
        return [
            Operation("GET", "/api/v1/outbox", self.index, "outbox", query=ListQuery, answers={200: answers.Page}),
            Operation("GET", "/api/v1/outbox/{id}", self.show, "outbox", answers={200: answers.Shown, 404: unknown}),
            Operation(
                *("POST", "/api/v1/outbox/backup", self.backup, "outbox"),
                body=BackupBody,
                answers={
                    200: answers.BackedUp,
                    409: "The file cannot be written (`not_written`), or another is being written (`backup_runs`).",
                },
            ),
            Operation(
                *("POST", "/api/v1/outbox/retry", self.retry, "outbox"),
                body=RetryBody,
                answers={200: answers.Queued, 404: unknown},
            ),
            Operation(
                *("POST", "/api/v1/outbox/purge", self.purge, "outbox"),
                body=PurgeBody,
                answers={200: answers.Purged, 404: unknown, 409: served},
            ),
        ]

    async def backup(self, request: web.Request) -> web.Response:
        """Write a copy of the store into a new file, while all goes on; ask again until it is complete."""
        file = (await parse_body(request, BackupBody)).file
        if self._copying is None:
            self._copying = file, asyncio.create_task(self._back_up(Path(file)), name="backup")
            # Its error is for whoever asks again; Python is not to complain where nobody does.
            self._copying[1].add_done_callback(lambda done: done.cancelled() or done.exception())
        name, copying = self._copying
        if name != file:
            raise RefusalError(409, "backup_runs", f"a backup is being written to {name}; wait for it", "file")
        await asyncio.wait({copying}, timeout=PIECES_SECONDS)
        if not copying.done():
            return answer(answers.BackedUp(file=file, complete=False, bytes=None))
        self._copying = None
        try:
            size = copying.result()
        except BackupError as error:
            raise RefusalError(409, "not_written", str(error), "file") from error
        self._parts.log.info("the store was backed up", action="outbox_backup", file=file, bytes=size)
        return answer(answers.BackedUp(file=file, complete=True, bytes=size))

    async def _back_up(self, file: Path) -> int:
        ended = threading.Event()

        def step() -> None:
            if ended.is_set():
                raise BackupError("the daemon stops")

        try:
            return await asyncio.to_thread(lambda: back_up(self._parts.outbox.view.db, file, step))
        finally:
            ended.set()  # a copy is not waited for when the daemon stops

    async def index(self, request: web.Request) -> web.Response:
        """Return every receiver's counts and a page of batches; without a state, all that are not delivered."""
        query = parse_query(request, ListQuery)
        states: tuple[DeliveryState, ...] = (
            (query.state,) if query.state else ("pending", "dead", "expired", "withdrawn")
        )
        name, _, sequence = (query.after or ":0").partition(":")
        selection = Selection(states, query.receiver)
        async with _limit():
            found = await self._parts.outbox(
                selections.listed, selection, after=(name, int(sequence)), limit=query.limit + 1
            )
        page = found[: query.limit]
        following = f"{page[-1].receiver}:{page[-1].sequence}" if len(found) > len(page) else None
        batches = [self._status(letter) for letter in page]
        return answer(answers.Page(receivers=receivers(self._parts), batches=batches, next=following))

    async def show(self, request: web.Request) -> web.Response:
        """Return one batch: its delivery to each receiver, and its content."""
        name = request.match_info["id"]
        async with _limit():
            found = await self._parts.outbox(selections.shown, name)
        if found is None:
            raise RefusalError(404, "not_found", f"no batch {name} is in the store; it may have been pruned", "id")
        each, body = found
        deliveries_ = [self._status(letter).model_dump() for letter in each]
        return json_answer({"id": name, "deliveries": deliveries_, "batch": orjson.Fragment(body)})

    async def retry(self, request: web.Request) -> web.Response:
        """Queue batches again that are no longer sent, and try their receivers at once."""
        body = await parse_body(request, RetryBody)
        self._check(body)
        default: tuple[DeliveryState, ...] = ("dead", "expired", "withdrawn") if body.ids else ("dead", "expired")
        selection = Selection(body.states or default, body.receiver, body.ids)
        queued, names, complete = await self._repeat(selections.send_again, selection)
        if body.ids and not queued:
            raise RefusalError(404, "not_found", "none of these batches is set aside", "ids")
        names |= {body.receiver} if body.receiver else set()
        complete &= await self._ask_again(names)
        self._parts.receivers.wake()
        self._parts.log.info("batches are sent again", action="outbox_retry", batches=queued, receivers=sorted(names))
        return answer(answers.Queued(queued=queued, complete=complete, receivers=sorted(names)))

    async def purge(self, request: web.Request) -> web.Response:
        """Give up batches that are no longer sent, for good."""
        body = await parse_body(request, PurgeBody)
        self._check(body)
        served = {dispatcher.receiver.name for dispatcher in self._parts.receivers}
        if body.states and "pending" in body.states and (body.receiver is None or body.receiver in served):
            message = "pending batches are given up only of one receiver, named, that is no longer configured"
            raise RefusalError(409, "still_served", message, "states")
        states = body.states or ("dead", "expired", "withdrawn")
        purged, names, complete = await self._repeat(selections.purge, Selection(states, body.receiver, body.ids))
        if body.ids and not purged:
            raise RefusalError(404, "not_found", "none of these batches is set aside", "ids")
        self._parts.log.warning("batches given up", action="outbox_purge", batches=purged, receivers=sorted(names))
        return answer(answers.Purged(purged=purged, complete=complete, receivers=sorted(names)))

    def _check(self, body: _Which) -> None:
        """Refuse a receiver that was never known."""
        known = self._parts.outbox.view.receivers.keys() | {each.receiver.name for each in self._parts.receivers}
        if body.receiver is not None and body.receiver not in known:
            raise RefusalError(404, "not_found", f"no receiver {body.receiver}; known are {sorted(known)}", "receiver")

    async def _repeat(
        self, method: Callable[..., list[tuple[str, int]]], selection: Selection
    ) -> tuple[int, set[str], bool]:
        """Repeat a bounded piece of work until none is left or the time is up.

        Returns:
            The number of deliveries, their receivers, and whether none is left.

        Raises:
            StoreUnavailableError: The store cannot do the first piece.
            TimeoutError: The first piece took too long.
        """
        total, names, clock = 0, set[str](), self._parts.clock
        end = clock.monotonic() + PIECES_SECONDS
        while True:
            try:
                async with _limit():  # what has not begun by then never will
                    done = await self._parts.outbox(method, selection, clock.wall())
            except (StoreUnavailableError, TimeoutError):
                if not total:
                    raise
                return total, names, False  # what was done is told
            total += len(done)
            names |= {receiver for receiver, _ in done}
            if len(done) < deliveries.CHUNK:
                return total, names, True
            if clock.monotonic() >= end:
                return total, names, False

    async def _ask_again(self, names: set[str]) -> bool:
        """Have receivers tried at once; returns whether the store took that."""
        try:
            async with _limit():
                for name in sorted(names):
                    await self._parts.outbox(deliveries.ask_again, name)
        except (StoreUnavailableError, TimeoutError):
            return False
        return True

    def _status(self, delivery: selections.Delivery) -> answers.DeliveryStatus:
        age = max(0.0, self._parts.clock.wall() - delivery.created_at)
        return answers.DeliveryStatus(**asdict(delivery), age_seconds=age)


def _limit() -> asyncio.Timeout:
    return asyncio.timeout(STORE_SECONDS)
