"""What daemon and worker say to each other: frames of a length (4 bytes, big-endian) and JSON."""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import orjson

from pocd.proof import Round

if TYPE_CHECKING:
    import asyncio
    from typing import BinaryIO

    from pocd.compute.names import Dtype

LARGEST_FRAME = 16 * 2**20  # bytes
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Load:
    """To the worker, first and once: load this model and test it in the shape that will be used.

    With `shrink` the batch size is halved until it fits into memory.
    """

    model: str
    dtype: Dtype
    device: str
    scheme: str
    seq_len: int
    batch_size: int
    shrink: bool = False
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Compute:
    """To the worker: compute distances of the nonces first, first + step, … (`count` of them)."""

    id: int
    round: Round
    first: int
    step: int
    count: int


@dataclass(frozen=True, slots=True)
class Recompute:
    """To the worker: compute distances of these nonces before any Compute that is not begun; `last` of this round."""

    id: int
    round: Round
    nonces: list[int]
    last: bool


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the worker: leave out every Compute up to this id that was not begun."""

    through: int


@dataclass(frozen=True, slots=True)
class Ready:
    """From the worker: the model is loaded and has answered its self-test.

    Attributes:
        fingerprint: Of the model's weights.
        decoder: "flat", or "layers" for a model that is run by transformers' own layers.
        batch_size: That fits into memory.
        longest_seq_len: That the model's positions allow.
    """

    model: str
    fingerprint: str
    dtype: str
    device: str
    hidden_size: int
    layers: int
    decoder: str
    batch_size: int
    longest_seq_len: int
    torch: str


@dataclass(frozen=True, slots=True)
class Failed:
    """From the worker, last: why it ends. `kind` is configuration or device."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class RoundBegun:
    """From the worker: it works on this round now, and theory expects this share of valid nonces."""

    round_id: str
    expected_valid_rate: float


@dataclass(frozen=True, slots=True)
class Distances:
    """From the worker: the result of a Compute or a Recompute, in the order of its nonces."""

    id: int
    distances: list[float]


@dataclass(frozen=True, slots=True)
class Refused:
    """From the worker: a Compute or a Recompute has no result: the model gave NaN or infinity, or cannot take it."""

    id: int
    reason: str


@dataclass(frozen=True, slots=True)
class BatchSize:
    """From the worker: memory has become short, and batches are of this size from now on."""

    size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """From the worker: a Compute was left out."""

    id: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """From the worker, every two seconds: its process runs."""


Message = (
    Load
    | Compute
    | Recompute
    | Cancel
    | Ready
    | Failed
    | RoundBegun
    | Distances
    | Refused
    | BatchSize
    | Cancelled
    | Heartbeat
)

_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message) -> bytes:
    """Return the frame of `message`."""
    body = orjson.dumps({"type": type(message).__name__, **asdict(message)})
    assert len(body) <= LARGEST_FRAME, f"frame of {len(body)} bytes"
    return _LENGTH.pack(len(body)) + body


def _decode(body: bytes) -> Message:
    fields = orjson.loads(body)
    kind = _TYPES[fields.pop("type")]
    if kind in {Compute, Recompute}:
        fields["round"] = Round(**fields["round"])
    message: Message = kind(**fields)
    return message


def _length(header: bytes) -> int:
    (length,) = _LENGTH.unpack(header)
    assert isinstance(length, int)
    assert length <= LARGEST_FRAME, f"frame of {length} bytes"
    return length


def read(stream: BinaryIO) -> Message | None:
    """Read one message, blocking; None when the other side is gone."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    body = stream.read(_length(header))
    return _decode(body) if body else None


async def receive(stream: asyncio.StreamReader) -> Message:
    """Read one message.

    Raises:
        asyncio.IncompleteReadError: The other side is gone.
    """
    return _decode(await stream.readexactly(_length(await stream.readexactly(_LENGTH.size))))
