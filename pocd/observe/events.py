"""Events: one bounded ring that all listeners read from.

A listener is a cursor into the ring, so listeners cost nothing to publishers and cannot hold them up; one that
reads slower than the ring turns learns how many events it missed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pocd.observe.changes import Changes

if TYPE_CHECKING:
    from pocd.clock import Clock

RING = 1024  # events that are kept

EventKind = Literal["block", "round", "state", "batch", "delivery", "worker", "validation", "chain", "reload"]
"""Kind of an event, and its data:

- block {height, hash, chain_id}: the chain's newest block is another one
- chain {problem}: why the chain is not followed as it should any more; null when it is again
- round {height, block_hash, id, by}: another round is active, by "chain" or "api"
- state {state}: the daemon's state is another one
- batch {id, kind, nonces, height}: a batch was formed and is on disk
- delivery {receiver, id, outcome}: what became of a batch for a receiver
- worker {what, worker, cause, reason}: that worker is "ready", "restarting" or "left_out", and why
- validation {id, state}: the state of a queued validation
- reload {applied, restart, problem}: the configuration was read again: the keys that changed, those that wait for a
  restart, and why nothing was changed; null where the file is good
"""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        id: Counts the events of this process from 1, without gaps.
        time: Seconds since the epoch.
        data: Fields of the kind, as JSON.
    """

    id: int
    kind: EventKind
    time: float
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Missed:
    """A cursor fell off the ring: `count` events right after it are gone, the later ones are still there."""

    count: int


class Events:
    """The ring of events. Publish and listen in the loop's thread.

    Attributes:
        life: Prefix of this process's event ids, its time of start, by which an id from before a restart is recognised.
        listeners: Number of open streams, for the metrics.
    """

    def __init__(self, clock: Clock, size: int = RING) -> None:
        self._clock = clock
        self._ring: deque[Event] = deque(maxlen=size)
        self._published = Changes()
        self.life = f"{int(clock.wall() * 1000):x}"
        self.listeners = 0

    @property
    def newest(self) -> int:
        """Id of the latest event; 0 while there was none."""
        return self._published.count

    @property
    def gone(self) -> int:
        """Id of the latest event that is not kept any more; 0 while all are."""
        return self.newest - len(self._ring)

    def publish(self, kind: EventKind, /, **data: Any) -> None:  # noqa: ANN401 - whatever JSON has
        """Append an event and wake who listens."""
        self._ring.append(Event(self.newest + 1, kind, self._clock.wall(), data))
        self._published.notify()

    async def after(self, cursor: int) -> list[Event] | Missed:
        """Return all events with ids above `cursor`, at least one; wait where there is none yet.

        Limit the wait by `asyncio.timeout`.
        """
        await self._published.after(cursor)
        if cursor < self.gone:
            return Missed(self.gone - cursor)
        return [event for event in self._ring if event.id > cursor]
