"""`pocd compute`, `calibrate` and `audit`: the engine on the command line, so that anyone can recompute a proof."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pocd.lab.audit import Attack, Attacks, check_audit
from pocd.lab.calibration import Measurement, Plan, block_hashes, check_plan
from pocd.lab.residual import check_claims
from pocd.lab.statistics import head_valid_rate
from pocd.process import WAITING, importing
from pocd.protocol.errors import InputError
from pocd.protocol.names import check_device, check_dtype, resolve
from pocd.protocol.nonces import LARGEST_NONCE
from pocd.protocol.schemes import DISTANCE_SCHEMES, SCHEMES
from pocd.protocol.theory import r_target_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pocd.compute.engine import BlockRun
    from pocd.compute.model import Model
    from pocd.lab.cheap import Measured
    from pocd.lab.shortcuts import Prepared
    from pocd.protocol.schemes import Output

HEAD_ROWS = 4096  # of the head that are in float32 at a time


@dataclass(frozen=True, slots=True)
class ComputeRequest:
    """Model, scheme, block and device of a computation; `revision` is a hub model's branch, tag or commit."""

    model: str
    scheme: str
    block_hash: str
    public_key: str
    seq_len: int
    dtype: str
    device: str
    batch_size: int
    revision: str | None = None


def parse_nonces(text: str) -> Iterator[int]:
    """Parse ranges `a:b` (b left out) and single numbers, separated by commas; gives every nonce once.

    Raises:
        InputError: The text has another form, is empty or out of range, or names a nonce twice.
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
    return itertools.chain.from_iterable(ranges)


def _check_names(asked: ComputeRequest | Plan, output: Output | None) -> None:
    """Refuse unknown names, and other outputs if one is given, before torch is imported, which takes seconds."""
    if asked.scheme not in SCHEMES:
        raise InputError(f"scheme {asked.scheme!r} is unknown; allowed are: {', '.join(SCHEMES)}")
    if output is not None and SCHEMES[asked.scheme].output != output:
        raise InputError(
            f"scheme {asked.scheme!r} gives vectors, all of which count: there are no distances, and no r_target; "
            f"allowed are: {', '.join(DISTANCE_SCHEMES)}"
        )
    check_dtype(asked.dtype)
    check_device(asked.device)
    resolve(asked.model, asked.revision)
    os.environ.update(WAITING | os.environ)


@contextlib.contextmanager
def prepared(request: ComputeRequest, output: Output | None = None) -> Iterator[BlockRun]:
    """Load the model and prepare it for the block, while the context lasts; the scheme has to have the output, if any.

    Raises:
        ComputeError: The input, the model or the device cannot be used.
    """
    _check_names(request, output)
    with importing():
        from pocd.compute.engine import block_run
        from pocd.compute.model import load_model

    model = load_model(
        request.model,
        dtype=request.dtype,
        device=request.device,
        revision=request.revision,
        seq_len=request.seq_len,
    )
    with block_run(
        model,
        SCHEMES[request.scheme],
        block_hash=request.block_hash,
        public_key=request.public_key,
        seq_len=request.seq_len,
    ) as run:
        yield run


def distances(request: ComputeRequest, nonces: Iterable[int]) -> Iterator[tuple[int, float]]:
    """Yield (nonce, distance) in the order of `nonces`, which are distinct.

    Raises:
        ComputeError: The input, the model or the device cannot be used, or a nonce has no distance.
    """
    with prepared(request, "distance") as run:
        for batch in _batches(nonces, request):
            yield from zip(batch, run.distances(batch, batch_size=request.batch_size), strict=True)


def vectors(request: ComputeRequest, nonces: Iterable[int]) -> Iterator[tuple[int, list[float]]]:
    """Yield (nonce, vector) in the order of `nonces`, which are distinct.

    Raises:
        ComputeError: The input, the model or the device cannot be used, or a nonce has no vector.
    """
    with prepared(request, "vector") as run:
        for batch in _batches(nonces, request):
            yield from zip(batch, run.values(batch, batch_size=request.batch_size).tolist(), strict=True)


def compared(
    run: BlockRun, nonces: Sequence[int], batch_size: int
) -> tuple[dict[int, list[float]], dict[int, list[float]], dict[int, float]]:
    """Return, by nonce, its numbers, those of the reference in float32 arithmetic, and their expected squared error.

    Raises:
        ComputeError: A nonce has no result, or a batch does not fit into memory.
    """
    from pocd.compute.reference import compare

    found = compare(run, nonces, batch_size=batch_size)
    own, reference = (each.view(len(nonces), -1).tolist() for each in (found.own, found.reference))
    errors = dict(zip(nonces, found.errors.tolist(), strict=True))
    return dict(zip(nonces, own, strict=True)), dict(zip(nonces, reference, strict=True)), errors


def chances(run: BlockRun, nonces: Sequence[int], batch_size: int) -> dict[int, float] | None:
    """Return how probable it is, by nonce, that a router of a mixture chooses otherwise on another honest host.

    None where the scheme gives vectors, or the model has no routers.

    Raises:
        ComputeError: A batch does not fit into memory.
    """
    from pocd.compute.margins import measure_chances

    found = None if run.scheme.output == "vector" else measure_chances(run, nonces, batch_size=batch_size)
    return None if found is None else dict(zip(nonces, found.tolist(), strict=True))


def _batches(nonces: Iterable[int], request: ComputeRequest) -> Iterator[list[int]]:
    left = iter(nonces)
    while batch := list(itertools.islice(left, request.batch_size)):
        yield batch


def measure(plan: Plan, advance: Callable[[int], None]) -> Measurement:
    """Run the engine on every block of `plan`.

    Args:
        plan: Plan of the calibration.
        advance: Called with the number of nonces just done.

    Raises:
        ComputeError: The plan, the model or the device cannot be used.
    """
    check_plan(plan)
    _check_names(plan, "distance")
    with importing():
        from pocd.compute.model import load_model

    model = load_model(plan.model, dtype=plan.dtype, device=plan.device, revision=plan.revision, seq_len=plan.seq_len)
    parts = [_measure_block(model, plan, block_hash, advance) for block_hash in block_hashes(plan.seed, plan.blocks)]
    dimensions, rates, distances = zip(*parts, strict=True)
    head_rates = None if rates[0] is None else rates
    return Measurement(model.fingerprint, model.hidden_size, dimensions[0], np.array(distances), head_rates)


def _measure_block(
    model: Model, plan: Plan, block_hash: str, advance: Callable[[int], None]
) -> tuple[int, float | None, list[float]]:
    """Return D, the head's valid rate (None without a head) and the distances of one block."""
    from pocd.compute.engine import block_run

    found: list[float] = []
    preparation = block_run(
        model, SCHEMES[plan.scheme], block_hash=block_hash, public_key=plan.public_key, seq_len=plan.seq_len
    )
    with preparation as run:
        for start in range(0, plan.nonces, plan.batch_size):
            batch = range(start, min(start + plan.batch_size, plan.nonces))
            found += run.distances(batch, batch_size=plan.batch_size)
            advance(len(batch))
        return run.dimension, _head_rate(run, plan.rate), found


def _head_rate(run: BlockRun, rate: float) -> float | None:
    """Return the valid rate at the theoretical r_target that head and target give to uniform hidden states."""
    if run.head is None or run.target is None:
        return None
    size = run.model.hidden_size
    gram, aim = np.zeros((size, size)), np.zeros(size)
    # In parts, as a vocabulary's head may be too large for a second copy.
    for part, target in zip(run.head.split(HEAD_ROWS), run.target.split(HEAD_ROWS), strict=True):
        weight = part.float()
        gram += (weight.T @ weight).cpu().numpy()
        aim += (weight.T @ target).cpu().numpy()
    return head_valid_rate(r_target_for(rate, run.dimension), gram, aim)


def attack(plan: Plan, advance: Callable[[float], None]) -> Attacks:
    """Try every shortcut on every block of `plan`; the cheater is trained on the first half of a block's nonces.

    Args:
        plan: Plan of the audit.
        advance: Told how many nonces' worth of work has just been done.

    Raises:
        ComputeError: The plan, the model or the device cannot be used.
    """
    check_audit(plan)
    _check_names(plan, "distance")
    from pocd.lab import cheater

    model, runs = _blocks_of(plan)
    blocks = [
        cheater.attack(
            run,
            previous,
            range(plan.nonces),
            trained_on=plan.nonces // 2,
            batch_size=plan.batch_size,
            advance=advance,
        )
        for run, previous in runs
    ]
    attacks = [
        Attack(
            name=tried.name,
            cost=tried.cost,
            rest=tried.rest,
            predicted=np.array([block.predicted[i].distances for block in blocks]),
            claimed=np.array([block.predicted[i].own for block in blocks]) if tried.is_claimed else None,
        )
        for i, tried in enumerate(blocks[0].shortcuts)
    ]
    return Attacks(model.fingerprint, model.hidden_size, np.array([block.true for block in blocks]), attacks)


def measure_claims(plan: Plan, advance: Callable[[float], None]) -> list[Measured]:
    """Compute every block of `plan` in every cheap way, and compare the results with those of exact arithmetic.

    Args:
        plan: Plan of the audit.
        advance: Told how many nonces' worth of work has just been done.

    Raises:
        ComputeError: The plan, the model or the device cannot be used.
    """
    check_claims(plan)
    _check_names(plan, None)
    from pocd.lab import cheap

    _, runs = _blocks_of(plan)
    nonces = range(plan.nonces)
    return [cheap.measure(run, previous, nonces, batch_size=plan.batch_size, advance=advance) for run, previous in runs]


def _blocks_of(plan: Plan) -> tuple[Model, Iterator[tuple[BlockRun, Prepared]]]:
    """Return the model of an audit, and its blocks: each prepared, with what prepares the block before it."""
    with importing():
        from pocd.compute.engine import block_run
        from pocd.compute.model import load_model

    model = load_model(plan.model, dtype=plan.dtype, device=plan.device, revision=plan.revision, seq_len=plan.seq_len)

    def prepare(block_hash: str) -> contextlib.AbstractContextManager[BlockRun]:
        scheme = SCHEMES[plan.scheme]
        return block_run(model, scheme, block_hash=block_hash, public_key=plan.public_key, seq_len=plan.seq_len)

    def runs() -> Iterator[tuple[BlockRun, Prepared]]:
        # The first has a block before it, too.
        for before, block_hash in itertools.pairwise(block_hashes(plan.seed, plan.blocks + 1)):
            with prepare(block_hash) as run:
                yield run, functools.partial(prepare, before)

    return model, runs()
