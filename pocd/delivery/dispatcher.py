"""Deliver stored batches: one task per receiver, one request in flight, in order (docs/protocol.md section 6)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from pocd.delivery import policy, posting
from pocd.delivery.policy import Accept, Outcome, Park, Retry, SetAside
from pocd.delivery.posting import Poster
from pocd.observe.mask import mask_url
from pocd.store import deliveries
from pocd.store.outbox import ReceiverState
from pocd.tasks import shielded

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.delivery.posting import Receiver
    from pocd.observe.events import Events
    from pocd.store.deliveries import PendingDelivery
    from pocd.store.thread import OutboxThread

OUTCOMES = {Accept: "delivered", SetAside: "set aside", Park: "parked", Retry: "retry"}


class Dispatcher:
    """Delivers to one receiver; status shows its public attributes.

    Attributes:
        settled: Set while nothing can be sent now: the queue is empty or parked, or waits to retry.
        certificate_expires: When the receiver's certificate expires, seconds since the epoch; None until one was seen.
    """

    def __init__(
        self,
        receiver: Receiver,
        outbox: OutboxThread,
        *,
        expire_after: float,
        longest_wait: float = policy.LONGEST_WAIT,
        clock: Clock,
        jitter: Callable[[], float],
        log: FilteringBoundLogger,
        events: Events,
    ) -> None:
        self.receiver = receiver
        self._outbox = outbox
        self._expire_after = expire_after
        self._longest_wait = longest_wait
        self._clock = clock
        self._jitter = jitter
        self._log = log.bind(receiver=receiver.name)
        self._events = events
        self._woken = asyncio.Event()
        self._due = 0.0  # when the next attempt may be made, by the monotonic clock: the other may be set
        self._compared = 0  # sequence of the batch that was last sent beside one that was refused
        self.settled = asyncio.Event()
        self.certificate_expires: float | None = None
        self._failing: str | None = None  # the alarm about the last attempt
        self._told: str | None = None  # the alarm that was logged last

    @property
    def alarm(self) -> str | None:
        """Problem that only a person can solve, such as a wrong URL; None while there is none."""
        return self._failing or policy.certificate_problem(self.certificate_expires, self._clock.wall())

    @property
    def state(self) -> ReceiverState:
        """The receiver's health, as the store knows it."""
        return self._outbox.view.receivers.get(self.receiver.name, ReceiverState())

    async def run(self) -> None:
        """Deliver until cancelled."""
        await self._unpark_elsewhere()
        self._rest(policy.remaining_wait(self.state.next_at, self._clock.wall()))
        limits = {"connect": posting.CONNECT_SECONDS, "total": posting.ATTEMPT_SECONDS}
        async with Poster(self.receiver, clock=self._clock, **limits) as poster:
            while True:
                self._woken.clear()
                wait = self._wait()
                head = await self._next() if wait == 0 else None
                if head is not None:
                    await self._deliver(poster, head)
                    continue
                self.settled.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait or None):  # with an empty queue there is nothing to wait for
                        await self._woken.wait()
                self.settled.clear()

    def _rest(self, seconds: float) -> None:
        self._due = self._clock.monotonic() + seconds

    def _wait(self) -> float | None:
        """Return the seconds until the next attempt; None while the receiver is parked."""
        if self.state.parked_at:
            return None
        return max(0.0, self._due - self._clock.monotonic()) if self.state.next_at else 0.0

    def wake(self) -> None:
        """Look at the queue again: something may have been stored."""
        self.settled.clear()
        self._woken.set()

    async def _unpark_elsewhere(self) -> None:
        parked = self.state.parked_url
        if parked is not None and parked != mask_url(self.receiver.url):
            self._log.info("receiver has another URL than the one that wanted no more", action="receiver_unparked")
            await self._outbox.persistently(deliveries.ask_again, self.receiver.name)

    async def _next(self, after: int = 0) -> PendingDelivery | None:
        return await self._outbox.persistently(deliveries.next_pending, self.receiver.name, after)

    async def _deliver(self, poster: Poster, head: PendingDelivery) -> None:
        outcome = await self._attempt(poster, head)
        failed = await self._record(head, outcome)
        if outcome.refused and await self._accepts_another(poster, head):
            again = await self._next()
            if again is not None and again.batch == head.batch:  # it is still wanted
                outcome = await self._attempt(poster, again)
                failed = await self._record(again, outcome, others_pass=True)
        if failed and policy.may_be_poison(outcome, head.faults + 1):
            await self._try_the_next(poster, head)
        if failed and self._clock.wall() - head.queued_at >= self._expire_after:
            await self._expire()

    async def _try_the_next(self, poster: Poster, head: PendingDelivery) -> None:
        """Send the batch after `head`, to find out whether the receiver fails at `head` alone."""
        following = await self._next(after=head.sequence)
        if following is None:
            return
        if await self._record(following, await self._attempt(poster, following)):
            batches = [head.batch, following.batch]
            await self._outbox.persistently(deliveries.forget_faults, self.receiver.name, batches)

    async def _accepts_another(self, poster: Poster, head: PendingDelivery) -> bool:
        """Find out whether the receiver, which refuses `head`, accepts one of the batches after it.

        Where it refuses them too, it would refuse any: a secret, a clock or a proxy is at fault, and no batch. The next
        time others are tried, in the order of the queue, in case there are many that it refuses.
        """
        tried = {head.sequence}
        for _ in range(policy.OTHERS_TRIED):
            other = await self._next(max(head.sequence, self._compared)) or await self._next(head.sequence)
            if other is None or other.sequence in tried:
                return False
            tried.add(other.sequence)
            outcome = await self._attempt(poster, other)
            await self._record(other, outcome)
            if not outcome.refused:
                return outcome.accepted
            self._compared = other.sequence
        return False

    async def _record(self, delivery: PendingDelivery, outcome: Outcome, *, others_pass: bool = False) -> bool:
        """Store the outcome of an attempt; returns whether the receiver could not take the batch now."""
        name, faults = self.receiver.name, delivery.faults + outcome.fault
        overtaken = outcome.fault and await self._outbox.persistently(deliveries.is_overtaken, name, delivery.sequence)
        now = self._clock.wall()
        decision = policy.decide(
            outcome,
            failures=self.state.failures + 1,
            faults=faults,
            overtaken=overtaken,
            others_pass=others_pass,
            jitter=self._jitter(),
            longest_wait=self._longest_wait,
        )
        self._log_decision(delivery, outcome, decision)
        self._events.publish("delivery", receiver=name, id=delivery.id, outcome=OUTCOMES[type(decision)])
        record = self._outbox.persistently
        match decision:
            case Accept():
                # Shielded: what the receiver has, it has, though the daemon is stopping.
                mark = record(deliveries.record_delivered, name, delivery.batch, now)
                await shielded(f"receiver {name}: what it accepted", mark, self._log)
            case SetAside(reason):
                await record(deliveries.record_set_aside, name, delivery.batch, reason, now)
            case Park():
                url = mask_url(self.receiver.url)
                await record(deliveries.record_parked, name, delivery.batch, outcome.detail, url, now)
            case Retry(seconds):
                await record(
                    deliveries.record_failed,
                    name,
                    delivery.batch,
                    outcome.detail,
                    fault=outcome.fault,
                    next_at=now + seconds,
                )
                self._rest(seconds)
                return True
        return False

    def _log_decision(self, delivery: PendingDelivery, outcome: Outcome, decision: policy.Decision) -> None:
        """Log a decision, and raise or lower the alarm."""
        log = self._log.bind(batch=delivery.id, sequence=delivery.sequence, attempts=delivery.attempts + 1)
        match decision:
            case Accept():
                if self.state.failures:
                    log.info("receiver accepts again", action="receiver_restored", failures=self.state.failures)
            case SetAside(reason):
                log.error("batch set aside", action="dead_letter", cause=reason)
            case Park():
                log.error("receiver parked, its queue is kept", action="receiver_parked", cause=outcome.detail)
            case Retry(seconds):
                log.warning(
                    "delivery failed, will retry",
                    action="delivery_retry",
                    cause=outcome.detail,
                    after_s=round(seconds, 1),
                )
        self._failing = _alarm(outcome) if policy.calls_a_person(outcome, self.state.failures + 1) else None
        if self.alarm and self.alarm != self._told:
            log.error("receiver needs attention", action="receiver_alarm", cause=self.alarm)
        self._told = self.alarm

    async def _expire(self) -> None:
        """Expire batches that are too old, after the receiver has failed once more."""
        expired = 0
        while count := await self._outbox.persistently(
            deliveries.expire,
            self.receiver.name,
            queued_before=self._clock.wall() - self._expire_after,
            now=self._clock.wall(),
        ):
            expired += count
        if expired:
            self._log.error(
                "batches expired; they are kept", action="expired", batches=expired, after_s=self._expire_after
            )

    async def _attempt(self, poster: Poster, delivery: PendingDelivery) -> Outcome:
        try:
            outcome = await poster.post(delivery.kind, delivery.id, delivery.body, sequence=delivery.sequence)
        except Exception as error:  # noqa: BLE001 - what a receiver makes the library do must not end the daemon
            self._log.exception("an attempt failed in a way that nobody foresaw", action="delivery_bug")
            return Outcome(None, f"unforeseen {poster.describe(error)}", broke=True)
        self.certificate_expires = poster.certificate_expires
        return outcome


def _alarm(outcome: Outcome) -> str:
    if outcome.barred:
        return f"is not called: {outcome.detail}; check its URL and where its name leads"
    if outcome.untrusted:
        return f"is not called: {outcome.detail}; have its certificate renewed, or its authority trusted by this host"
    if outcome.refused:
        return (
            f"accepts no batch, answers {outcome.detail}: check its URL and its secret, this host's clock, and what is "
            f"between"
        )
    return f"answers {outcome.detail}: check its URL and its secret"
