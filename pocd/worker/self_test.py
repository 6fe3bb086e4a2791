"""The tests that a worker passes before it is ready: known results, rounding, and the model in its own shape."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import torch

from pocd.compute.compiled import compile_model
from pocd.compute.conditioning import measure_conditioning
from pocd.compute.engine import block_run
from pocd.compute.ranks import largest
from pocd.protocol.errors import ComputeError, DeviceError, MemoryShortError, OutOfMemoryError
from pocd.protocol.names import default_tolerance
from pocd.protocol.schemes import SCHEMES
from pocd.worker.batch_size import Trial, find_batch_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.compute.engine import BlockRun
    from pocd.compute.model import Model
    from pocd.protocol.conditioning import Conditioning
    from pocd.worker.messages import Load

NOT_ONE = "not even one nonce fits into the memory: use a smaller model, dtype or round.seq_len"
MEASURED_TOGETHER = 4  # nonces per batch, few, as one that gives NaN takes its neighbours along
KNOWN = Path(__file__).parent / "known_distances.json"  # written by scripts/tools/known_distances.py


def read_known() -> dict[str, Any]:
    """Return the known distances, with the model, the round and the nonces that they belong to."""
    known: dict[str, Any] = orjson.loads(KNOWN.read_bytes())
    return known


def check_known(model: Model, load: Load) -> None:
    """Compare the bundled model's distances on this device with the known ones.

    Args:
        model: The bundled model of the known distances, loaded as the configured model will be.
        load: What the worker is to load; its scheme and dtype are tested.

    Raises:
        DeviceError: The distances differ by more than two honest ones may.
    """
    known = read_known()
    nonces: Sequence[int] = known["schemes"][load.scheme]["nonces"]
    scheme = SCHEMES[load.scheme]
    expected = torch.tensor(known["schemes"][load.scheme][f"{scheme.output}s"][load.dtype])
    run = {key: known[key] for key in ("block_hash", "public_key", "seq_len")}
    if not load.is_split:  # a split model runs by transformers' layers, which are not compiled
        model = compiled(model, load, seq_len=known["seq_len"], batch_size=len(nonces))
    with block_run(model, scheme, **run) as prepared:
        found = prepared.values(nonces, batch_size=len(nonces))
    difference = float((found - expected).abs().max())
    tolerance = default_tolerance(load.dtype, scheme, model.hidden_size)
    if not difference <= tolerance:
        raise DeviceError(
            f"the self-test failed: {known['model']} gives {scheme.output}s on {load.device} in {load.dtype} that are "
            f"{difference:.2g} from the known ones, and {tolerance:.2g} is allowed; the device, its driver or this "
            "torch computes wrongly, and proofs would be refused: use another one, or set worker.compile = 'never'"
        )


def compiled(model: Model, load: Load, *, seq_len: int, batch_size: int) -> Model:
    """Return the model, compiled for a shape if `load` asks for it and it is possible (see `Model.execution`).

    Raises:
        ComputeError: The model has to be compiled, and cannot be.
    """
    shape = {"seq_len": seq_len, "batch_size": batch_size}
    return compile_model(model, load.compile, scheme=SCHEMES[load.scheme], capture=load.capture, **shape)


def check_rounding(model: Model, load: Load) -> Conditioning | None:
    """Measure how far rounding decides the results of the model in its scheme and dtype.

    Returns:
        The measurement; None where there is no memory for it, or the model gives NaN or infinity for most nonces.

    Raises:
        ComputeError: Rounding decides too much, and `load` wants that refused.
    """
    found, rows = None, min(load.batch_size, MEASURED_TOGETHER)
    with block_run(
        model, SCHEMES[load.scheme], block_hash="rounding", public_key="rounding", seq_len=load.seq_len
    ) as run:
        while rows:
            try:
                found = measure_conditioning(run, batch_size=rows)
                break
            except OutOfMemoryError:
                rows //= 2
    if found is not None and found.alarm is not None and load.conditioning == "refuse":
        raise ComputeError(f"{found.alarm}; or set worker.conditioning = 'warn'")
    return found


def check_shape(run: BlockRun, load: Load, batch_size: int) -> float:
    """Compute batches of a size, check that one nonce has the same distance in both, and return the second one's time.

    Raises:
        NonFiniteError: The model gave NaN or infinity.
        OutOfMemoryError: The batch does not fit into memory.
        ComputeError: Two answers to one nonce differ.
    """
    together = run.values(range(batch_size), batch_size=batch_size)[-1]
    began = time.perf_counter()
    alone = run.values([batch_size - 1], batch_size=batch_size)[0]  # is padded to a whole batch
    seconds = time.perf_counter() - began
    if not (together - alone).abs().max() <= default_tolerance(load.dtype, run.scheme, run.model.hidden_size):
        raise ComputeError(
            f"the self-test of {load.model!r} failed: nonce {batch_size - 1} has {run.scheme.output} "
            f"{together.tolist()} in a batch and {alone.tolist()} alone; the device computes wrongly"
        )
    return seconds


def fit(model: Model, load: Load) -> tuple[Model, int]:
    """Test the model in the shape that will be used, and compile it for that.

    Returns:
        The model, compiled where that is asked for and possible, and the batch size: as configured, or as found.

    Raises:
        ComputeError: The self-test failed.
        MemoryShortError: Not even the smallest batch fits, or the configured one does not.
    """
    batch_size = _test(model, load)
    while True:
        try:
            return compiled(model, load, seq_len=load.seq_len, batch_size=batch_size), batch_size
        except OutOfMemoryError as error:  # of what was compiled: the batch itself did fit
            batch_size = smaller(batch_size, error, load)


def _test(model: Model, load: Load) -> int:
    """Test the model eagerly, which needs the most memory, and return the batch size."""
    scheme = SCHEMES[load.scheme]
    with block_run(model, scheme, block_hash="self-test", public_key="self-test", seq_len=load.seq_len) as run:
        if load.is_auto:
            found = find_batch_size(load.batch_size, partial(_attempt, run, load))
        else:
            try:
                check_shape(run, load, load.batch_size)
            except OutOfMemoryError as error:
                found = smaller(load.batch_size, error, load)
            else:
                found = load.batch_size
    if found is None:
        raise MemoryShortError(NOT_ONE)
    return found


def _attempt(run: BlockRun, load: Load, batch_size: int) -> Trial | None:
    """Test a batch size; returns None if it does not fit. Ranks that run a model together agree on the result."""
    device = run.model.device
    available, before = _memory(device)
    try:
        seconds = check_shape(run, load, batch_size)
    except OutOfMemoryError as error:
        if load.is_split:
            raise MemoryShortError(str(error)) from error  # in the middle of what the other ranks still do
        return None
    room = available / max(1, torch.cuda.max_memory_reserved(device) - before) if available else math.inf
    seconds, less = largest([seconds, -room], device)
    return Trial(seconds, -less)


def _memory(device: torch.device) -> tuple[int, int]:
    """Free what is not used, and return a GPU's free memory and what torch holds of it, in bytes; zeros on the CPU."""
    if device.type == "cpu":
        return 0, 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)


def smaller(batch_size: int, error: OutOfMemoryError, load: Load) -> int:
    """Return the batch size to try after `error`.

    Raises:
        MemoryShortError: There is none: the size was configured, or not even one nonce fits, or the other ranks would
            have to shrink their batches too.
    """
    if not load.is_auto:
        raise MemoryShortError(f"{error}: lower worker.batch_size, or set it to 'auto'") from error
    if batch_size == 1:
        raise MemoryShortError(NOT_ONE) from error
    if load.is_split:
        raise MemoryShortError(str(error)) from error
    torch.cuda.empty_cache()  # does nothing without a GPU
    return batch_size // 2
