"""The messages between daemon and worker; `pocd.worker.frames` carries them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pocd.protocol.conditioning import Conditioning
    from pocd.protocol.names import Compile, Dtype, OnRounding
    from pocd.protocol.proof import Round

FailureKind = Literal["configuration", "device", "memory", "fault", "capture", "crash"]


@dataclass(frozen=True, slots=True)
class Load:
    """To the worker, first and once: load this model and test it in the shape that will be used.

    Attributes:
        model: Name of the model: a folder, or one of a hub.
        dtype: The number format of the model's weights.
        devices: The devices of the worker, one for each of its ranks.
        scheme: Name of the scheme that is mined.
        seq_len: Length of a sequence, in tokens.
        batch_size: Nonces per batch; where `is_auto` is set, at most.
        is_auto: Whether the worker finds the batch size, by time and memory.
        revision: The model's revision on its hub; None for the newest.
        compile: Whether the model is compiled: "auto", "always" or "never".
        conditioning: What follows where rounding decides too much: "warn" or "refuse".
        capture: Whether what was compiled is captured as a CUDA graph; a life in which that failed is the last to try.
        cards: The names by which CUDA is shown the cards of `devices` alone, or in a cluster the card of this rank
            alone; empty on the CPU.
        rank: Which of the worker's processes the receiver is; rank 0 leads.
        rendezvous: Where the ranks of a split model find one another, see `pocd.compute.ranks.joined`.
        place: The machine of a cluster that the receiver runs on, for people; empty on the daemon's own.
    """

    model: str
    dtype: Dtype
    devices: tuple[str, ...]
    scheme: str
    seq_len: int
    batch_size: int
    is_auto: bool = False
    revision: str | None = None
    compile: Compile = "auto"
    conditioning: OnRounding = "warn"
    capture: bool = True
    cards: tuple[str, ...] = ()
    rank: int = 0
    rendezvous: str | None = None
    place: str = ""

    @property
    def device(self) -> str:
        """The device of this rank."""
        return self.devices[self.rank]

    @property
    def own_device(self) -> str:
        """The device of this rank as its own process names it: that sees no cards but `cards`."""
        return f"cuda:{self.own_card}" if self.cards else self.device

    @property
    def own_card(self) -> int:
        """Which of `cards` is this rank's."""
        return min(self.rank, len(self.cards) - 1)

    @property
    def is_split(self) -> bool:
        """Whether several ranks run the model together."""
        return len(self.devices) > 1


@dataclass(frozen=True, slots=True)
class Compute:
    """To the worker: compute the distances of these nonces of the round that is mined."""

    id: int
    round: Round
    nonces: list[int]


@dataclass(frozen=True, slots=True)
class Recompute:
    """To the worker: compute the results of these nonces, before any Compute that is not begun.

    Attributes:
        last: Whether no Recompute of the same round follows.
        with_reference: Whether float32 arithmetic computes them too: the answer is then a Compared.
    """

    id: int
    round: Round
    nonces: list[int]
    last: bool
    with_reference: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the worker: leave out those of these messages that are not begun, each a Compute or a Recompute."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class Ready:
    """From the worker: the model is loaded and has answered its self-test.

    Attributes:
        model: Name of the model, as it was asked for.
        fingerprint: Hash of the model's weights.
        dtype: The number format of the model's weights.
        device: The devices of all ranks, joined by "+".
        hidden_size: Length of the model's hidden states.
        layers: How many layers the model has.
        decoder: How the model's layers are run: "flat" by our own code, "layers" by that of transformers.
        decoder_reason: Why they are run so.
        execution: How a batch is run: "eager", "compiled" or "captured".
        execution_reason: Why a batch is run so.
        load_seconds: How long it took to load the model.
        compile_seconds: How long it took to compile the model.
        batch_size: Nonces per batch, as configured or found.
        longest_seq_len: The longest sequence that the model's positions allow, in tokens.
        torch: Version of torch.
        conditioning: How far rounding decides the results; None where it cannot be measured.
    """

    model: str
    fingerprint: str
    dtype: str
    device: str
    hidden_size: int
    layers: int
    decoder: str
    decoder_reason: str
    execution: str
    execution_reason: str
    load_seconds: float
    compile_seconds: float
    batch_size: int
    longest_seq_len: int
    torch: str
    conditioning: Conditioning | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """From the worker, before it is ready: what it does now, in a few words for people."""

    text: str


@dataclass(frozen=True, slots=True)
class CardIdentity:
    """From a rank on a GPU, before it is ready: the card's name, and its UUID as the driver knows it."""

    name: str
    uuid: str


@dataclass(frozen=True, slots=True)
class Failed:
    """From the worker, last: why it ends.

    Attributes:
        kind: "configuration": the worker cannot work as configured. "device": its device is not there. "memory": a
            batch does not fit into the device's memory. "fault": the device, its driver or another rank failed.
            "capture": a batch could not be captured as a CUDA graph, which the next process is to leave out. "crash":
            something else did, such as a file that could not be made, which may pass.
        message: The reason, for people.
    """

    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class RoundBegun:
    """From the worker: it works on this round now.

    Attributes:
        expected_valid_rate: The share of valid nonces that theory expects of the round.
        execution: How the round's batches are run, as in `Ready`; a round in a shape of its own may run in another way.
        execution_reason: Why the round's batches are run so.
    """

    round_id: str
    expected_valid_rate: float
    execution: str
    execution_reason: str


@dataclass(frozen=True, slots=True)
class Distances:
    """From the worker: the result of a Compute or a Recompute, in the order of its nonces.

    Attributes:
        turned: Probability, by nonce, that a router chooses otherwise on another honest host; None where there are no
            routers, and of a Compute.
    """

    id: int
    distances: list[float]
    turned: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Vectors:
    """From the worker: the result of a Compute or a Recompute of a scheme of vectors.

    Attributes:
        vectors: All vectors in the order of the nonces, one after the other, as `pocd.protocol.vectors` encodes them.
    """

    id: int
    vectors: str


@dataclass(frozen=True, slots=True)
class Compared:
    """From the worker: the result of a Recompute with a reference, in the order of its nonces.

    Attributes:
        own: Numbers of each nonce as a miner computes them: one distance, or those of a vector.
        reference: Numbers of each nonce in float32 arithmetic on the same rounded weights.
        errors: Expected squared error of a number of `own`, by nonce.
        turned: Probability, by nonce, that a router chooses otherwise; None without routers, and for vectors.
    """

    id: int
    own: list[list[float]]
    reference: list[list[float]]
    errors: list[float]
    turned: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """From the worker: a Compute or a Recompute has no result: the model gave NaN or infinity, or cannot take it."""

    id: int
    reason: str


@dataclass(frozen=True, slots=True)
class BatchShrunk:
    """From the worker: memory has become short, and batches are of `size` nonces from now on."""

    size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """From the worker: a Compute or a Recompute was left out."""

    id: int


@dataclass(frozen=True, slots=True)
class Placed:
    """From the bridge to a cluster, before the worker's own messages: where the worker's process runs.

    Attributes:
        node: The machine's name in the cluster.
        address: The machine's address in the cluster.
        pid: The process's id on that machine.
        cards: The names by which CUDA is shown the cards that the cluster gave the worker; empty on the CPU.
        versions: Versions of pocd, Python and torch on that machine.
        rendezvous: HOST:PORT where the ranks of a split model find one another; empty but for the leading one.
    """

    node: str
    address: str
    pid: int
    cards: tuple[str, ...]
    versions: dict[str, str]
    rendezvous: str = ""


@dataclass(frozen=True, slots=True)
class Gone:
    """From the bridge to a cluster, last: the worker's process ended, or the cluster lost it.

    Attributes:
        is_lost: Whether the cluster lost it, or could not start it.
        message: How, for people.
        is_killed: Whether a signal ended it that came from neither daemon nor bridge.
    """

    is_lost: bool
    message: str
    is_killed: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """From the bridge to a cluster, every few seconds and not on a worker's socket: what the cluster has.

    Attributes:
        workers: How many workers its machines have room for.
        machines: How many machines it has.
        problem: Why that may be out of date; empty where it is not.
        ranks: How many ranks they have room for; a worker has several where its model is split.
    """

    workers: int
    machines: int
    problem: str
    ranks: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """From the worker, every two seconds: its process runs."""


Message = (
    Load
    | Compute
    | Recompute
    | Cancel
    | Stage
    | CardIdentity
    | Ready
    | Failed
    | RoundBegun
    | Distances
    | Vectors
    | Compared
    | Refused
    | BatchShrunk
    | Cancelled
    | Placed
    | Gone
    | Room
    | Heartbeat
)
