"""Pure decisions after an attempt to deliver a batch: is it accepted, tried again, set aside, and when?

docs/protocol.md section 6 has these decisions as a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

BACKOFF_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
SHORT_SECONDS = 5.0  # at most, where this host was short of something: no receiver is spared by a longer wait
JITTER = 0.2  # of the backoff, either way, so that hosts do not come back in step
LONGEST_RETRY_AFTER = 600.0  # seconds; a receiver that asks for more is asked again all the same
LONGEST_WAIT = LONGEST_RETRY_AFTER * (1 + JITTER) + 1.0  # and room for rounding
POISON_FAULTS = 8  # failures of one batch alone, until it is set aside
OTHERS_TRIED = 2  # batches that are sent beside one that is refused, to see which is at fault: it, or a setting
ALARMING_REFUSALS = 3  # failures in a row, the last of them a refusal, that call a person
CERTIFICATE_SECONDS = 14 * 86_400.0  # before a certificate expires that a person is told: authorities renew earlier

REFUSED = frozenset({400, 409, 413, 422})  # the message will never do, or a setting is wrong
PASSING = frozenset({408, 425, 429})  # like 5xx: the receiver's state, which changes
GONE = 410


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one attempt to deliver a batch.

    Attributes:
        status: The HTTP status; None without an answer.
        detail: Description for people.
        retry_after: Seconds that the receiver asked to be left alone.
        broke: Whether the answer was missing or incomplete: a timeout, a reset, no HTTP.
        barred: Whether nothing was sent because the receiver's address must not be called.
        untrusted: Whether nothing was sent because the receiver's certificate is not accepted, as when it has expired.
        short: Whether nothing was sent because this host was short of files, memory or threads.
    """

    status: int | None
    detail: str
    retry_after: float | None = None
    broke: bool = False
    barred: bool = False
    untrusted: bool = False
    short: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the receiver has accepted the batch: any 2xx."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def fault(self) -> bool:
        """Whether the batch itself may be what the receiver fails at."""
        return self.broke or (self.status is not None and self.status >= 500)

    @property
    def refused(self) -> bool:
        """Whether the receiver refuses the batch: for what it holds, or as it would refuse any."""
        return self.status in REFUSED

    @property
    def alarm(self) -> bool:
        """Whether only a person can help: 3xx, 401, 403, 404, a barred address, an untrusted certificate."""
        if self.status is None:
            return self.barred or self.untrusted
        return 300 <= self.status < 500 and self.status not in REFUSED | PASSING | {GONE}


@dataclass(frozen=True, slots=True)
class Accept:
    """Mark the batch as delivered: the receiver has accepted it."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Send the head of the queue again after `seconds`: the receiver cannot take anything now."""

    seconds: float


@dataclass(frozen=True, slots=True)
class SetAside:
    """Make the batch a dead letter, which is not sent again by itself; the queue goes on."""

    reason: str


@dataclass(frozen=True, slots=True)
class Park:
    """Stop sending: the receiver asked for no more batches (HTTP 410); its queue is kept."""


Decision = Accept | Retry | SetAside | Park


def decide(
    outcome: Outcome,
    *,
    failures: int,
    faults: int,
    overtaken: bool,
    others_pass: bool,
    jitter: float,
    longest_wait: float = LONGEST_WAIT,
) -> Decision:
    """Return the decision after an attempt to deliver the head of a queue.

    Args:
        outcome: Outcome of the attempt.
        failures: How often the receiver has failed in a row, with this attempt.
        faults: How often the receiver may have failed because of this batch, with this attempt.
        overtaken: Whether the receiver has accepted a later batch.
        others_pass: Whether the receiver has just accepted another batch, though it refused this one before.
        jitter: Uniformly random in [-1, 1].
        longest_wait: Most seconds to wait, also where the receiver asks for more.
    """
    if outcome.accepted:
        return Accept()
    if outcome.refused and others_pass:
        return SetAside(f"refused: {outcome.detail}")
    if outcome.status == GONE:
        return Park()
    if outcome.fault and faults >= POISON_FAULTS and overtaken:
        return SetAside(f"poison: failed {faults} times while a later batch was accepted: {outcome.detail}")
    if outcome.retry_after is not None:
        # Never earlier than asked for, unless what waits is worth nothing by then.
        wait = min(max(outcome.retry_after, BACKOFF_SECONDS[0]), LONGEST_RETRY_AFTER)
        return Retry(min(wait * (1 + JITTER * abs(jitter)), longest_wait))
    wait = min(backoff(failures, jitter), BACKOFF_SECONDS[-1], longest_wait)
    return Retry(min(wait, SHORT_SECONDS) if outcome.short else wait)


def calls_a_person(outcome: Outcome, failures: int) -> bool:
    """Tell whether a failure is likely to be a wrong setting, here or at the receiver.

    Args:
        outcome: Outcome of the last attempt.
        failures: How often the receiver has failed in a row, with this attempt.
    """
    return outcome.alarm or (outcome.refused and failures >= ALARMING_REFUSALS)


def certificate_problem(expires: float | None, now: float) -> str | None:
    """Return the text for a certificate that soon expires; None for any other, and where there is none.

    Args:
        expires: When the certificate expires; both in seconds since the epoch.
        now: The time now.
    """
    if expires is None or expires - now >= CERTIFICATE_SECONDS:
        return None
    day = datetime.fromtimestamp(expires, UTC).date().isoformat()
    return f"its certificate expires on {day}, after which it is called no more: have it renewed"


def may_be_poison(outcome: Outcome, faults: int) -> bool:
    """Tell whether the next batch should be tried, to see which is at fault: the receiver or this batch.

    Args:
        outcome: Outcome of the last attempt.
        faults: How often the receiver may have failed because of this batch.
    """
    return outcome.fault and faults >= POISON_FAULTS - 1


def backoff(failures: int, jitter: float) -> float:
    """Return the seconds to wait after the `failures`-th failure in a row (1 is the first).

    Args:
        failures: At least 1.
        jitter: Uniformly random in [-1, 1].
    """
    base = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1]
    return base * (1 + JITTER * jitter)


def first_age(age: float, jitter: float) -> float:
    """Return the age at which the first batch of a round is formed, where later ones have `age`.

    Hosts see a round begin at about one moment: with the same age for all they would all send at one moment ever after.

    Args:
        age: Seconds.
        jitter: Uniformly random in [-1, 1].
    """
    return age * (1 + jitter) / 2


def remaining_wait(next_at: float, now: float) -> float:
    """Return how long to wait until `next_at`, both in wall time.

    No wait is longer than `LONGEST_WAIT`: what lies farther ahead was stored before the clock
    was set back, and is due now.
    """
    wait = next_at - now
    return wait if 0 < wait <= LONGEST_WAIT else 0.0
