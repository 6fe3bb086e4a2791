"""What to do after an attempt to deliver: a pure decision."""

from __future__ import annotations

from dataclasses import dataclass

BACKOFF_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
JITTER = 0.2  # of the backoff, either way, so that hosts do not come back in step
LONGEST_WAIT = BACKOFF_SECONDS[-1] * (1 + JITTER) + 1.0  # and room for rounding


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one attempt: an HTTP status, or the reason why there is none."""

    status: int | None
    detail: str

    @property
    def accepted(self) -> bool:
        """Whether the receiver has the batch: any 2xx."""
        return self.status is not None and 200 <= self.status < 300


def backoff(failures: int, jitter: float) -> float:
    """Return the seconds to wait after the `failures`-th failure in a row (1 is the first).

    Args:
        failures: At least 1.
        jitter: Uniformly random in [-1, 1].
    """
    base = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1]
    return base * (1 + JITTER * jitter)


def remaining_wait(next_at: float, now: float) -> float:
    """Return how long to wait until `next_at`, both in wall time.

    No backoff is longer than `LONGEST_WAIT`: what lies farther ahead was stored before the clock
    was set back, and is due now.
    """
    wait = next_at - now
    return wait if 0 < wait <= LONGEST_WAIT else 0.0
