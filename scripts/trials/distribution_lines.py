"""The lines of `distribution.py`: their keys, their computation, and the file that keeps them."""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pocd.process import WAITING

os.environ.update(WAITING | os.environ)  # before torch

import torch
import transformers

from pocd.compute.engine import BlockRun, block_run
from pocd.compute.model import load_model
from pocd.lab.calibration import progress
from pocd.protocol.errors import InputError, OutOfMemoryError
from pocd.protocol.names import largest_batch_size
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.theory import expected_valid_rate, r_target_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pocd.compute.model import Model

VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "numpy": np.__version__,
}


@dataclass(frozen=True, slots=True)
class LineKey:
    """Key of a line: all that its results depend on.

    Attributes:
        model: A local path, a hub id, or `bundled:NAME`.
        scheme: The scheme's name.
        block_hash: Hash of the block.
        public_key: The miner's public key.
        first_block: Hash of the block whose distances give `r_target_first`.
        first_key: Public key with which those distances were computed.
        nonces: Number of nonces, from 0.
        seq_len: Sequence length, in positions.
        device: cpu, cuda or cuda:N.
        dtype: float32, float16 or bfloat16.
        rate: The share of valid nonces aimed at, above 0 and below 1.
        seed: Seed of drawn block hashes and of a spread's floor.
    """

    model: str
    scheme: str
    block_hash: str
    public_key: str
    first_block: str
    first_key: str
    nonces: int
    seq_len: int
    device: str
    dtype: str
    rate: float
    seed: str


@dataclass(frozen=True, slots=True)
class Found:
    """Results of one line. Rates are shares, 0 to 1.

    Attributes:
        fingerprint: Fingerprint of the model's weights.
        hidden_size: Hidden size H.
        dimension: Dimension D of the outputs.
        target_per_nonce: Whether each nonce has a target of its own, so that no head and target are a block's.
        mean: Mean of the distances.
        std: Standard deviation of the distances.
        p10: 10% quantile of the distances.
        r_target: Quantile of the distances at the rate: the block's own r_target.
        r_target_first: The first block's r_target.
        r_target_theory: The r_target that gives the rate if outputs are uniformly random.
        valid_rate_first: Valid rate at `r_target_first`.
        valid_rate_theory: Valid rate at `r_target_theory`.
        ks: Kolmogorov-Smirnov distance to theory, 0 to 1.
        resultant_length: R, 0 to 1.
        batch_size: Nonces per forward pass.
        versions: Versions of the packages that computed the line.
        distances: Distances of nonces 0, 1, 2, …, in the fewest digits that give the same float32.
    """

    fingerprint: str
    hidden_size: int
    dimension: int
    target_per_nonce: bool
    mean: float
    std: float
    p10: float
    r_target: float
    r_target_first: float
    r_target_theory: float
    valid_rate_first: float
    valid_rate_theory: float
    ks: float
    resultant_length: float
    batch_size: int
    versions: dict[str, str]
    distances: list[float]

    def sample(self) -> NDArray[np.float64]:
        """Return the distances as the engine gave them, [nonces]."""
        return np.array(self.distances, np.float32).astype(np.float64)


# Measuring.


class WatchedRun(BlockRun):
    """A run that sums up the directions of its hidden outputs, see `resultant_length`."""

    @cached_property  # the way to keep something in a frozen class
    def sums(self) -> list[torch.Tensor]:
        """Sum of the unit hidden outputs of each batch, float64 [H]."""
        return []

    def measure(self, states: torch.Tensor, nonces: Sequence[int]) -> torch.Tensor:
        """Compute as the engine does, and sum up the outputs as they are before a nonce's own reflections."""
        readout = self.readout(states, nonces)
        outputs = readout if self.scheme.reflections else self.hidden(readout, nonces)
        units = torch.nn.functional.normalize(outputs[: len(set(nonces))].double(), dim=-1)  # the rest is padding
        self.sums.append(units.sum(dim=0))
        return super().measure(states, nonces)

    def resultant_length(self, nonces: int) -> float:
        """Return R, the length of the mean of the unit vectors of that many nonces."""
        return float(torch.stack(self.sums).sum(dim=0).norm()) / nonces


def distances_of(
    run: BlockRun, nonces: int, batch_size: int, advance: Callable[[int], None]
) -> tuple[list[float], float, int]:
    """Return the distances of nonces 0, 1, 2, …; R; and the batch size, halved until a batch fits into memory."""
    watched = WatchedRun(**{field.name: getattr(run, field.name) for field in fields(run)})
    found: list[float] = []
    while len(found) < nonces:
        batch, done = range(len(found), min(len(found) + batch_size, nonces)), len(watched.sums)
        try:
            found += watched.distances(batch, batch_size=batch_size)
        except OutOfMemoryError:
            if batch_size == 1:
                raise
            del watched.sums[done:]  # what this batch may have added
            batch_size //= 2
            print(f"a batch does not fit into memory; going on with {batch_size}", file=sys.stderr)
        else:
            advance(len(batch))
    return found, watched.resultant_length(nonces), batch_size


def ks_distance(distances: NDArray[np.float64], dimension: int) -> float:
    """Return the largest distance of the sample's distribution function to theory's (Kolmogorov 1933)."""
    theory = np.array([expected_valid_rate(d, dimension) for d in np.sort(distances)])
    steps = np.arange(len(theory) + 1) / len(theory)
    return float(max((steps[1:] - theory).max(), (theory - steps[:-1]).max()))


def measured(model: Model, asked: LineKey, first: Found | None, advance: Callable[[int], None]) -> Found:
    """Compute one line; `first` is the line of the first block, None where this is it."""
    scheme, size = SCHEMES[asked.scheme], 32 if model.device.type == "cpu" else largest_batch_size(asked.seq_len)
    preparation = block_run(
        model, scheme, block_hash=asked.block_hash, public_key=asked.public_key, seq_len=asked.seq_len
    )
    with preparation as run:
        distances, resultant_length, batch_size = distances_of(run, asked.nonces, size, advance)
        dimension, target_per_nonce = run.dimension, run.target is None
    sample = np.array(distances)
    own, theory = float(np.quantile(sample, asked.rate)), r_target_for(asked.rate, dimension)
    r_target_first = own if first is None else first.r_target
    return Found(
        fingerprint=model.fingerprint,
        hidden_size=model.hidden_size,
        dimension=dimension,
        target_per_nonce=target_per_nonce,
        mean=float(sample.mean()),
        std=float(sample.std(ddof=1)),
        p10=float(np.quantile(sample, 0.1)),
        r_target=own,
        r_target_first=r_target_first,
        r_target_theory=theory,
        valid_rate_first=float((sample < r_target_first).mean()),
        valid_rate_theory=float((sample < theory).mean()),
        ks=ks_distance(sample, dimension),
        resultant_length=resultant_length,
        batch_size=batch_size,
        versions=VERSIONS,
        distances=[float(str(np.float32(d))) for d in distances],
    )


# The file.


def read(path: Path) -> dict[LineKey, Found]:
    """Read the lines of the file. A last line that was cut off, as by a kill, is removed with a warning.

    Raises:
        InputError: The file has a line that is not of this script.
    """
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        print(f"{path}: its last line was cut off; it is removed and computed again", file=sys.stderr)
        path.write_text(whole)
    known: dict[LineKey, Found] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            values = json.loads(line)
            asked = LineKey(**{field.name: values.pop(field.name) for field in fields(LineKey)})
            known[asked] = Found(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"out: {path}, line {number} is not a line of this script ({error}); give another folder"
            ) from error
    return known


def complete(path: Path, wanted: Sequence[LineKey]) -> dict[LineKey, Found]:
    """Return the line of each of `wanted`, and compute and write what the file lacks.

    Raises:
        ComputeError: A model or the device cannot be used, or the file's lines are of other weights.
    """
    known = read(path)
    missing = [asked for asked in wanted if asked not in known]
    with path.open("a") as file, progress(sum(asked.nonces for asked in missing)) as advance:
        for name, group in itertools.groupby(missing, key=lambda asked: asked.model):
            model = None
            for asked in group:
                model = model or load_model(name, dtype=asked.dtype, device=asked.device, seq_len=asked.seq_len)
                is_first = (asked.block_hash, asked.public_key) == (asked.first_block, asked.first_key)
                first = replace(asked, block_hash=asked.first_block, public_key=asked.first_key)
                _check_weights(path, model, [known[each] for each in wanted if each.model == name and each in known])
                found = measured(model, asked, None if is_first else known[first], advance)
                file.write(json.dumps(asdict(asked) | asdict(found)) + "\n")
                file.flush()
                known[asked] = found
    return {asked: known[asked] for asked in wanted}


def _check_weights(path: Path, model: Model, lines: Sequence[Found]) -> None:
    if any(found.fingerprint != model.fingerprint for found in lines):
        raise InputError(f"out: {path} has lines of other weights of model {model.name!r}; give another folder")
