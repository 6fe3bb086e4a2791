"""Frames of messages between daemon and worker: a length (4 bytes, big-endian) and that many bytes of JSON."""

from __future__ import annotations

import struct
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

import orjson

from pocd.protocol.conditioning import Conditioning
from pocd.protocol.proof import Round
from pocd.worker.messages import Compute, Gone, Load, Message, Placed, Ready, Recompute

if TYPE_CHECKING:
    import asyncio
    from typing import BinaryIO

LARGEST_FRAME = 16 * 2**20  # bytes
_LENGTH = struct.Struct(">I")
_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message) -> bytes:
    """Return the frame of `message`."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}  # not copied as `asdict` does
    body = orjson.dumps({"type": type(message).__name__, **values})
    assert len(body) <= LARGEST_FRAME, f"frame of {len(body)} bytes"
    return _LENGTH.pack(len(body)) + body


def _decode(body: bytes) -> Message:
    fields = orjson.loads(body)
    kind = _TYPES[fields.pop("type")]
    if kind in {Compute, Recompute}:
        fields["round"] = Round(**fields["round"])
    if kind is Ready and fields["conditioning"] is not None:
        fields["conditioning"] = Conditioning(**fields["conditioning"])
    if kind is Load:
        fields |= {name: tuple(fields[name]) for name in ("devices", "cards")}
    if kind is Placed:
        fields["cards"] = tuple(fields["cards"])
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
    return decode_frame(await receive_frame(stream))


async def receive_frame(stream: asyncio.StreamReader) -> bytes:
    """Read one whole frame.

    Raises:
        asyncio.IncompleteReadError: The other side is gone.
    """
    header = await stream.readexactly(_LENGTH.size)
    return header + await stream.readexactly(_length(header))


def decode_frame(frame: bytes) -> Message:
    """Return the message in a whole frame."""
    return _decode(frame[_LENGTH.size :])


def find_gone(rest: bytes) -> Gone | None:
    """Return the Gone that ends the rest of a stream, which may begin in the middle of a frame; None without one."""
    start = rest.rfind(b'{"type":"Gone"')  # inside any other message the quotes would be escaped
    message = _decode(rest[start:]) if start >= 0 else None
    assert message is None or isinstance(message, Gone), f"unexpected {message}"
    return message
