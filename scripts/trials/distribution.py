"""The report's distribution test without a server: how even are distances from block hash to block hash?

Usage: python -m scripts.trials.distribution [--models NAME …] [--schemes NAME …] [--blocks N | HASH …] [--keys KEY …]
           [--nonces 1920] [--seq-len 256] [--device cpu] [--dtype float32] [--rate 0.1] [--seed pocd] [--out lab]

The report's experiments, with its block hashes, key, sequence length and number of nonces, which are the defaults:

    Test 1, trained weights (the problem)      python -m scripts.trials.distribution --schemes trained
    Test 2, fully random weights               python -m scripts.trials.distribution --schemes random-weights
    Test 3, random embed_tokens only           python -m scripts.trials.distribution --schemes random-embed
    the solution, per-layer norm and head      python -m scripts.trials.distribution --schemes poc2
    end-only normalisation (did not work)      python -m scripts.trials.distribution --schemes end-norm
    random lm_head alone (did not work)        python -m scripts.trials.distribution --schemes random-head
    Householder on hidden states alone         python -m scripts.trials.distribution --schemes hidden-householder
    random weights prove the fix             python -m scripts.trials.distribution --schemes trained random-weights poc2

Models are bundled ones, folders, or hub ids: `--models Qwen/Qwen3-0.6B unsloth/Llama-3.2-1B-Instruct` are the report's.
`--blocks 20` takes that many hashes, which follow from `--seed`. Into the folder `--out` go

    distribution.jsonl   a line per model, scheme, block and key, with all that it depends on, and its distances
    MODEL-SCHEME.png     distances of each block against theory, and each block's valid rate

A line that is there already is not computed again; with any option changed it is another line, in the same file.

Distances are between unit vectors. Theory is what uniformly random outputs of the scheme's dimension D give. `ks` is
the Kolmogorov-Smirnov distance to it: n uniform outputs stay below 1.36/√n in 95% of cases. R is the length of the
mean of the outputs' unit vectors (1: all the same; about 1/√n: evenly spread): of what the engine shows to a head or
compares with a target, before the reflections of a nonce, since whoever predicts outputs knows these. Every scheme has
such vectors: where one reads all positions, it is what it makes of them.

The spread of the blocks' valid rates (keys of a block taken together) has a 95% interval, and a floor: what it stays
below in 95% of cases if blocks share one rate, by sampling noise and by what a random head and target of a block do
alone. Schemes with the model's own head have no such excuse and get it all the same; where each nonce has a target of
its own the floor is noise alone. `equal rates` is a chi-square test of it at the theoretical r_target, `outside 99%`
the number of blocks whose interval does not hold the theoretical rate.

It needs torch, transformers, numpy, scipy, rich and matplotlib, and a checkout: no installation.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from pocd.lab.calibration import Plan, block_hashes, check_plan
from pocd.process import EXIT_CONFIG
from pocd.protocol.errors import ComputeError, InputError
from pocd.protocol.names import DTYPES, check_device, resolve
from pocd.protocol.schemes import DISTANCE_SCHEMES
from pocd.protocol.theory import distance_moments, expected_valid_rate, r_target_for
from scripts.trials.distribution_lines import LineKey, complete
from scripts.trials.distribution_verdict import DistributionVerdict, verdicts

if TYPE_CHECKING:
    from collections.abc import Sequence


FILE = "distribution.jsonl"


def table_of_blocks(judged: Sequence[DistributionVerdict]) -> Table:
    """Return a table with a row per line, below one of theory for each model and scheme."""
    table = Table(box=box.MARKDOWN)
    for head in ("model", "scheme", "block", "key"):
        table.add_column(head)
    for head in ("mean", "std", "p10", "valid, first's r", "valid, theory's r", "ks", "R"):
        table.add_column(head, justify="right")
    for each in judged:
        names, one = (each.asked.model, each.asked.scheme), each.found[0]
        expected = (*distance_moments(one.dimension), r_target_for(0.1, one.dimension))
        first = expected_valid_rate(one.r_target_first, one.dimension)
        theory = (*(f"{value:.4f}" for value in expected), f"{first:.1%}", f"{each.asked.rate:.1%}")
        table.add_row(*names, f"theory, D = {one.dimension}", "", *theory, "", "")
        for (block, key), found in zip(itertools.product(each.blocks, each.keys), each.found, strict=True):
            numbers = (f"{value:.4f}" for value in (found.mean, found.std, found.p10))
            rates = (f"{rate:.1%}" for rate in (found.valid_rate_first, found.valid_rate_theory))
            table.add_row(
                *names, short(block), key, *numbers, *rates, f"{found.ks:.3f}", f"{found.resultant_length:.2f}"
            )
    return table


def table_of_schemes(judged: Sequence[DistributionVerdict]) -> Table:
    """Return a table with a row per model and scheme: spreads in points."""
    table = Table(box=box.MARKDOWN)
    for head in ("model", "scheme"):
        table.add_column(head)
    heads = ("r_target, first's", "spread, first's r", "95% interval", "floor, 95%", "p", "spread, theory's r")
    for head in (*heads, "floor, 95%", "equal rates, p", "outside 99%", "largest ks", "largest R"):
        table.add_column(head, justify="right")
    for each in judged:
        first, theory = each.first, each.theory
        table.add_row(
            each.asked.model,
            each.asked.scheme,
            f"{each.found[0].r_target_first:.4f}",
            f"{100 * first.spread:.1f}",
            f"{100 * first.low:.1f} to {100 * first.high:.1f}",
            f"{100 * first.floor_95:.1f}",
            f"{first.p_value:.2g}",
            f"{100 * theory.spread:.1f}",
            f"{100 * theory.floor_95:.1f}",
            f"{each.equal:.2g}",
            f"{each.outside} of {len(each.blocks)}",
            f"{max(found.ks for found in each.found):.3f}",
            f"{max(found.resultant_length for found in each.found):.2f}",
        )
    return table


def short(block_hash: str) -> str:
    """Return the name of a block in a table: the beginning of a long hash."""
    return block_hash if len(block_hash) <= 16 else f"{block_hash[:12]}…"


# The command line.


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["bundled:tiny-qwen3", "bundled:tiny-llama"], metavar="NAME")
    parser.add_argument("--schemes", nargs="+", default=DISTANCE_SCHEMES, choices=DISTANCE_SCHEMES, metavar="NAME")
    blocks = ["block_alpha", "block_beta", "block_gamma"]
    parser.add_argument("--blocks", nargs="+", default=blocks, metavar="HASH", help="hashes, or how many to draw")
    parser.add_argument("--keys", nargs="+", default=["node_A"], metavar="KEY", help="public keys")
    parser.add_argument("--nonces", type=int, default=1920, help="of each block and key")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rate", type=float, default=0.1, help="the share of valid nonces to calibrate for")
    parser.add_argument("--seed", default="pocd", help="drawn block hashes follow from it")
    parser.add_argument("--out", type=Path, default=Path("lab"), metavar="FOLDER")
    return parser.parse_args(arguments)


def wanted_lines(options: argparse.Namespace) -> list[LineKey]:
    """Return the keys of all lines that the options ask for, in order.

    Raises:
        InputError: An option has a wrong value; the message names the option.
    """
    blocks = options.blocks
    if len(blocks) == 1 and blocks[0].isdecimal():
        blocks = block_hashes(options.seed, int(blocks[0]))
    for name, values in (
        ("models", options.models),
        ("schemes", options.schemes),
        ("blocks", blocks),
        ("keys", options.keys),
    ):
        if repeated := [value for value in values if values.count(value) > 1]:
            raise InputError(f"{name}: {repeated[0]!r} is named twice")
    check_device(options.device)
    for model in options.models:
        resolve(model)
    lines = [
        LineKey(
            model=model,
            scheme=scheme,
            block_hash=block,
            public_key=key,
            first_block=blocks[0],
            first_key=options.keys[0],
            nonces=options.nonces,
            seq_len=options.seq_len,
            device=options.device,
            dtype=options.dtype,
            rate=options.rate,
            seed=options.seed,
        )
        for model, scheme, block, key in itertools.product(options.models, options.schemes, blocks, options.keys)
    ]
    shared = {name: value for name, value in asdict(lines[0]).items() if name in {field.name for field in fields(Plan)}}
    check_plan(Plan(**shared, blocks=len(blocks), batch_size=1))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not there yet; print and draw all that was asked for."""
    options = parse(arguments)
    try:
        from scripts.trials import distribution_plots  # noqa: PLC0415 - its absence is told before hours of work

        wanted = wanted_lines(options)
        options.out.mkdir(parents=True, exist_ok=True)
        judged = verdicts(complete(options.out / FILE, wanted))
        for each in judged:
            name = "-".join(re.sub(r"[^\w.-]+", "_", part) for part in (each.asked.model, each.asked.scheme))
            distribution_plots.draw(each, options.out / f"{name}.png")
    except (ComputeError, OSError, ImportError) as error:
        hint = "; it is in the extra: pip install 'pocd[lab]'" if isinstance(error, ImportError) else ""
        print(f"distribution: {error}{hint}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    console = Console(highlight=False, width=220)
    console.print(table_of_blocks(judged))
    console.print(table_of_schemes(judged))
    console.print(
        f"{options.nonces} nonces of each block and key, sequence length {options.seq_len}, {options.dtype} on "
        f"{options.device}, seed {options.seed!r}. Spreads in points, the largest valid rate less the smallest; "
        f"`floor`: what they stay below in 95% of cases if blocks share one rate. Lines and plots: {options.out}"
    )


if __name__ == "__main__":
    main()
