"""Run pocd until it passes a fail point, and kill it there with SIGKILL, as a power cut would.

Usage: python -m scripts.trials.failpoints POINT PASSING {start|mining} run --config FILE

The process dies the PASSING-th time that it passes POINT, counted from its start or from its first nonces on.
pocd itself knows nothing of fail points: the few functions where one lies are wrapped here.
"""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from typing import TYPE_CHECKING, Any

from pocd.cli import main as cli
from pocd.delivery import batcher
from pocd.mining import miner
from pocd.store import deliveries
from pocd.store.batches import Formed, form_batches
from pocd.store.outbox import Outbox
from pocd.store.proofs import commit_spans

if TYPE_CHECKING:
    from pocd.store.proofs import Counted

MINING = "mining has begun\n"  # on standard error, once the first nonces are to be committed


class Point(Enum):
    """Points at which the daemon can be killed from inside."""

    BEFORE_COMMIT = "before commit"
    AFTER_COMMIT = "after commit"
    AFTER_POST = "after POST, before its mark"
    AFTER_FORMING = "after a batch was formed, before it was sent"


class Countdown:
    """Counts how often `point` is passed, and ends the process at the `left`-th time.

    Attributes:
        begun: Whether passes are counted yet.
        mining: Whether nonces were checked.
    """

    def __init__(self, point: Point, left: int, *, begun: bool) -> None:
        self._point = point
        self._left = left
        self.begun = begun
        self.mining = False

    def passes(self, point: Point) -> None:
        """Count a pass of `point`, if that is the one to be killed at."""
        if self.begun and point is self._point:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


def arm(countdown: Countdown) -> None:
    """Wrap the functions with the points. All run in the outbox's thread, so nobody sees a point half passed."""
    commit = Outbox._commit  # noqa: SLF001 - it is wrapped
    record_delivered = deliveries.record_delivered

    def committing(outbox: Outbox) -> None:
        countdown.passes(Point.BEFORE_COMMIT)
        commit(outbox)
        countdown.passes(Point.AFTER_COMMIT)

    def committing_spans(outbox: Outbox, *args: Any) -> list[Counted]:  # noqa: ANN401 - passed on
        if not countdown.mining:
            countdown.mining = countdown.begun = True
            sys.stderr.write(MINING)
        return commit_spans(outbox, *args)

    def forming(outbox: Outbox, *args: Any, **kwargs: Any) -> Formed:  # noqa: ANN401 - passed on
        formed = form_batches(outbox, *args, **kwargs)
        if formed.batches:
            countdown.passes(Point.AFTER_FORMING)
        return formed

    def recording(outbox: Outbox, *args: Any) -> None:  # noqa: ANN401 - passed on
        countdown.passes(Point.AFTER_POST)
        record_delivered(outbox, *args)

    for owner, name, wrapper in (
        (Outbox, "_commit", committing),
        (miner, "commit_spans", committing_spans),
        (batcher, "form_batches", forming),
        (deliveries, "record_delivered", recording),
    ):
        setattr(owner, name, wrapper)


def main() -> None:
    """Arm the point and become pocd."""
    point, passing, begin, *arguments = sys.argv[1:]
    arm(Countdown(Point(point), int(passing), begun=begin == "start"))
    sys.argv = ["pocd", *arguments]
    cli.main()


if __name__ == "__main__":
    main()
