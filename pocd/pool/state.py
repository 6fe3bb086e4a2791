"""What a worker is doing, and what happened in its lives: the record that status and metrics show.

A life of a worker begins with the start of its processes and ends with their end; the next one follows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from pocd.pool.causes import Cause, WorkerRefusedError

if TYPE_CHECKING:
    from pocd.observe.rates import RateWindow
    from pocd.pool.causes import WorkerError
    from pocd.pool.processes import Place
    from pocd.worker.messages import CardIdentity, Ready

LONGEST_BACKOFF = 60.0  # seconds until a worker that failed is started again
MOST_FAILURES = 5  # in a row, until a worker is left out, as long as another one works
LEFT_OUT_SECONDS = 1800.0  # until a worker that is left out is started again


class Phase(StrEnum):
    """What a worker is doing."""

    WAITING = "waiting"
    """The worker has no process: it is to be started, for the first time or again."""
    STARTING = "starting"
    """The worker's processes were started, and have not reported what they do."""
    LOADING = "loading"
    """The worker tests its device, loads its model and compiles it."""
    READY = "ready"
    """The worker's model is loaded, and the worker is given batches."""


NEXT = {
    Phase.WAITING: {Phase.STARTING},
    Phase.STARTING: {Phase.LOADING, Phase.WAITING},
    Phase.LOADING: {Phase.LOADING, Phase.READY, Phase.WAITING},
    Phase.READY: {Phase.WAITING},
}


@dataclass(slots=True)
class WorkerState:
    """One worker as the daemon sees it, across all its lives.

    Attributes:
        number: The worker's number; the daemon's workers are numbered from 0.
        devices: The devices of the worker, one for each of its ranks.
        batch_size: Nonces per batch.
        most: Nonces per batch that the next life tries at most; half of what did not fit into memory.
        computed_rate: Rate of the distances that are counted in `computed`.
        is_compiling: Whether the model is compiled where that is possible.
        capture: Whether the next life tries to capture batches as CUDA graphs; False once that failed.
        phase: What the worker is doing now.
        stage: What the worker does until it is ready, for people; None while it waits and once it is ready.
        was_ready: Whether the worker had a model ready in its present or last life.
        info: What the worker reported when it was last ready; None where it never was.
        cards: The GPUs among the worker's devices, by device, once the worker has reported them.
        place: Where in a cluster the worker runs; None while it has no process, and on this machine.
        pids: Process ids of the worker's ranks, the leading rank's first; empty while it has no process.
        causes: How often the worker's lives ended by each cause.
        failures: How many of the worker's lives ended in a row without lasting.
        left_out: Whether the worker failed so often that it is started only now and then, as others work.
        unusable: Whether the worker's last life ended because it cannot work, so that starting it again will not help.
        last_error: Why the worker's last life ended.
        last_refusal: Why the last batch without a result has none.
        computed: Nonces that the worker computed for what is mined.
    """

    number: int
    devices: tuple[str, ...]
    batch_size: int
    computed_rate: RateWindow
    is_compiling: bool = True
    capture: bool = True
    phase: Phase = Phase.WAITING
    stage: str | None = None
    was_ready: bool = False
    info: Ready | None = None
    cards: dict[str, CardIdentity] = field(default_factory=dict)
    place: Place | None = None
    pids: list[int] = field(default_factory=list)
    causes: Counter[Cause] = field(default_factory=Counter)
    failures: int = 0
    left_out: bool = False
    unusable: bool = False
    last_error: str | None = None
    last_refusal: str | None = None
    computed: int = 0
    most: int = field(init=False)

    def __post_init__(self) -> None:
        self.most = self.batch_size

    @property
    def device(self) -> str:
        """The worker's devices, joined by "+"."""
        return "+".join(self.devices)

    @property
    def ready(self) -> bool:
        """Whether the worker has a model ready."""
        return self.phase is Phase.READY

    @property
    def alarm(self) -> str | None:
        """Alarm text for people while the worker fails again and again, or is slower than need be; None otherwise."""
        if self.ready:
            return self._slowness
        if self.failures < MOST_FAILURES:
            return None
        tried = f"left out, and tried every {LEFT_OUT_SECONDS / 60:.0f} min" if self.left_out else "still tried"
        return f"failed {self.failures} times in a row, {tried}; the last time: {self.last_error}"

    @property
    def rounding_alarm(self) -> str | None:
        """Alarm text for people where the worker's results depend too much on rounding; None otherwise."""
        return self.info.conditioning.alarm if self.info and self.info.conditioning else None

    @property
    def _slowness(self) -> str | None:
        """Alarm text where a GPU runs eagerly what is to be compiled; None otherwise."""
        info = self.info
        assert info is not None, "a worker that is ready has said so"
        could = self.is_compiling and info.decoder == "flat" and self.devices[0] != "cpu"
        if not could or info.execution != "eager":
            return None
        return f"batches run eagerly, which is slower than compiled code: {info.execution_reason}"

    def start(self) -> None:
        """Begin a life."""
        self._enter(Phase.STARTING, stage="starting")
        self.was_ready = False

    def load(self, stage: str) -> None:
        """Record what the worker does until it is ready."""
        self._enter(Phase.LOADING, stage=stage)

    def become_ready(self, info: Ready) -> None:
        """Record that the worker's model is loaded, and what the worker reported of it."""
        self._enter(Phase.READY)
        self.was_ready = True
        self.info = info
        self.batch_size = info.batch_size

    def end(self) -> None:
        """End a life, in whatever phase it is."""
        self._enter(Phase.WAITING)

    def _enter(self, phase: Phase, *, stage: str | None = None) -> None:
        assert phase in NEXT[self.phase], f"worker {self.number} cannot go from {self.phase} to {phase}"
        self.phase = phase
        self.stage = stage

    def fail(self, error: WorkerError, *, lived: float, others_work: bool) -> float:
        """Record why a life ended; returns the seconds until the next one is to begin.

        Args:
            error: Why the life ended.
            lived: How many seconds it lasted.
            others_work: Whether another worker is ready.
        """
        self.causes[error.cause] += 1
        self.last_error = str(error)
        self.unusable = isinstance(error, WorkerRefusedError)
        lasted = self.was_ready and lived > LONGEST_BACKOFF
        self.failures = 1 if lasted else self.failures + 1
        # What a cluster loses it may have again at any time.
        self.left_out = self.failures >= MOST_FAILURES and others_work and error.cause is not Cause.CLUSTER
        return LEFT_OUT_SECONDS if self.left_out else min(LONGEST_BACKOFF, 2.0 ** (self.failures - 1))

    def count(self, distances: int) -> None:
        """Count distances that the worker computed for what is mined."""
        self.computed += distances
        self.computed_rate.add(distances)
