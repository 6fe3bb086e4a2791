"""The tests that a worker passes before it is ready: known results, rounding, and the model in its own shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import torch

from pocd.compute.compiled import compile_model
from pocd.compute.conditioning import NONCES, measure_conditioning
from pocd.compute.engine import block_run
from pocd.protocol.errors import ComputeError, DeviceError, OutOfMemoryError
from pocd.protocol.names import default_tolerance
from pocd.protocol.schemes import SCHEMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.compute.model import Model
    from pocd.protocol.conditioning import Conditioning
    from pocd.worker.messages import Load

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
    return compile_model(model, load.compile, scheme=SCHEMES[load.scheme], seq_len=seq_len, batch_size=batch_size)


def check_rounding(model: Model, load: Load) -> Conditioning | None:
    """Measure how far rounding decides the results of the model in its scheme and dtype.

    Returns:
        The measurement; None where there is no memory for it.

    Raises:
        NonFiniteError: The model gave NaN or infinity.
        ComputeError: Rounding decides too much, and `load` wants that refused.
    """
    found, rows = None, min(load.batch_size, NONCES)
    with block_run(
        model, SCHEMES[load.scheme], block_hash="rounding", public_key="rounding", seq_len=load.seq_len
    ) as run:
        while found is None and rows:
            try:
                found = measure_conditioning(run, batch_size=rows)
            except OutOfMemoryError:
                rows //= 2
    if found is not None and found.alarm is not None and load.conditioning == "refuse":
        raise ComputeError(f"{found.alarm}; or set worker.conditioning = 'warn'")
    return found


def check_shape(model: Model, load: Load, batch_size: int) -> None:
    """Run the model once in the shape that will be used, and check that it answers the same twice.

    Raises:
        NonFiniteError: The model gave NaN or infinity.
        OutOfMemoryError: The batch does not fit into memory.
        ComputeError: Two answers to one nonce differ.
    """
    scheme = SCHEMES[load.scheme]
    with block_run(model, scheme, block_hash="self-test", public_key="self-test", seq_len=load.seq_len) as run:
        together = run.values(range(batch_size), batch_size=batch_size)[-1]
        alone = run.values([batch_size - 1], batch_size=batch_size)[0]
    if not (together - alone).abs().max() <= default_tolerance(load.dtype, scheme, model.hidden_size):
        raise ComputeError(
            f"the self-test of {load.model!r} failed: nonce {batch_size - 1} has {scheme.output} {together.tolist()} "
            f"in a batch and {alone.tolist()} alone; the device computes wrongly"
        )
