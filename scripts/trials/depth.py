"""Measure what depth does to rounding: honest ways of computing against each other, and against float32 arithmetic.

Usage: python -m scripts.trials.depth [--models NAME …] [--schemes NAME …] [--dtypes bfloat16 float16] [--nonces 32]
           [--seq-len 32] [--hidden-size 256] [--json]

NAME is a model (bundled:NAME, a folder) or random:LAYERS, random weights of the Qwen3 form. The ways differ in where
they round, as kernels do:

- engine: the engine's own decoder, which rounds after each operation;
- fused: float32 arithmetic within a layer, which is rounded once, at its end;
- once: transformers' layers, with products in float32 whose result is rounded;
- split: transformers' layers, with products in two halves, each rounded before they are added.

All are in units of the scatter of results between nonces, by float32 arithmetic on the same rounded weights (the
reference). *error*: the root mean square of the difference from the reference, of the worst way. *apart*: the same
between the two ways that lie furthest apart; √2 and more is nothing in common. *correlation*: of the same two.
*flipped*: the share of valid nonces of the one that are invalid for the other, with the default tolerance, where one
nonce in ten is valid.

It needs torch, transformers, numpy, scipy and rich, and a checkout: no installation.
"""

from __future__ import annotations

import argparse
import itertools
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pocd.compute.engine import block_run
from pocd.compute.model import adapt, load_model
from pocd.compute.reference import reference_of
from pocd.compute.wide import WideDecoder
from pocd.lab.cheap import multiplying
from pocd.protocol.names import DTYPES, default_tolerance
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.theory import flipped_share
from scripts.bench.models import random_model, rounded
from scripts.bench.rounding import in_halves, rounded_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from pocd.compute.engine import BlockRun
    from pocd.compute.flat import FlatDecoder
    from pocd.compute.model import Model
    from pocd.compute.transforms import Join
    from pocd.lab.cheap import Product

BATCH = 8


# Ways of computing: each gives a run that computes so while the context lasts.


@contextmanager
def _as_it_is(run: BlockRun) -> Iterator[BlockRun]:
    yield run


@contextmanager
def _fused(run: BlockRun) -> Iterator[BlockRun]:
    def rounding(join: Join) -> Join:
        def rounded_join(branch: torch.Tensor, residual: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
            return join(branch, residual, vector).to(run.model.dtype).float()

        return rounded_join

    wide = WideDecoder(run.model.by_layers)

    def decoder(embeddings: torch.Tensor, join: Join, vectors: torch.Tensor, **options: bool) -> torch.Tensor:
        return wide(embeddings, rounding(join), vectors, **options).to(run.model.dtype)

    yield replace(run, model=replace(run.model, decoder=cast("FlatDecoder", decoder), program=None))


@contextmanager
def _by(product: Product, run: BlockRun) -> Iterator[BlockRun]:
    with multiplying(run.model.by_layers.layers, product):
        yield replace(run, model=replace(run.model, decoder=run.model.by_layers))


WAYS: dict[str, Callable[[BlockRun], AbstractContextManager[BlockRun]]] = {
    "engine": _as_it_is,
    "fused": _fused,
    "once": partial(_by, rounded_once),
    "split": partial(_by, in_halves),
}


# Measuring.


@dataclass(frozen=True)
class Row:
    """Figures of one model, dtype and scheme; of the ways that lie furthest apart, and which those are."""

    model: str
    layers: int
    dtype: str
    scheme: str
    error: float
    apart: float
    correlation: float
    flipped: float | None
    between: str


def build(name: str, dtype: str, hidden_size: int) -> Model:
    """Make a model, or load it."""
    kind, _, layers = name.partition(":")
    if kind != "random":
        return load_model(name, dtype=dtype, device="cpu")
    causal = random_model(
        "Qwen3",
        num_hidden_layers=int(layers),
        hidden_size=hidden_size,
        intermediate_size=5 * hidden_size // 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
    )
    return adapt(rounded(causal, getattr(torch, dtype)), name=name)


def results(run: BlockRun, nonces: int) -> NDArray[np.float64]:
    """Return distances [n], or vectors' numbers [12 n]."""
    return run.values(range(nonces), batch_size=BATCH).double().flatten().numpy()


def measure(model: Model, scheme: str, dtype: str, nonces: int, seq_len: int) -> Row:
    """Compare all ways."""
    found = {}
    with block_run(model, SCHEMES[scheme], block_hash="block_alpha", public_key="depth", seq_len=seq_len) as run:
        exact = results(reference_of(run), nonces)
        for name, way in WAYS.items():
            with way(run) as acting:
                found[name] = results(acting, nonces)
    scatter = exact.std()

    def size(difference: NDArray[np.float64]) -> float:
        return float(np.sqrt(np.mean(difference**2)) / scatter)

    one, other = max(itertools.combinations(found, 2), key=lambda pair: size(found[pair[0]] - found[pair[1]]))
    apart = size(found[one] - found[other])
    is_vector = SCHEMES[scheme].output == "vector"
    tolerance = default_tolerance(dtype, SCHEMES[scheme], model.hidden_size) / scatter
    return Row(
        model=model.name,
        layers=model.layers,
        dtype=dtype,
        scheme=scheme,
        error=max(size(each - exact) for each in found.values()),
        apart=apart,
        correlation=float(np.corrcoef(found[one], found[other])[0, 1]),
        flipped=None if is_vector else flipped_share(apart / np.sqrt(2), float(tolerance)),
        between=f"{one}, {other}",
    )


def table(rows: Sequence[Row]) -> Table:
    """Return the rows for people."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head in ("model", "layers", "dtype", "scheme", "error", "apart", "correlation", "flipped", "between"):
        made.add_column(head, justify="left" if head in {"model", "dtype", "scheme", "between"} else "right")
    for row in rows:
        flipped = "–" if row.flipped is None else f"{row.flipped:.2%}"
        figures = (f"{row.error:.3f}", f"{row.apart:.3f}", f"{row.correlation:.3f}", flipped)
        made.add_row(row.model, str(row.layers), row.dtype, row.scheme, *figures, row.between)
    return made


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    models = ["bundled:tiny-qwen3", "bundled:tiny-llama", *(f"random:{layers}" for layers in (4, 8, 16, 24, 28))]
    parser.add_argument("--models", nargs="+", default=models, metavar="NAME")
    parser.add_argument("--schemes", nargs="+", default=["poc2", "poc3", "trained", "poc4"], choices=SCHEMES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], choices=DTYPES)
    parser.add_argument("--nonces", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=256, help="of random models, a multiple of 16")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    options = parse(arguments)
    rows = []
    for name, dtype in itertools.product(options.models, options.dtypes):
        model = build(name, dtype, options.hidden_size)
        rows += [measure(model, scheme, dtype, options.nonces, options.seq_len) for scheme in options.schemes]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    console = Console(highlight=False, width=max(110, Console().width))
    console.print(f"{options.nonces} nonces, sequence length {options.seq_len}, torch {torch.__version__}")
    console.print(table(rows))


if __name__ == "__main__":
    main()
