"""`pocd compute`: distances by the command line, so that anyone can recompute a proof."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocd.compute.errors import InputError
from pocd.compute.names import check_device, check_dtype, resolve
from pocd.compute.schemes import SCHEMES
from pocd.nonces import LARGEST_NONCE

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Request:
    """What to compute. `nonces` are ranges, which do not overlap."""

    model: str
    scheme: str
    block_hash: str
    public_key: str
    nonces: tuple[range, ...]
    seq_len: int
    dtype: str
    device: str
    batch_size: int


def parse_nonces(text: str) -> tuple[range, ...]:
    """Parse ranges `a:b` (b left out) and single numbers, separated by commas.

    Raises:
        InputError: Not of that form, empty, out of range, or a nonce is named twice.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?::(\d+))?\s*", part, flags=re.ASCII)
        if not match:
            raise InputError(f"nonces: {part.strip()!r} is neither a number nor a range a:b")
        start = int(match[1])
        stop = start + 1 if match[2] is None else int(match[2])
        if stop <= start:
            raise InputError(f"nonces: the range {part.strip()} is empty")
        if stop - 1 > LARGEST_NONCE:
            raise InputError(f"nonces: {part.strip()} goes beyond 2**63 - 1")
        ranges.append(range(start, stop))
    ordered = sorted(ranges, key=lambda r: r.start)
    for before, after in itertools.pairwise(ordered):
        if after.start < before.stop:
            raise InputError(f"nonces: {after.start} is named twice")
    return tuple(ranges)


def distances(request: Request) -> Iterator[tuple[int, float]]:
    """Yield (nonce, distance) in the order asked for.

    Raises:
        ComputeError: The input, the model or the device cannot be used.
    """
    if request.scheme not in SCHEMES:
        raise InputError(f"scheme {request.scheme!r} is unknown; allowed are: {', '.join(SCHEMES)}")
    check_dtype(request.dtype)
    check_device(request.device)
    resolve(request.model)
    from pocd.compute.engine import block_run
    from pocd.compute.model import load_model

    model = load_model(request.model, dtype=request.dtype, device=request.device)
    preparation = block_run(
        model,
        SCHEMES[request.scheme],
        block_hash=request.block_hash,
        public_key=request.public_key,
        seq_len=request.seq_len,
    )
    with preparation as run:
        nonces = itertools.chain.from_iterable(request.nonces)
        while batch := list(itertools.islice(nonces, request.batch_size)):
            yield from zip(batch, run.distances(batch, batch_size=request.batch_size), strict=True)
