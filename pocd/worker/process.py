"""The worker process: owns one device, and turns nonces into distances until its daemon is gone.

Three threads: the main one computes; a reader takes messages and notices the end of the daemon,
which ends this process even when the main thread hangs in a kernel; a third one sends heartbeats.

A model that is split over several devices has one such process for each of them, a rank. Rank 0 leads: it gets the
daemon's messages, and passes each on before it acts on it, so that all ranks do the same in the same order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from pocd.compute.memory import is_out_of_memory
from pocd.compute.model import load_model, longest_seq_len, pick_device
from pocd.compute.ranks import check_alike, joined
from pocd.protocol.errors import (
    CaptureError,
    ComputeError,
    DeviceError,
    InputError,
    MemoryShortError,
    ModelAwayError,
    NonFiniteError,
)
from pocd.protocol.schemes import SCHEMES
from pocd.worker import frames, messages
from pocd.worker.computer import DistanceComputer, result
from pocd.worker.messages import (
    Cancel,
    Cancelled,
    CardIdentity,
    Compute,
    Failed,
    Heartbeat,
    Load,
    Ready,
    Recompute,
    Refused,
    Stage,
)
from pocd.worker.self_test import check_known, check_rounding, fit, read_known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pocd.compute.model import Model
    from pocd.worker.computer import Results

HEARTBEAT_SECONDS = 2.0
NICENESS = 5  # on the CPU the daemon goes first: its answers are short, a batch is long
MEMORY_SHARE = 0.95  # of a card's memory, for torch's own allocator
AT_ONCE = 2  # batches that a GPU is given: it goes on with the next while results are read


class Inbox:
    """The daemon's requests that are neither begun nor cancelled; filled by one thread, emptied by another.

    The daemon keeps the inbox short: it has one Recompute and a few Computes under way.
    """

    def __init__(self) -> None:
        self._waiting: deque[Compute | Recompute] = deque()
        self._urgent: deque[Compute | Recompute] = deque()
        self._cancelled: deque[int] = deque()
        self._changed = threading.Condition()

    def put(self, message: messages.Message) -> None:
        """Queue a Compute or a Recompute, or apply a Cancel to those that are queued."""
        with self._changed:
            if isinstance(message, Cancel):
                self._take_out(set(message.ids))
            elif isinstance(message, Recompute):
                self._urgent.append(message)
            else:
                assert isinstance(message, Compute), f"expected Compute, got {message}"
                self._waiting.append(message)
            self._changed.notify()

    def _take_out(self, ids: set[int]) -> None:
        for queue in (self._urgent, self._waiting):
            for message in [each for each in queue if each.id in ids]:
                queue.remove(message)
                self._cancelled.append(message.id)

    def get(self, report: Callable[[Cancelled], None]) -> Compute | Recompute:
        """Wait for the next Recompute or Compute; one that was cancelled is passed to `report` instead."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent or self._waiting or self._cancelled)
            message = self.get_nowait(report)
            if message is not None:
                return message

    def get_nowait(self, report: Callable[[Cancelled], None]) -> Compute | Recompute | None:
        """Return the next Recompute or Compute, or None where there is none; see `get`."""
        with self._changed:
            cancelled, queue = list(self._cancelled), self._urgent or self._waiting
            self._cancelled.clear()
            message = queue.popleft() if queue else None
        for number in cancelled:
            report(Cancelled(number))
        return message


class DaemonLink:
    """The socket to the daemon, shared by the threads."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._stream = self._socket.makefile("rb")
        self._sending = threading.Lock()
        self.inbox = Inbox()

    def send(self, message: messages.Message) -> None:
        """Send one message, whole."""
        with self._sending:
            self._socket.sendall(frames.encode(message))

    def read_load(self) -> Load:
        """Read the first message, which says what to load."""
        first = frames.read(self._stream)
        if first is None:
            sys.exit(0)
        assert isinstance(first, Load), f"expected Load, got {first}"
        return first

    def start(self) -> None:
        """Start the threads that read messages and send heartbeats."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _read(self) -> None:
        # A daemon that is killed with messages of ours unread resets the connection.
        with contextlib.suppress(ConnectionResetError):
            while (message := frames.read(self._stream)) is not None:
                self.inbox.put(message)
        os._exit(0)  # the daemon is gone: nobody wants what is being computed

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(HEARTBEAT_SECONDS):
            try:
                self.send(Heartbeat())
            except OSError:
                return  # the reader ends the process


def take_card(load: Load) -> CardIdentity:
    """Make the card of this rank the process's device, and return its identity."""
    try:
        device = pick_device(load.own_device)
    except DeviceError as error:
        if not load.cards:
            raise
        shown = ",".join(load.cards)
        raise DeviceError(f"device {load.device!r} is not there (CUDA_VISIBLE_DEVICES={shown}): {error}") from error
    torch.cuda.set_device(device)  # else pinned memory would take some of the first card's
    # What torch does not know of takes memory as well: cuBLAS, the driver, graphs.
    torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, device)
    card, name = torch.cuda.get_device_properties(device), load.cards[load.own_card] if load.cards else ""
    return CardIdentity(card.name, name if name.startswith("MIG-") else f"GPU-{card.uuid}")


def prepare(link: DaemonLink, load: Load) -> tuple[Model, int]:
    """Load the model and test it, and report that it is ready, as the leading rank; returns model and batch size."""
    tempfile.gettempdir()  # torch needs one; a full disk has none: a crash, to be tried again, not the model's fault
    if load.device != "cpu":
        link.send(take_card(load))
    link.send(Stage("computing known distances"))
    check_known(load_model(read_known()["model"], dtype=load.dtype, device=load.own_device), load)
    link.send(Stage(f"loading {load.model}"))
    began = time.monotonic()
    model = load_model(
        load.model,
        dtype=load.dtype,
        device=load.own_device,
        revision=load.revision,
        seq_len=load.seq_len,
        ranks=len(load.devices),
    )
    load_seconds = time.monotonic() - began
    if load.is_split:
        check_alike(load.model, model.fingerprint, load.place)
    link.send(Stage("measuring how far rounding decides its results"))
    conditioning = check_rounding(model, load)
    if conditioning is None:
        link.send(Stage("how far rounding decides its results cannot be measured, for lack of memory or for NaN"))
    link.send(Stage("testing it, and compiling it where that is asked for"))
    model, batch_size = fit(model, load)
    if load.rank == 0:
        link.send(
            Ready(
                model=load.model,
                fingerprint=model.fingerprint,
                dtype=load.dtype,
                device="+".join(load.devices),
                hidden_size=model.hidden_size,
                layers=model.layers,
                decoder=model.decoder.kind,
                decoder_reason=model.decoder_reason,
                execution=model.execution.path,
                execution_reason=model.execution.reason,
                load_seconds=load_seconds,
                compile_seconds=model.execution.seconds,
                batch_size=batch_size,
                longest_seq_len=longest_seq_len(model.causal.config),
                torch=torch.__version__,
                conditioning=conditioning,
            )
        )
    return model, batch_size


def lead(link: DaemonLink, load: Load, followers: list[socket.socket]) -> None:
    """Compute what the daemon asks for, as the leading rank, until that fails."""
    model, batch_size = prepare(link, load)
    computer = DistanceComputer(model, load, batch_size, link.send)
    # Ranks go in step, and drawn weights are gone with their round: there each batch is finished before the next.
    is_simple = not load.is_split and SCHEMES[load.scheme].weights == "trained"
    at_once = AT_ONCE if is_simple and model.device.type == "cuda" else 1
    under_way: deque[tuple[int, Callable[[], Results]]] = deque()
    while True:
        message = link.inbox.get_nowait(link.send) if under_way else link.inbox.get(link.send)
        if message is not None:
            for follower in followers:
                follower.sendall(frames.encode(message))
            with refusing(link, message.id):
                under_way.append((message.id, computer.start(message)))
        if under_way and (message is None or len(under_way) == at_once):
            number, wait = under_way.popleft()
            with refusing(link, number):
                link.send(result(number, wait()))


@contextlib.contextmanager
def refusing(link: DaemonLink, number: int) -> Iterator[None]:
    """Report that a message has no result if the model gives none."""
    try:
        yield
    except (NonFiniteError, InputError) as error:
        link.send(Refused(number, str(error)))


def follow(link: DaemonLink, load: Load, leader: socket.socket) -> None:
    """Do what the leading rank does until it is gone; the results are the same, and the leading rank reports them."""
    model, batch_size = prepare(link, load)
    computer = DistanceComputer(model, load, batch_size, lambda _: None)
    stream = leader.makefile("rb")
    while (message := frames.read(stream)) is not None:
        assert isinstance(message, Compute | Recompute), f"unexpected {message}"
        with contextlib.suppress(NonFiniteError, InputError):
            computer.start(message)()


def work(link: DaemonLink, load: Load, peers: list[socket.socket]) -> None:
    """Run the rank that `load` names, until it fails."""
    if load.device == "cpu":
        os.nice(NICENESS)
    listener = peers.pop() if load.rank == 0 and load.place and load.is_split else None
    group = (
        joined(load.rank, len(load.devices), load.rendezvous, load.own_device, listener) if load.rendezvous else None
    )
    with group or nullcontext():
        if load.rank == 0:
            lead(link, load, peers)
        else:
            follow(link, load, peers[0])


def main() -> None:
    """Run a worker process: `python -m pocd.worker FD [FD…]`.

    The first file descriptor is a socket to the daemon. The others are sockets to ranks: the leading rank has one to
    each of the others, and each of the others has one to the leading rank. In a cluster the leading rank has one more,
    on which it listens for the others to find it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides
    link = DaemonLink(int(sys.argv[1]))
    load = link.read_load()
    link.start()
    try:
        work(link, load, [socket.socket(fileno=int(fd)) for fd in sys.argv[2:]])
    except DeviceError as error:
        link.send(Failed("device", str(error)))
    except MemoryShortError as error:
        link.send(Failed("memory", str(error)))
    except CaptureError as error:
        link.send(Failed("capture", str(error)))
        os._exit(1)  # what the capture left behind may keep the interpreter from ending
    except ModelAwayError as error:
        link.send(Failed("crash", str(error)))
    except ComputeError as error:
        link.send(Failed("configuration", str(error)))
    except RuntimeError as error:  # torch's, of which only some have classes of their own
        traceback.print_exc()
        if is_out_of_memory(error):
            link.send(Failed("memory", f"a round does not fit into the memory of {load.device}: {first_line(error)}"))
        else:
            link.send(Failed("fault", f"{load.device} failed: {type(error).__name__}: {first_line(error)}"))
        os._exit(1)  # a device in this state may keep the interpreter from ending
    except Exception as error:
        with contextlib.suppress(OSError):  # the daemon itself may be what is gone
            link.send(Failed("crash", f"worker failed: {type(error).__name__}: {first_line(error)}"))
        raise


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without torch's advice on debugging."""
    return str(error).strip().partition("\n")[0]
