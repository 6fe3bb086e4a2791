"""How long a worker may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """How long a worker may take for what it does, in seconds, before it is killed.

    Attributes:
        batch: From one finished batch to the next; longer means that its device hangs.
        start: From the start of its process to its first message (it imports torch).
        load: From the start of its process to its loaded model (a hub model may have to be downloaded).
        heartbeat: Between two of its messages.
        exit: From the end of its work to the end of its process.
    """

    batch: float
    start: float = 300.0
    load: float = 3600.0
    heartbeat: float = 30.0
    exit: float = 3.0
