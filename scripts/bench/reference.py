"""Measure what a validator's recomputation costs: own results and the reference, against a miner's pass.

Usage: python -m scripts.bench.reference [--models NAME …] [--schemes NAME …] [--dtypes NAME …] [--nonces 32]
           [--seq-len 64] [--repeats 3] [--device cpu]

*pass*: milliseconds per nonce as it is mined, eagerly. *compared*: with the reference beside it, as a worker answers a
validator. *ratio*: the one to the other. The fastest of some repeats.

It needs torch, transformers and rich, and a checkout: no installation.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pocd.compute.engine import block_run
from pocd.compute.reference import compare
from pocd.protocol.names import DTYPES
from pocd.protocol.schemes import SCHEMES
from scripts.bench.models import NAMES, build

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pocd.compute.model import Model


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Return the least seconds of some repeats, after one that warms up."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def measure(model: Model, scheme: str, options: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds per nonce of a pass, and of one that is compared."""
    nonces = range(options.nonces)
    with block_run(model, SCHEMES[scheme], block_hash="a", public_key="b", seq_len=options.seq_len) as run:
        mined = fastest(lambda: run.values(nonces, batch_size=options.nonces), options.repeats)
        compared = fastest(lambda: compare(run, nonces, batch_size=options.nonces), options.repeats)
    return mined / options.nonces, compared / options.nonces


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES[:2])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["poc2", "poc3", "poc4"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float16", "float32"])
    parser.add_argument("--nonces", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head in ("model", "dtype", "scheme", "pass", "compared", "ratio"):
        made.add_column(head, justify="left" if head in {"model", "dtype", "scheme"} else "right")
    for name, dtype in itertools.product(options.models, options.dtypes):
        model = build(name, getattr(torch, dtype), torch.device(options.device))
        for scheme in options.schemes:
            mined, compared = measure(model, scheme, options)
            made.add_row(name, dtype, scheme, f"{1e3 * mined:.2f}", f"{1e3 * compared:.2f}", f"{compared / mined:.2f}")
    Console(highlight=False, width=max(100, Console().width)).print(made)


if __name__ == "__main__":
    main()
