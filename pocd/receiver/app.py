"""The reference callback receiver: takes batches over HTTP, keeps each once, and answers only what is on disk.

A sender that follows docs/protocol.md section 6 sends a batch again until it gets a 2xx, so a batch may
arrive many times; the webhook-id tells that it is the same. What a receiver of your own has to do is here.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeVar

import orjson
import structlog
from aiohttp import web
from pydantic import BaseModel, FailFast, Field, ValidationError

from pocd.http.pages import refuse_pages
from pocd.http.parsing import apart, refuse_shape
from pocd.http.server import LARGE_BODY, RefusalError, errors_as_json, json_answer, listening
from pocd.http.webhooks import ID_HEADER, SignatureError, WebhookKeys, is_message_id
from pocd.protocol.artifacts import VectorsBody
from pocd.protocol.bodies import MOST_VALUES, VECTOR_FIELD, BatchBody
from pocd.protocol.numbers import Index
from pocd.receiver.store import Arrival, ArrivalOutcome, BatchKind, ReceiverStoreError, Store, StoredBatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aiohttp.typedefs import Handler

T = TypeVar("T")

MAX_BODY_BYTES = 32 * 1024 * 1024
REJECTIONS = frozenset({400, 401, 408, 413, 415})
SHUTDOWN_TIMEOUT_S = 10.0
"""Seconds that requests under way have to end when the receiver stops."""

_log = structlog.get_logger(__name__)


# What a body must hold (docs/protocol.md section 5). Unknown fields are ignored.


class GeneratedBody(BatchBody):
    """A ProofBatch: nonces and their distances."""

    dist: Annotated[list[float], FailFast()]


class ValidatedBody(GeneratedBody):
    """A ValidatedBatch: what a validator recomputed, and its verdict."""

    # What was claimed may be no finite number, for which JSON has only null.
    received_dist: Annotated[list[float | None], FailFast()]
    r_target: float
    fraud_threshold: float
    n_invalid: Index
    probability_honest: Annotated[float, Field(ge=0, le=1)]
    fraud_detected: bool


class ValidatedVectorsBody(BatchBody):
    """A ValidatedBatch of vectors: what a validator recomputed, and its verdict."""

    received_vectors: Annotated[list[str | None], FailFast()]
    vectors: Annotated[list[str], FailFast()]
    fraud_threshold: float
    n_invalid: Index
    probability_honest: Annotated[float, Field(ge=0, le=1)]
    fraud_detected: bool


class PageQuery(BaseModel):
    """The query of GET /batches."""

    after: Index = 0
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    kind: BatchKind | None = None


Body = GeneratedBody | VectorsBody | ValidatedVectorsBody

# Of distances, and of vectors, by the field that tells them apart.
_BODIES: dict[BatchKind, tuple[type[Body], str, type[Body]]] = {
    "generated": (GeneratedBody, "artifacts", VectorsBody),
    "validated": (ValidatedBody, "vectors", ValidatedVectorsBody),
}


def application(store: Store, keys: WebhookKeys | None, clock: Callable[[], float] = time.time) -> web.Application:
    """Build the receiver's routes around an open store, which stays the caller's to close.

    Source: docs/protocol.md sections 5 and 6.

    Args:
        store: Store of the batches.
        keys: If given, whatever changes the store (the two POSTs and the DELETE) must be signed.
        clock: Seconds since the Unix epoch.
    """
    receiver = _Routes(store, keys, clock)
    middlewares = [errors_as_json, refuse_pages, _store_failures, receiver.count_rejected]
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    app.add_routes(
        [
            web.post("/generated", receiver.generated),
            web.post("/validated", receiver.validated),
            web.get("/stats", receiver.stats),
            web.get("/batches", receiver.batches),
            web.delete("/clear", receiver.clear),
            web.get("/health", receiver.health),
        ]
    )
    return app


async def serve(
    *, host: str, port: int, path: Path, keys: WebhookKeys | None, on_started: Callable[[str], None] | None
) -> None:
    """Run the receiver until cancelled, then end requests under way and close the store.

    Args:
        host: Address to bind.
        port: TCP port; 0 takes a free one.
        path: The store's SQLite file, made if missing.
        keys: If given, whatever changes the store must be signed.
        on_started: Called with the URL once requests are answered.

    Raises:
        ReceiverStoreError: The store cannot be opened.
        OSError: The address cannot be bound.
    """
    store = await Store.open(path)
    try:
        async with listening(application(store, keys), host, port, shutdown_timeout=SHUTDOWN_TIMEOUT_S) as url:
            if on_started is not None:
                on_started(url)
            await asyncio.Event().wait()  # until cancelled, so without a bound
    finally:
        await store.close()


class _Routes:
    """The handlers of the routes."""

    def __init__(self, store: Store, keys: WebhookKeys | None, clock: Callable[[], float]) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock

    @web.middleware
    async def count_rejected(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count the batches that are refused before the store has a say, also while their bodies arrive."""
        try:
            return await handler(request)
        except (RefusalError, web.HTTPRequestEntityTooLarge) as error:
            if error.status in REJECTIONS and request.path[1:] in _BODIES:
                await self._store.count_rejected()
            raise

    async def generated(self, request: web.Request) -> web.Response:
        """POST /generated: keep a ProofBatch."""
        return await self._receive(request, "generated")

    async def validated(self, request: web.Request) -> web.Response:
        """POST /validated: keep a ValidatedBatch."""
        return await self._receive(request, "validated")

    async def stats(self, _request: web.Request) -> web.Response:
        """GET /stats: counts since the last clear, and the newest rounds."""
        totals, rounds = await self._store.stats()
        return json_answer(asdict(totals) | {"rounds": rounds})

    async def batches(self, request: web.Request) -> web.Response:
        """GET /batches: a page of the stored batches, in the order of arrival."""
        try:
            query = PageQuery.model_validate(dict(request.query))
        except ValidationError as error:
            raise _invalid(error, "invalid_query") from None
        page, following = await self._store.page(query.after, query.limit, query.kind)
        return json_answer({"batches": [_item(batch) for batch in page], "next": following})

    async def clear(self, request: web.Request) -> web.Response:
        """DELETE /clear: empty the store, and answer what it held."""
        await self._read_body(request)
        return json_answer({"status": "cleared", "removed": await self._store.clear()})

    async def health(self, _request: web.Request) -> web.Response:
        """GET /health: answer 200 while the store answers."""
        await self._store.stats()
        return json_answer({"status": "ok"})

    async def _receive(self, request: web.Request, kind: BatchKind) -> web.Response:
        """Keep a batch, once, and answer when it is on disk."""
        arrival = await self._read_arrival(request, kind)
        outcome = await self._store.add(arrival)
        if outcome is ArrivalOutcome.CONFLICT:
            _log.warning("other bytes under a known id", action="batch_conflict", id=arrival.id, kind=kind)
            raise RefusalError(409, "conflict", f"{arrival.id} is known with another body or kind", ID_HEADER)
        return json_answer({"status": outcome.value, "id": arrival.id})

    async def _read_arrival(self, request: web.Request, kind: BatchKind) -> Arrival:
        body = await self._read_body(request)
        message_id = request.headers.get(ID_HEADER)
        if message_id is not None and not is_message_id(message_id):
            message = "a webhook-id has 1 to 256 printable ASCII characters and no '.'"
            raise RefusalError(400, "invalid_header", message, ID_HEADER)
        batch = await _promptly(body, partial(_parse, kind, body))
        return Arrival(
            id=message_id or batch.batch_id or hashlib.sha256(body).hexdigest(),
            kind=kind,
            received_at=datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds"),
            body=body,
            block_hash=batch.block_hash,
            block_height=batch.block_height,
            public_key=batch.public_key,
            nonces=tuple(batch.nonces),
        )

    async def _read_body(self, request: web.Request) -> bytes:
        """Read the whole body and check its signature, if there are keys."""
        body = await request.read()
        if self._keys is not None:
            try:
                await _promptly(body, partial(self._keys.verify, request.headers, body, self._clock()))
            except SignatureError as error:
                raise RefusalError(401, "bad_signature", str(error)) from None
        return body


async def _promptly(body: bytes, work: Callable[[], T]) -> T:
    """Do what takes long where the body is large, without holding others up."""
    return await apart(work) if len(body) > LARGE_BODY else work()


def _parse(kind: BatchKind, body: bytes) -> Body:
    refuse_shape(body, MOST_VALUES, VECTOR_FIELD)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusalError(400, "malformed_json", str(error)) from None
    if not isinstance(value, dict):
        raise RefusalError(400, "not_an_object", "the body has to be a JSON object")
    of_distances, telling, of_vectors = _BODIES[kind]
    try:
        return (of_vectors if telling in value else of_distances).model_validate(value)
    except ValidationError as error:
        raise _invalid(error, "invalid_body") from None


def _invalid(error: ValidationError, code: str) -> RefusalError:
    """Name the first field at fault, and where in it: `nonces[3]`."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field, *position = first["loc"]
    where = str(field) + "".join(f"[{index}]" for index in position)
    return RefusalError(400, code, f"{where}: {first['msg']}", str(field))


def _item(batch: StoredBatch) -> dict[str, object]:
    return {
        "seq": batch.seq,
        "id": batch.id,
        "kind": batch.kind,
        "received_at": batch.received_at,
        "attempts": batch.attempts,
        "batch": orjson.Fragment(batch.body),  # the very bytes: they were JSON when they came
    }


@web.middleware
async def _store_failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ReceiverStoreError as error:
        _log.error("the store failed", action="store_failed", error=str(error))
        raise RefusalError(503, "store_failed", "the store failed; try again later") from error
