"""Measure honest and cheap ways of computing by the verdict by differences, beside the verdict that counts flips.

Usage: python -m scripts.bench.differences [--models NAME …] [--schemes poc2 poc3] [--dtype bfloat16] [--nonces 2048]
           [--seq-len 64] [--compiled] [--layers N …] [--json]

A validator computes each nonce by the flat decoder in `--dtype`, and a reference in float32 arithmetic on the same
rounded weights, inputs and layer vectors. A row is a miner's way of computing. *Error*: the root mean square of the
miner's error of the vector that is compared with the target (or goes into the head), as a multiple of the validator's.
*Spread*: the standard deviation of ln(miner's squared error / validator's) over nonces. *Accused*: of 1,000 batches
drawn from the nonces, the share that is called fraud, by differences of distances (k = 1, only nonces that the miner
finds valid at a rate of 10%), by differences of 12 random projections of the vector (k = 12, all nonces), and by
counting nonces that are invalid (`Verdict` in docs/protocol.md section 5). `?`: undecidable, or too few.

With `--layers` it measures random weights of that many layers instead, hidden size 256: how far depth enlarges the
validator's own error of the unit vector.

It needs torch, transformers, numpy, scipy, orjson and rich, and a checkout: no installation.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear

from pocd.compute.compiled import compile_model
from pocd.compute.engine import block_run
from pocd.compute.model import adapt
from pocd.compute.reference import reference_of
from pocd.lab.cheap import multiplying
from pocd.lab.few_bits import to_bits
from pocd.protocol.differences import allowed_errors, compare, honest_law, judge_differences, measures
from pocd.protocol.names import default_tolerance
from pocd.protocol.proof import FRAUD_THRESHOLD, MISMATCH
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.theory import probability_honest
from scripts.bench.models import NAMES, build, random_model
from scripts.bench.rounding import rounded_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pocd.compute.engine import BlockRun
    from pocd.compute.model import Model
    from pocd.lab.cheap import Product
    from pocd.protocol.schemes import Scheme

    Floats = NDArray[np.float64]
    Indices = NDArray[np.int64]

RATE = 0.1
BATCH = 32
NUMBERS = 12
BATCHES = 1000
SIZES = (20, 100, 200)
WITH_DISTANCE = [name for name, scheme in SCHEMES.items() if scheme.output == "distance"]


@dataclass(frozen=True)
class Results:
    """What one way of computing gives for each nonce: unit vectors [n, H] and distances [n]."""

    vectors: Floats
    distances: Floats


@dataclass(frozen=True)
class Row:
    """A miner's way of computing, judged; shares of batches by their size, None where undecidable or not measured."""

    model: str
    scheme: str
    way: str
    error: float
    spread: float
    by_distances: tuple[float | None, ...]
    by_projections: tuple[float | None, ...]
    by_flips: tuple[float | None, ...]


@torch.inference_mode()
def results(run: BlockRun, count: int) -> Results:
    """Compute nonces 0 to `count` − 1."""
    vectors, distances = [], []
    for start in range(0, count, BATCH):
        nonces = range(start, min(start + BATCH, count))
        readout = run.readout(run.states(nonces), nonces)
        vectors.append(run.hidden(readout, nonces).double().numpy())
        distances.append(run.distance(readout, nonces).double().numpy())
    return Results(np.concatenate(vectors), np.concatenate(distances))


# Ways of computing.

PRODUCTS: dict[str, Product] = {
    "products in float32, rounded once": rounded_once,
    "8-bit weights": lambda x, w, b: linear(x, to_bits(w, 8), b),
    "8-bit weights and activations": lambda x, w, b: linear(to_bits(x, 8), to_bits(w, 8), b),
    "4-bit weights": lambda x, w, b: linear(x, to_bits(w, 4), b),
}


def ways(run: BlockRun, count: int) -> Iterator[tuple[str, Results]]:
    """Yield what miners of different ways of computing get."""
    model = run.model

    def of(acting: Model) -> Results:
        with block_run(
            acting, run.scheme, block_hash=run.block_hash, public_key=run.public_key, seq_len=run.seq_len
        ) as theirs:
            return results(theirs, count)

    by_layers = replace(model, decoder=model.by_layers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    yield "another number of threads", of(model)
    torch.set_num_threads(threads)
    yield "transformers' layers", of(by_layers)
    model.causal.set_attn_implementation("eager")
    yield "eager attention", of(by_layers)
    model.causal.set_attn_implementation("sdpa")
    for name, product in PRODUCTS.items():
        with multiplying(model.by_layers.layers, product):
            yield name, of(by_layers)


# Judging.


def share(accused: Callable[[Indices], bool | None], among: Indices, size: int) -> float | None:
    """Return the share of random batches of `size` that are accused; None where there are too few, or undecidable."""
    generator = np.random.default_rng(size)
    if len(among) < size:
        return None
    found = [accused(generator.choice(among, size, replace=False)) for _ in range(BATCHES)]
    decided = [each for each in found if each is not None]
    return sum(decided) / len(decided) if len(decided) > BATCHES / 2 else None


def by_differences(claims: Floats, reference: Floats, own_errors: Floats) -> Callable[[Indices], bool | None]:
    """Return what tells whether a batch of some nonces is fraud, None where that is undecidable."""
    whole = judge_differences(claims.tolist(), reference, own_errors)
    law, allowed = honest_law(whole.numbers), allowed_errors(own_errors, whole.allowance)
    claimed, blank = (np.array(errors) / allowed for errors in (whole.claimed_errors, whole.blank_errors))

    is_measured = measures(own_errors, np.array(whole.blank_errors))

    def accused(some: Indices) -> bool | None:
        if not is_measured or compare(blank[some], law).probability >= whole.threshold:
            return None
        return compare(claimed[some], law).probability < whole.threshold

    return accused


def judged(run: BlockRun, way: str, miner: Results, own: Results, reference: Results) -> Row:
    """Judge one way of computing."""
    theirs, mine = (np.square(each.vectors - reference.vectors).sum(axis=1) for each in (miner, own))
    projections = np.random.default_rng(1).standard_normal((len(mine), NUMBERS, own.vectors.shape[1]))
    claims, expected = (np.einsum("nkh,nh->nk", projections, each.vectors) for each in (miner, reference))
    r_target = float(np.quantile(own.distances, RATE))
    tolerance = default_tolerance(str(run.model.dtype).removeprefix("torch."), run.scheme, run.model.hidden_size)
    # Of a distance's error, as its target is random:
    per_distance = mine / run.dimension / np.square(reference.distances)
    by_distances = by_differences(miner.distances[:, None], reference.distances[:, None], per_distance)
    by_projections = by_differences(claims, expected, mine)

    def by_flips(some: Indices) -> bool:
        invalid = int((own.distances[some] >= r_target + tolerance).sum())
        return probability_honest(invalid, len(some), MISMATCH) < FRAUD_THRESHOLD

    valid, everything = np.flatnonzero(miner.distances < r_target), np.arange(len(mine))
    return Row(
        model=run.model.name,
        scheme=run.scheme.name,
        way=way,
        error=float(np.sqrt(theirs.sum() / mine.sum())),
        spread=float(np.log(theirs / mine).std()),
        by_distances=tuple(share(by_distances, valid, size) for size in SIZES),
        by_projections=tuple(share(by_projections, everything, size) for size in SIZES),
        by_flips=tuple(share(by_flips, valid, size) for size in SIZES),
    )


def compared(model: Model, scheme: Scheme, options: argparse.Namespace) -> Iterator[Row | str]:
    """Yield one row for each way of computing, after a line on the validator's own error."""
    count = options.nonces
    with block_run(model, scheme, block_hash="block_alpha", public_key="differences", seq_len=options.seq_len) as run:
        own = results(run, count)
        reference = results(reference_of(run), count)
        errors = np.square(own.vectors - reference.vectors).sum(axis=1)
        related = np.corrcoef(own.distances, reference.distances)[0, 1]
        yield (
            f"{model.name}, {scheme.name}: own error of the unit vector {np.sqrt(errors.mean()):.3g}, its logarithm's "
            f"standard deviation {np.log(np.sqrt(errors)).std():.2f}; correlation of distances {related:.3f}"
        )
        for name, miner in ways(run, count):
            yield judged(run, name, miner, own, reference)
        if options.compiled:
            program = compile_model(model, "always", scheme=scheme, seq_len=options.seq_len, batch_size=BATCH)
            with block_run(
                program, scheme, block_hash=run.block_hash, public_key=run.public_key, seq_len=run.seq_len
            ) as fast:
                distances = np.array(fast.distances(range(count), batch_size=BATCH))
            row = judged(run, "compiled", Results(own.vectors, distances), own, reference)
            yield replace(row, by_projections=(None,) * len(SIZES), error=float("nan"), spread=float("nan"))


def models(options: argparse.Namespace) -> Iterator[Model]:
    """Load the models, in the dtype."""
    dtype, cpu = getattr(torch, options.dtype), torch.device("cpu")
    for layers in options.layers:
        causal = random_model(
            "Qwen3",
            num_hidden_layers=layers,
            hidden_size=256,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            intermediate_size=640,
        )
        yield adapt(causal.to(cpu, dtype), name=f"random weights, {layers} layers")
    for name in [] if options.layers else options.models:
        yield build(name, dtype, cpu)


def table(rows: list[Row]) -> Table:
    """Return a table of all rows."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    sizes = " / ".join(map(str, SIZES))
    for head in ("model", "scheme", "way", "error", "spread", f"distances {sizes}", f"projections {sizes}", "flips"):
        made.add_column(head)

    def shares(values: tuple[float | None, ...]) -> str:
        return " / ".join("?" if value is None else f"{value:.1%}" for value in values)

    for row in rows:
        found = (shares(each) for each in (row.by_distances, row.by_projections, row.by_flips))
        made.add_row(row.model, row.scheme, row.way, f"{row.error:.2f}", f"{row.spread:.2f}", *found)
    return made


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES[:2])
    parser.add_argument("--schemes", nargs="+", choices=WITH_DISTANCE, default=["poc2", "poc3"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--nonces", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="random weights of so many layers")
    parser.add_argument("--compiled", action="store_true", help="compiled too")
    parser.add_argument("--json", action="store_true", help="one JSON object a row instead of a table")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    console, rows = Console(highlight=False, width=160), []
    for model in models(options):
        for name in options.schemes:
            for found in compared(model, SCHEMES[name], options):
                if isinstance(found, str):
                    console.print(found)
                else:
                    rows.append(found)
                    if options.json:
                        print(json.dumps(asdict(found)), flush=True)
    if not options.json:
        console.print(table(rows))


if __name__ == "__main__":
    main()
