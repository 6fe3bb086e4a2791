"""Measure how far honest distances of one nonce lie apart, and what tolerance a validator needs.

Usage: python -m scripts.bench.agreement [--models NAME …] [--scheme poc2] [--nonces 512] [--seq-len 64]
           [--device cpu] [--compiled] [--json]

Each row compares the distances of the same nonces, computed in two ways that an honest miner and an
honest validator may differ in. Per row: the largest and the 99th-percentile
difference, and the share of a miner's valid nonces that would not be valid for the validator, at the
r_target that one nonce in ten passes: with no tolerance, and with the default one of that dtype
(`pocd/protocol/names.py`). That share is E[max(Δ − tolerance, 0)] times the density of distances at
r_target over the rate: it needs no nonce to lie at r_target by chance.

It needs torch, transformers, numpy, scipy and rich, and a checkout: no installation.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from pocd.compute.compiled import compile_model
from pocd.compute.engine import block_run
from pocd.protocol.names import DTYPES, default_tolerance
from pocd.protocol.schemes import DISTANCE_SCHEMES, SCHEMES
from pocd.protocol.theory import expected_valid_rate, r_target_for
from scripts.bench.models import NAMES, build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pocd.compute.model import Model
    from pocd.protocol.names import Dtype
    from pocd.protocol.schemes import Scheme

RATE = 0.1
BATCH = 32


@dataclass(frozen=True)
class Comparison:
    """Differences between two ways of computing, over all nonces. Shares are of a miner's valid nonces."""

    model: str
    dtype: str
    between: str
    largest: float
    percentile_99: float
    flipped: float
    flipped_with_tolerance: float
    tolerance: float


class DistanceSampler:
    """Computes the distances of the same nonces in different ways."""

    def __init__(self, count: int, seq_len: int, scheme: Scheme) -> None:
        self.nonces = list(range(count))
        self.seq_len = seq_len
        self.scheme = scheme
        self.dimension = 0

    def of(self, model: Model, *, batch_size: int = BATCH, nonces: list[int] | None = None) -> NDArray[np.float64]:
        """Return distances in the order of the nonces' numbers."""
        order = self.nonces if nonces is None else nonces
        with block_run(
            model, self.scheme, block_hash="block_alpha", public_key="agreement", seq_len=self.seq_len
        ) as run:
            self.dimension = run.dimension
            found = dict(zip(order, run.distances(order, batch_size=batch_size), strict=True))
        return np.array([found[nonce] for nonce in self.nonces])

    def pairs(self, model: Model, options: argparse.Namespace) -> Iterator[tuple[str, NDArray[np.float64]]]:
        """Yield what differs and the differences, validator − miner, within one model, dtype and device."""
        base = self.of(model)
        shuffled = np.random.default_rng(0).permutation(self.nonces).tolist()
        yield "place in the batch and neighbours", self.of(model, nonces=shuffled) - base
        for size in (1, 8, 64):
            yield f"batch size {BATCH} and {size}", self.of(model, batch_size=size) - base
        if model.device.type == "cpu":
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            yield f"{threads} threads and 1", self.of(model) - base
            torch.set_num_threads(threads)
        by_layers = replace(model, decoder=model.by_layers)
        yield "flat decoder and transformers' layers", self.of(by_layers) - base
        model.causal.set_attn_implementation("eager")
        yield "fused (SDPA) and eager attention", self.of(by_layers) - base
        model.causal.set_attn_implementation("sdpa")
        if options.compiled:
            fast = compile_model(model, "always", scheme=self.scheme, seq_len=self.seq_len, batch_size=BATCH)
            yield f"eager and {fast.execution.path}", self.of(fast) - base


def row(
    model: Model, dtype: Dtype, between: str, difference: NDArray[np.float64], distances: DistanceSampler
) -> Comparison:
    """Return the summary of one comparison."""
    r_target = r_target_for(RATE, distances.dimension)
    step = 1e-4
    above, below = (expected_valid_rate(r_target + side * step, distances.dimension) for side in (1, -1))
    density = (above - below) / (2 * step) / RATE  # of a valid nonce's distance, at r_target

    def flipped(tolerance: float) -> float:
        # Either of the two may be the miner.
        return float(np.maximum(np.abs(difference) - tolerance, 0).mean() / 2 * density)

    size, tolerance = np.abs(difference), default_tolerance(dtype, distances.scheme, model.hidden_size)
    return Comparison(
        model=model.name,
        dtype=dtype,
        between=between,
        largest=float(size.max()),
        percentile_99=float(np.quantile(size, 0.99)),
        flipped=flipped(0),
        flipped_with_tolerance=flipped(tolerance),
        tolerance=tolerance,
    )


def compare(name: str, distances: DistanceSampler, options: argparse.Namespace) -> list[Comparison]:
    """Return all comparisons of one model."""
    device, cpu = torch.device(options.device), torch.device("cpu")
    exact = distances.of(build(name, torch.float32, cpu))
    rows = []
    for dtype in DTYPES:
        model = build(name, getattr(torch, dtype), device)
        rows += [row(model, dtype, *pair, distances) for pair in distances.pairs(model, options)]
        if dtype != "float32":
            rows.append(row(model, dtype, f"{dtype} and float32", distances.of(model) - exact, distances))
        if device.type != "cpu":
            other = distances.of(build(name, getattr(torch, dtype), cpu))
            rows.append(row(model, dtype, f"{device.type} and cpu", distances.of(model) - other, distances))
            if options.compiled:
                fast = compile_model(
                    model, "always", scheme=distances.scheme, seq_len=distances.seq_len, batch_size=BATCH
                )
                between = f"{device.type}, {fast.execution.path}, and cpu"
                rows.append(row(model, dtype, between, distances.of(fast) - other, distances))
    return rows


def table(rows: list[Comparison]) -> Table:
    """Return one table over all models: the worst of them in each comparison."""
    worst: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for each in rows:
        worst[each.dtype, each.between].append(each)
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head in ("dtype", "between", "largest", "99%", "flipped", "with tolerance"):
        made.add_column(head, justify="left" if head in {"dtype", "between"} else "right")
    for (dtype, between), found in worst.items():
        made.add_row(
            dtype,
            between,
            f"{max(each.largest for each in found):.1e}",
            f"{max(each.percentile_99 for each in found):.1e}",
            f"{max(each.flipped for each in found):.2%}",
            f"{max(each.flipped_with_tolerance for each in found):.3%}",
            end_section=False,
        )
    return made


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES[:2])
    parser.add_argument("--scheme", choices=DISTANCE_SCHEMES, default="poc2")
    parser.add_argument("--nonces", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true", help="compiled too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


def main() -> None:
    """Measure, and print."""
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    distances = DistanceSampler(options.nonces, options.seq_len, SCHEMES[options.scheme])
    rows = [each for name in options.models for each in compare(name, distances, options)]
    if options.json:
        print(json.dumps({"scheme": options.scheme, "rows": [asdict(each) for each in rows]}))
        return
    console = Console(highlight=False)
    console.print(
        f"{options.scheme}; {', '.join(options.models)}; {options.nonces} nonces, sequence length {options.seq_len}, "
        f"{options.device}, torch {torch.__version__}; the worse of the models"
    )
    console.print(table(rows))
    tolerances = sorted({(each.dtype, each.tolerance) for each in rows})
    console.print(f"default tolerances: {', '.join(f'{dtype} {value:g}' for dtype, value in tolerances)}")


if __name__ == "__main__":
    main()
