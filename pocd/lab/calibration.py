"""`pocd calibrate`: the r_target for a rate, and how far blocks differ; judging and printing, without torch."""

from __future__ import annotations

import hashlib
import io
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pocd.lab.statistics import Spread, geometry_std, quantile_interval, spread_of_rates
from pocd.protocol.errors import InputError
from pocd.protocol.theory import distance_moments, r_target_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from rich.progress import Task

LEAST_EXPECTED = 5  # valid nonces per block: with fewer, a block's rate is ±45% noise
WIDTH = 80


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of a calibration or an audit: model, scheme, blocks and nonces.

    Attributes:
        model: A local path, a hub id, or `bundled:NAME`.
        scheme: Name of the scheme.
        rate: Share of valid nonces to aim at, above 0 and below 1.
        blocks: Number of block hashes.
        nonces: Number of nonces of each block, from 0.
        seq_len: Sequence length, in positions.
        dtype: float32, float16 or bfloat16.
        device: cpu, cuda or cuda:N.
        batch_size: Nonces per forward pass.
        public_key: The miner's public key.
        seed: Seed of the block hashes.
        revision: Branch, tag or commit of a hub id.
    """

    model: str
    scheme: str
    rate: float
    blocks: int
    nonces: int
    seq_len: int
    dtype: str
    device: str
    batch_size: int
    public_key: str
    seed: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Distances that the engine computed.

    Attributes:
        fingerprint: Fingerprint of the model's weights.
        hidden_size: Hidden size H.
        dimension: Dimension D of the head's output.
        distances: Distances [blocks, nonces].
        head_rates: Valid rate of each block at the theoretical r_target that its head and target give
            to uniform hidden states [blocks]. None where there is no head, and a target per nonce.
    """

    fingerprint: str
    hidden_size: int
    dimension: int
    distances: NDArray[np.float64]
    head_rates: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Statistics of one block's distances. Rates are shares, 0 to 1.

    Attributes:
        block_hash: Hash of the block.
        mean: Mean of the distances.
        std: Standard deviation of the distances.
        quantile: The block's own r_target for the rate.
        valid_rate: Valid rate at the theoretical r_target.
        valid_rate_first: Valid rate at the r_target measured on the first block.
        valid_rate_pooled: Valid rate at the r_target measured on all blocks.
        head_rate: Expected `valid_rate` if hidden states were uniformly random. None without a head.
    """

    block_hash: str
    mean: float
    std: float
    quantile: float
    valid_rate: float
    valid_rate_first: float
    valid_rate_pooled: float
    head_rate: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """The report.

    Attributes:
        plan: Plan of the calibration.
        fingerprint: Fingerprint of the model's weights.
        hidden_size: Hidden size H.
        dimension: Dimension D of the head's output.
        expected_r_target: The r_target that gives the rate if outputs are uniformly random, over all blocks.
        expected_mean: Mean of uniformly random outputs' distances.
        expected_std: Standard deviation of uniformly random outputs' distances.
        geometry_std: Standard deviation of the valid rate over blocks, by a random head and target alone. None
            without a head.
        r_target: The measured r_target: the quantile of all distances together at the rate.
        r_target_low: Lower end of the 95% confidence interval of `r_target`, which counts that blocks differ.
        r_target_high: Upper end of that interval.
        blocks: Statistics of each block.
        spread: Spread of the blocks' valid rates at `r_target`. (Where theory does not describe a scheme, the
            rates may all be near 0 at the theoretical r_target, and look even.)
    """

    plan: Plan
    fingerprint: str
    hidden_size: int
    dimension: int
    expected_r_target: float
    expected_mean: float
    expected_std: float
    geometry_std: float | None
    r_target: float
    r_target_low: float
    r_target_high: float
    blocks: tuple[BlockStatistics, ...]
    spread: Spread


def check_plan(plan: Plan) -> None:
    """Raise an InputError for a plan that cannot be judged."""
    if not 0 < plan.rate < 1:
        raise InputError(f"rate must be above 0 and below 1, got {plan.rate:g}")
    if plan.blocks < 2:
        raise InputError(f"blocks must be 2 or more, got {plan.blocks}: fewer have no spread")
    rarer = min(plan.rate, 1 - plan.rate)
    if plan.nonces * rarer < LEAST_EXPECTED:
        raise InputError(
            f"nonces must be {int(np.ceil(LEAST_EXPECTED / rarer))} or more for a rate of {plan.rate:g}, got "
            f"{plan.nonces}: {LEAST_EXPECTED} valid and {LEAST_EXPECTED} invalid ones must be expected in each block"
        )


def block_hashes(seed: str, count: int) -> list[str]:
    """Return hashes of the form that chains write, which follow from `seed`."""
    return [hashlib.sha256(f"{seed}_{i}".encode()).hexdigest().upper() for i in range(count)]


def calibrate(plan: Plan, measurement: Measurement) -> Calibration:
    """Return the report on a measurement. Equal inputs give equal reports: the plan's seed draws the floor too."""
    distances, dimension, hidden_size = measurement.distances, measurement.dimension, measurement.hidden_size
    head_rates = measurement.head_rates
    target = r_target_for(plan.rate, dimension)
    quantiles = np.quantile(distances, plan.rate, axis=1)
    first = float(quantiles[0])
    pooled = float(np.quantile(distances, plan.rate))
    valid = (distances < pooled).sum(axis=1)
    low, high = quantile_interval(distances, plan.rate)
    mean, std = distance_moments(dimension)
    return Calibration(
        plan=plan,
        fingerprint=measurement.fingerprint,
        hidden_size=hidden_size,
        dimension=dimension,
        expected_r_target=target,
        expected_mean=mean,
        expected_std=std,
        geometry_std=None if head_rates is None else geometry_std(plan.rate, hidden_size, dimension),
        r_target=pooled,
        r_target_low=low,
        r_target_high=high,
        blocks=tuple(
            BlockStatistics(
                block_hash=block_hash,
                mean=float(row.mean()),
                std=float(row.std(ddof=1)),
                quantile=float(quantile),
                valid_rate=float((row < target).mean()),
                valid_rate_first=float((row < first).mean()),
                valid_rate_pooled=float((row < pooled).mean()),
                head_rate=head_rate,
            )
            for block_hash, row, quantile, head_rate in zip(
                block_hashes(plan.seed, plan.blocks),
                distances,
                quantiles,
                head_rates or [None] * plan.blocks,
                strict=True,
            )
        ),
        spread=spread_of_rates(
            valid,
            np.full(len(valid), plan.nonces),
            hidden_size=None if head_rates is None else hidden_size,
            dimension=dimension,
            generator=np.random.default_rng(list(plan.seed.encode())),
        ),
    )


def as_text(report: Calibration) -> str:
    """Return what `pocd calibrate` prints, in 80 columns unless names are long."""
    plan, spread = report.plan, report.spread
    model = plan.model if plan.revision is None else f"{plan.model}, revision {plan.revision}"
    target, low, high = (f"{r:.6f}" for r in (report.r_target, report.r_target_low, report.r_target_high))
    facts = (
        ("model", f"{model}, {plan.dtype} on {plan.device}"),
        ("scheme", f"{plan.scheme}, hidden size H = {report.hidden_size}, output dimension D = {report.dimension}"),
        ("sample", f"{plan.blocks} blocks × {plan.nonces} nonces, {plan.seq_len} positions each"),
        ("r_target", f"{report.expected_r_target:.6f} by theory, for a valid rate of {100 * plan.rate:g}%"),
        ("", f"{target} measured on all blocks, 95% interval {low} to {high}"),
    )
    legend = (
        f"Distances are between unit vectors, 0 to 2; {_quantile_name(plan.rate)} is a block's own r_target. Valid: "
        "below the r_target of theory, of the first block, of all blocks."
    )
    causes = "by sampling noise alone, as each nonce has a target of its own"
    if report.geometry_std is not None:
        legend += " By head alone: at theory's, were hidden states uniformly random."
        causes = (
            "by sampling noise and by random heads and targets (these alone: a standard deviation of "
            f"{100 * report.geometry_std:.2f} points per block)"
        )
    found = (
        f"Spread of the valid rates at all blocks' r_target: {100 * spread.spread:.2f} points (largest less smallest), "
        f"95% interval {100 * spread.low:.2f} to {100 * spread.high:.2f}."
    )
    floor = (
        f"Its floor, if blocks share one rate: {100 * spread.floor_mean:.2f} points on average, at most "
        f"{100 * spread.floor_95:.2f} in 95% of cases, {causes}."
    )
    verdict = (
        f"The spread exceeds its floor (p = {spread.p_value:.2g}): the valid rate depends on the block hash."
        if spread.exceeds_floor
        else f"The spread does not exceed its floor (p = {spread.p_value:.2g}): no sign of uneven blocks."
    )
    head = "\n".join(f"{name:9} {text}" for name, text in facts)
    paragraphs = (textwrap.fill(text, WIDTH) for text in (legend, found, floor, verdict))
    return f"{head}\n\n{_table(report)}\n\n" + "\n".join(paragraphs)


def _table(report: Calibration) -> str:
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False)
    table.add_column("block")
    by_head = [] if report.geometry_std is None else ["by head\nalone"]
    rates = ["valid at\ntheory's", "\nfirst's", "\nall's", *by_head]
    for name in ("mean", "std", _quantile_name(report.plan.rate), *rates):
        table.add_column(name, justify="right")
    expected = (f"{value:.5f}" for value in (report.expected_mean, report.expected_std, report.expected_r_target))
    rate = _percent(report.plan.rate)
    table.add_row("theory", *expected, rate, "", "", *(rate for _ in by_head), end_section=True)
    for block in report.blocks:
        found = (f"{value:.5f}" for value in (block.mean, block.std, block.quantile))
        valid = [block.valid_rate, block.valid_rate_first, block.valid_rate_pooled]
        if block.head_rate is not None:
            valid.append(block.head_rate)
        table.add_row(f"{block.block_hash[:12]}…", *found, *map(_percent, valid))
    file = io.StringIO()
    Console(file=file, width=WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def _quantile_name(rate: float) -> str:
    return f"p{100 * rate:g}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}%"


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} nonces/s")


@contextmanager
def progress(nonces: int) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on standard error, where that is a terminal.

    Yields:
        Function that moves the bar on by a number of nonces.
    """
    columns = BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("nonces", total=nonces)
        yield lambda count: bar.advance(task, count)
