from __future__ import annotations

import asyncio
import io

import pytest

from pocd.protocol.conditioning import Conditioning
from pocd.protocol.proof import Round
from pocd.worker import frames
from pocd.worker.messages import (
    BatchShrunk,
    Cancel,
    Cancelled,
    CardIdentity,
    Compared,
    Compute,
    Distances,
    Failed,
    Heartbeat,
    Load,
    Message,
    Ready,
    Recompute,
    Refused,
    RoundBegun,
    Stage,
    Vectors,
)

ROUND = Round("AB", 7, "key", 1.4042, "poc2", "bundled:tiny-qwen3", 64)
EVERY: list[Message] = [
    Load("m", "float32", ("cpu",), "poc2", 64, 8),
    Compute(3, ROUND, [2**63 - 4, 2**63 - 1]),
    Recompute(4, ROUND, [5], last=True, with_reference=True),
    Cancel([9, 11]),
    Load("m", "float16", ("cuda:0", "cuda:1"), "trained", 64, 8, is_auto=True, revision="v1", rank=1, rendezvous="/x"),
    Stage("loading m"),
    CardIdentity("NVIDIA X", "GPU-f00d"),
    Ready("m", "f00d", "float32", "cpu", 128, 4, "flat", "it agrees", "eager", "asked", 1.5, 0.0, 8, 4096, "2.13.0"),
    Ready(
        *("m", "f00d", "float32", "cpu", 128, 4, "flat", "it agrees", "eager", "asked", 1.5, 0.0, 8, 4096, "2.13.0"),
        conditioning=Conditioning(0.25, None, 0.5),
    ),
    Failed("device", "no GPU — \n none"),
    RoundBegun("id", 0.1, "eager", "asked"),
    Distances(3, [1.4042000770568848, 0.0, 2.0]),
    Vectors(4, "PAAA" * 8),
    Distances(4, [1.25, 1.5], [0.0, 0.75]),
    Compared(5, [[1.4], [1.5]], [[1.25], [1.5]], [1e-6, 0.0]),
    Compared(6, [[1.4]], [[1.25]], [1e-6], [1e-300]),
    Refused(5, "NaN in layer 3"),
    BatchShrunk(4, "memory is short"),
    Cancelled(4),
    Heartbeat(),
]


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
async def test_each_message_arrives_as_it_was_sent_on_both_sides(message: Message) -> None:
    frame = frames.encode(message)
    assert frames.read(io.BytesIO(frame)) == message
    stream = asyncio.StreamReader()
    stream.feed_data(frame)
    assert await frames.receive(stream) == message


def test_messages_follow_one_another() -> None:
    stream = io.BytesIO(b"".join(map(frames.encode, EVERY)))
    assert [frames.read(stream) for _ in EVERY] == EVERY
    assert frames.read(stream) is None


@pytest.mark.parametrize("kept", [0, 2, 4])
def test_the_end_of_the_other_side_is_no_message(kept: int) -> None:
    assert frames.read(io.BytesIO(frames.encode(Cancel([1]))[:kept])) is None


def test_a_frame_that_claims_to_be_huge_is_refused() -> None:
    with pytest.raises(AssertionError, match="frame of 4294967295 bytes"):
        frames.read(io.BytesIO(b"\xff\xff\xff\xff"))
