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


class Prepared:
    """The model prepared for one round, as long as that is wanted."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._attached = ExitStack()
        self._run: BlockRun | None = None
        self.round: Round | None = None

    def begin(self, round_: Round) -> BlockRun:
        """Return the run of `round_`, prepared anew where another one was."""
        if self._run is None or round_ != self.round:
            self.end()
            run = block_run(
                self._model,
                SCHEMES[round_.scheme],
                block_hash=round_.block_hash,
                public_key=round_.public_key,
                seq_len=round_.seq_len,
            )
            self._run = self._attached.enter_context(run)
            self.round = round_
        return self._run

    def end(self) -> None:
        """Give the model its own weights back, and free what was prepared."""
        self._attached.close()
        self._run = self.round = None


class Worker:
    """A loaded model, prepared for the round that is mined and for one that is recomputed beside it."""

    def __init__(self, model: Model, batch_size: int, link: Link, *, seq_len: int, shrink: bool) -> None:
        self._batch_size = batch_size
        self._link = link
        self._seq_len = seq_len
        self._shrink = shrink
        self._mined = Prepared(model)
        self._recomputed = Prepared(model)

    def mine(self, message: Compute) -> list[float]:
        """Compute one message's distances, preparing its round first where that is a new one."""
        round_ = message.round
        if round_ != self._mined.round:
            if SCHEMES[round_.scheme].weights != "trained":
                self._recomputed.end()  # both would draw into the same weights
            run = begin(self._mined, round_, other=self._recomputed)
            self._link.send(RoundBegun(round_.id, expected_valid_rate(round_.r_target, run.dimension)))
        nonces = range(message.first, message.first + message.step * message.count, message.step)
        return self._distances(self._mined.begin(round_), nonces, other=self._recomputed)

    def recompute(self, message: Recompute) -> list[float]:
        """Compute one message's distances, in the shape in which they would be mined."""
        prepared, other = self._recomputed, self._mined
        if message.round == self._mined.round:
            prepared, other = other, prepared
        elif SCHEMES[message.round.scheme].weights != "trained":
            self._mined.end()  # likewise
        try:
            run = begin(prepared, message.round, other=other)
            return self._distances(run, message.nonces, other=other)
        finally:
            if message.last:
                self._recomputed.end()

    def _distances(self, run: BlockRun, nonces: Sequence[int], *, other: Prepared) -> list[float]:
        while True:
            # A batch of longer sequences than the self-test's has about as many positions as that had.
            rows = max(1, self._batch_size * self._seq_len // max(run.seq_len, self._seq_len))
            try:
                return run.distances(nonces, batch_size=rows)
            except OutOfMemoryError as error:
                if other.round is not None:  # the self-test, which showed that the size fits, was alone
                    other.end()
                    continue
                self._batch_size = smaller(self._batch_size, error, shrink=self._shrink)
                self._link.send(BatchSize(self._batch_size, str(error)))


def begin(prepared: Prepared, round_: Round, *, other: Prepared) -> BlockRun:
    """Prepare a round, in place of the `other` where there is no memory for both."""
    try:
        return prepared.begin(round_)
    except RuntimeError as error:
        if other.round is None or not is_out_of_memory(error):
            raise
    other.end()
    return prepared.begin(round_)


def smaller(batch_size: int, error: OutOfMemoryError, *, shrink: bool) -> int:
    """Return the batch size to try after `error`.

    Raises:
        ComputeError: There is none: the size was configured, or one nonce does not fit.
    """
    if not shrink:
        raise ComputeError(f"{error}: lower worker.batch_size, or set it to 'auto'") from error
    if batch_size == 1:
        raise ComputeError(
            "not even one nonce fits into the memory: use a smaller model, dtype or round.seq_len"
        ) from error
    torch.cuda.empty_cache()  # does nothing without a GPU
    return batch_size // 2


def fitting_batch_size(model: Model, load: Load) -> int:
    """Run the self-test with the batch size of `load`, or the largest of its halves that fits.

    Raises:
        ComputeError: The self-test failed, or none fits.
    """
    batch_size = load.batch_size
    while True:
        try:
            self_test(model, load, batch_size)
        except OutOfMemoryError as error:
            batch_size = smaller(batch_size, error, shrink=load.shrink)
        else:
            return batch_size


def self_test(model: Model, load: Load, batch_size: int) -> None:
    """Run the model once in the shape that will be used, and check that it answers the same twice.

    Raises:
        NonFiniteError: It gave NaN or infinity.
        OutOfMemoryError: The batch does not fit.
        ComputeError: Two answers to one nonce differ.
    """
    scheme = SCHEMES[load.scheme]
    with block_run(model, scheme, block_hash="self-test", public_key="self-test", seq_len=load.seq_len) as run:
        together = run.distances(range(batch_size), batch_size=batch_size)
        alone = run.distances([batch_size - 1], batch_size=batch_size)
    if abs(together[-1] - alone[0]) > default_tolerance(load.dtype, scheme, model.hidden_size):
        raise ComputeError(
            f"the self-test of {load.model!r} failed: nonce {batch_size - 1} has distance {together[-1]} "
            f"in a batch and {alone[0]} alone; the device computes wrongly"
        )


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
