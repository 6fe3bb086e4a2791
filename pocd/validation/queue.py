"""Validate batches of others: one after another, between the batches that are mined (docs/protocol.md section 5).

What is to be validated is on disk before we say that it will be, and its verdict before anybody hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import orjson

from pocd.http.parsing import apart
from pocd.pool.recomputations import NoResultError
from pocd.protocol.proof import canonical_json, hash_name
from pocd.store import validations
from pocd.validation.claim import AnyClaim
from pocd.validation.verdict import Recomputed, Terms, judge, round_of, sampled
from pocd.worker.messages import Compared, Distances

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.delivery.receivers import Receivers
    from pocd.observe.events import Events
    from pocd.pool.pool import Pool
    from pocd.store.thread import OutboxThread
    from pocd.store.validations import Validation
    from pocd.validation.claim import Claim, Numbers, VectorClaim

SMALLER = 4  # times fewer nonces are asked for at a time with a reference, which may take so many times as long
WATCHED = 4  # the same, added where a mixture's routers are watched too
MOST_AT_ONCE = 4096  # nonces, whose answer is 2 MiB at most


@dataclass(frozen=True, slots=True)
class ValidationRequest:
    """A request for validation: a batch, the terms to judge it by, and which of its nonces to recompute.

    Attributes:
        callback: Name of the receiver of the verdict beside the configured ones.
        callback_url: URL of that receiver; None where it is a configured one. No answer depends on it.
    """

    claim: Claim | VectorClaim
    terms: Terms
    sample: int | None
    seed: str | None
    callback: str | None
    callback_url: str | None = None

    def to_json(self) -> bytes:
        """Return canonical JSON, whose hash is the validation's id: from it the answer follows."""
        return canonical_json(
            {
                "claim": self.claim.model_dump(),
                "terms": asdict(self.terms),
                "sample": self.sample,
                "seed": self.seed,
                "callback": self.callback,
            }
        )

    @property
    def id(self) -> str:
        """Hash of `to_json`."""
        return hash_name(self.to_json())

    @classmethod
    def from_json(cls, encoded: bytes) -> ValidationRequest:
        """Return the request that `to_json` wrote."""
        fields = orjson.loads(encoded)
        claim, terms = AnyClaim.model_validate(fields.pop("claim")).root, Terms(**fields.pop("terms"))
        return cls(claim, terms, **fields)


class QueueFullError(Exception):
    """The queue of validations is full."""


class Validator:
    """Takes validations in, has their results recomputed, and stores the verdicts.

    Attributes:
        results: Number of validations that ended since the start, by their verdict, or "failed"; "not_paired" counts
            those that an orchestrator's jobs should have had and did not get.

    Args:
        outbox: The open store.
        workers: Recompute.
        receivers: Get the verdicts.
        most: How many validations may wait.
        clock: The time.
        log: Gets a line for each verdict.
        events: Get what becomes of each validation.
        until_free: Waits while the device has better to do, before each part that is recomputed; without it, nothing
            comes first.
    """

    def __init__(
        self,
        outbox: OutboxThread,
        workers: Pool,
        receivers: Receivers,
        *,
        most: int,
        clock: Clock,
        log: FilteringBoundLogger,
        events: Events,
        until_free: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._outbox = outbox
        self._workers = workers
        self._receivers = receivers
        self._most = most
        self._clock = clock
        self._log = log
        self._events = events
        self._until_free = until_free
        self._asked = asyncio.Event()
        self._finished = asyncio.Condition()
        self.results: Counter[str] = Counter()

    async def ask(self, request: ValidationRequest) -> Validation:
        """Store a request and return its validation, which may be done if the same was requested before.

        Raises:
            QueueFullError: Too many validations wait; nothing was stored.
            StoreUnavailableError: The store cannot be written now; nothing was stored.
        """
        encoded = await apart(request.to_json)
        name = hash_name(encoded)
        callback = (request.callback, request.callback_url) if request.callback and request.callback_url else None
        found = await self._outbox(
            validations.ask, name, encoded, callback=callback, most=self._most, now=self._clock.wall()
        )
        if found is None:
            raise QueueFullError(f"{self._most} validations are waiting, as many as validation.max_queued allows")
        if found.state == "pending":
            self._events.publish("validation", id=name, state="pending")
            self._asked.set()
        return found

    async def find(self, name: str) -> Validation | None:
        """Return a validation by its id; None where it is unknown."""
        return await self._outbox(validations.find, name)

    async def until_finished(self, name: str, limit: float) -> Validation | None:
        """Wait up to `limit` seconds until a validation is no longer pending, and return it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit), self._finished:
                while (found := await self.find(name)) is not None and found.state == "pending":
                    await self._finished.wait()
                return found
        return await self.find(name)

    async def run(self) -> None:
        """Validate pending requests, oldest first, until cancelled."""
        while True:
            self._asked.clear()
            waiting = await self._outbox.persistently(validations.pending)
            if waiting:
                await self._validate(waiting[0])
            else:
                await self._asked.wait()

    async def _validate(self, name: str) -> None:
        encoded = await self._outbox.persistently(validations.request_of, name)
        request = await asyncio.to_thread(ValidationRequest.from_json, encoded)
        try:
            found = await self._recompute(request)
        except NoResultError as error:
            await self._outbox.persistently(validations.fail, name, str(error), self._clock.wall())
            self._log.error("validation has no result", action="validation_failed", id=name, cause=str(error))
            state = "failed"
            self.results["failed"] += 1
        else:
            # In a thread: of 100,000 nonces it takes half a second.
            batch = await asyncio.to_thread(judge, request.claim, request.terms, found, request.sample, request.seed)
            receivers = self._receivers.names(request.callback)
            await self._outbox.persistently(validations.finish, name, batch, receivers, self._clock.wall())
            self._receivers.wake()
            self._log.info(
                "batch validated",
                action="validated",
                id=name,
                public_key=batch.round.public_key,
                height=batch.round.block_height,
                checked=batch.n,
                invalid=batch.n_invalid,
                near=batch.mixture and batch.mixture.near,
                verdict=batch.verdict,
                by_differences=batch.differences and batch.differences.result,
            )
            state = "done"
            self.results[batch.verdict] += 1
        self._events.publish("validation", id=name, state=state)
        async with self._finished:
            self._finished.notify_all()

    async def _recompute(self, request: ValidationRequest) -> Recomputed:
        """Let the workers compute the results of a request, a part of a batch at a time.

        Raises:
            NoResultError: The model gives no result, its worker ended each time, or another model is loaded now.
        """
        round_, terms = round_of(request.claim, request.terms), request.terms
        nonces = await asyncio.to_thread(sampled, request.claim.nonces, request.sample, request.seed)
        own: dict[int, Numbers] = {}
        reference: dict[int, Numbers] = {}
        errors: dict[int, float] = {}
        turned: dict[int, float] = {}
        while len(own) < len(nonces):
            if self._until_free is not None:
                await self._until_free()
            await self._workers.ready.wait()
            self._check_model(terms)
            times = (SMALLER if terms.has_reference else 0) + (WATCHED if self._may_have_routers(terms) else 0)
            size = max(1, min(MOST_AT_ONCE, self._workers.batch_size) // (times or 1))
            part = nonces[len(own) : len(own) + size]
            last = len(own) + len(part) == len(nonces)
            answer = await self._workers.recomputations.answer(
                round_, part, last=last, with_reference=terms.has_reference
            )
            if isinstance(answer, Compared):
                own |= zip(part, answer.own, strict=True)
                reference |= zip(part, answer.reference, strict=True)
                errors |= zip(part, answer.errors, strict=True)
            else:
                assert isinstance(answer, Distances), "vectors are recomputed with a reference"
                own |= zip(part, ((distance,) for distance in answer.distances), strict=True)
            if answer.turned is not None:
                turned |= zip(part, answer.turned, strict=True)
        found = Recomputed(own, reference, errors) if terms.has_reference else Recomputed(own)
        return replace(found, turned=turned or None)

    def _may_have_routers(self, terms: Terms) -> bool:
        """Tell whether the worker may watch a mixture's routers, as it found at its start if it could measure."""
        info = self._workers.info
        assert info is not None, "a worker that is ready has said what it runs"
        return not terms.is_of_vectors and (info.conditioning is None or info.conditioning.turned is not None)

    def _check_model(self, terms: Terms) -> None:
        """Refuse a request from before a restart that loaded another model: its answer would be another one."""
        info = self._workers.info
        assert info is not None, "a worker that is ready has said what it runs"
        if (info.fingerprint, info.dtype) != (terms.model_fingerprint, terms.dtype):
            raise NoResultError("the daemon runs another model or dtype than when this was requested; request it again")
