"""The worker process: owns one device, and turns nonces into distances until its daemon is gone.

Three threads: the main one computes; a reader takes messages and notices the end of the daemon,
which ends this process even when the main thread hangs in a kernel; a third one sends heartbeats.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from pocd.compute.engine import BlockRun, block_run, is_out_of_memory
from pocd.compute.errors import ComputeError, DeviceError, InputError, NonFiniteError, OutOfMemoryError
from pocd.compute.model import Model, load_model, longest_seq_len
from pocd.compute.names import default_tolerance
from pocd.compute.schemes import SCHEMES
from pocd.statistics import expected_valid_rate
from pocd.worker import messages
from pocd.worker.messages import (
    BatchSize,
    Cancel,
    Cancelled,
    Compute,
    Distances,
    Failed,
    Heartbeat,
    Load,
    Ready,
    Recompute,
    Refused,
    RoundBegun,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pocd.proof import Round

HEARTBEAT_SECONDS = 2.0
NICENESS = 5  # on the CPU the daemon goes first: its answers are short, a batch is long


class Inbox:
    """What the daemon asked for and has not taken back; filled by one thread, emptied by another.

    It is bounded by the daemon, which has one Recompute and a few Computes under way.
    """

    def __init__(self) -> None:
        self._waiting: deque[Compute] = deque()
        self._urgent: deque[Recompute] = deque()
        self._cancelled_through = -1
        self._changed = threading.Condition()

    def put(self, message: messages.Message) -> None:
        """Queue a Compute or a Recompute, or heed a Cancel."""
        with self._changed:
            if isinstance(message, Cancel):
                self._cancelled_through = message.through
            elif isinstance(message, Recompute):
                self._urgent.append(message)
            else:
                assert isinstance(message, Compute), f"expected Compute, got {message}"
                self._waiting.append(message)
            self._changed.notify()

    def get(self, report: Callable[[Cancelled], None]) -> Compute | Recompute:
        """Wait for a Recompute, or for a Compute that was not cancelled, and `report` those that were."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent or self._waiting)
                message = (self._urgent or self._waiting).popleft()
            if isinstance(message, Recompute) or message.id > self._cancelled_through:
                return message
            report(Cancelled(message.id))


class Link:
    """The socket to the daemon, shared by the threads."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._stream = self._socket.makefile("rb")
        self._sending = threading.Lock()
        self.inbox = Inbox()

    def send(self, message: messages.Message) -> None:
        """Send one message, whole."""
        with self._sending:
            self._socket.sendall(messages.encode(message))

    def read_load(self) -> Load:
        """Read the first message."""
        first = messages.read(self._stream)
        if first is None:
            sys.exit(0)
        assert isinstance(first, Load), f"expected Load, got {first}"
        return first

    def start(self) -> None:
        """Start the reader and the heartbeat."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _read(self) -> None:
        # A daemon that is killed with messages of ours unread resets the connection.
        with contextlib.suppress(ConnectionResetError):
            while (message := messages.read(self._stream)) is not None:
                self.inbox.put(message)
        os._exit(0)  # the daemon is gone: nobody wants what is being computed

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(HEARTBEAT_SECONDS):
            try:
                self.send(Heartbeat())
            except OSError:
                return  # the reader ends the process


def work(link: Link, load: Load) -> None:
    """Load the model, report, and compute what is asked for until that fails."""
    if load.device == "cpu":
        os.nice(NICENESS)
    tempfile.gettempdir()  # torch needs one; a full disk has none: a crash, to be tried again, not the model's fault
    model = load_model(load.model, dtype=load.dtype, device=load.device, revision=load.revision, seq_len=load.seq_len)
    batch_size = fitting_batch_size(model, load)
    link.send(
        Ready(
            model=load.model,
            fingerprint=model.fingerprint,
            dtype=load.dtype,
            device=str(model.device),
            hidden_size=model.hidden_size,
            layers=model.layers,
            decoder=model.decoder.kind,
            batch_size=batch_size,
            longest_seq_len=longest_seq_len(model.causal.config),
            torch=torch.__version__,
        )
    )
    worker = Worker(model, batch_size, link, seq_len=load.seq_len, shrink=load.shrink)
    while True:
        message = link.inbox.get(link.send)
        try:
            distances = worker.recompute(message) if isinstance(message, Recompute) else worker.mine(message)
        except (NonFiniteError, InputError) as error:
            link.send(Refused(message.id, str(error)))
        else:
            link.send(Distances(message.id, distances))


def main() -> None:
    """Run as `python -m pocd.worker.child FD`, with FD a socket to the daemon."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides
    link = Link(int(sys.argv[1]))
    load = link.read_load()
    link.start()
    try:
        work(link, load)
    except DeviceError as error:
        link.send(Failed("device", str(error)))
    except ComputeError as error:
        link.send(Failed("configuration", str(error)))


if __name__ == "__main__":
    main()
