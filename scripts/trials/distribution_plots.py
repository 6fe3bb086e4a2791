"""The plots of `distribution.py`, one figure for each model and scheme."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from pocd.lab.statistics import rate_intervals
from pocd.protocol.theory import distance_moments, expected_valid_rate

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from scripts.trials.distribution_verdict import DistributionVerdict

mpl.use("Agg")

BINS = 50
NAMED = 6  # blocks that a legend names
GREY, FIRST, THEORY = "0.55", "tab:blue", "crimson"


def draw(verdict: DistributionVerdict, path: Path) -> None:
    """Write a PNG: distances of each block against theory, and each block's valid rate."""
    figure = Figure(figsize=(11, 4.4), dpi=75, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    asked, one = verdict.asked, verdict.found[0]
    figure.suptitle(
        f"{asked.scheme} on {asked.model}: {len(verdict.blocks)} block hashes, {verdict.checked[0]} nonces each, "
        f"{asked.seq_len} positions, D = {one.dimension}",
        fontweight="bold",
    )
    _distances(left, verdict)
    _rates(right, verdict)
    figure.savefig(path, pil_kwargs={"optimize": True})


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    return [tuple(colour) for colour in mpl.colormaps["viridis"](np.linspace(0, 0.9, count))]


def _distances(axes: Axes, verdict: DistributionVerdict) -> None:
    """Draw one outline per block and key, in the block's colour, over theory in grey."""
    dimension, samples = verdict.found[0].dimension, [found.sample() for found in verdict.found]
    mean, std = distance_moments(dimension)
    low = min(mean - 3.5 * std, *(sample.min() for sample in samples))
    high = max(mean + 3.5 * std, *(sample.max() for sample in samples))
    edges = np.linspace(low, high, BINS + 1)
    fine = np.linspace(low, high, 10 * BINS + 1)
    cumulated = np.array([expected_valid_rate(distance, dimension) for distance in fine])
    axes.fill_between(
        (fine[1:] + fine[:-1]) / 2, np.diff(cumulated) / np.diff(fine), color="0.85", label="theory: uniform outputs"
    )
    colours = [colour for colour in _colours(len(verdict.blocks)) for _ in verdict.keys]
    names = itertools.product(verdict.blocks, verdict.keys)
    for index, ((block, key), sample, colour) in enumerate(zip(names, samples, colours, strict=True)):
        heights, _ = np.histogram(sample, edges, density=True)
        is_named = index < NAMED * len(verdict.keys) and key == verdict.keys[0]
        axes.stairs(heights, edges, color=colour, linewidth=1.6, label=_short(block) if is_named else None)
    one = verdict.found[0]
    for name, target, line_colour in (
        ("theory", one.r_target_theory, THEORY),
        ("first block", one.r_target_first, FIRST),
    ):
        axes.axvline(target, color=line_colour, linestyle="--", linewidth=1.2, label=f"r_target, {name}: {target:.4f}")
    axes.set(xlabel="distance (left of r_target: valid)", ylabel="density", xlim=(low, high), yticks=[])
    axes.set_title("Do all blocks lie on one another, and on theory?", fontsize="medium")
    _legend_above(axes, columns=3)


def _rates(axes: Axes, verdict: DistributionVerdict) -> None:
    """Draw valid rates with error bars, at both r_targets, beside the rate aimed at."""
    places = np.arange(len(verdict.blocks))
    for name, valid, shift, colour in (
        ("at the first block's r_target", verdict.valid_first, -0.12, FIRST),
        ("at theory's r_target", verdict.valid_theory, 0.12, THEORY),
    ):
        rates, errors = _with_errors(valid, verdict.checked)
        axes.errorbar(places + shift, rates, errors, fmt="o", color=colour, capsize=4, label=name)
    rate = 100 * verdict.asked.rate
    axes.axhline(rate, color=GREY, linestyle=":", label=f"aimed at, {rate:g}%")
    labels = [_short(block) for block in verdict.blocks]
    axes.set_xticks(places, labels, rotation=30 if len(places) <= 8 else 90, ha="right", fontsize="small")
    axes.set(ylabel="valid nonces, % (bars: 95%)", xlim=(-0.6, len(places) - 0.4))
    axes.set_ylim(top=max(axes.get_ylim()[1], 2 * rate))
    spread = verdict.first
    axes.set_title(
        f"Spread {100 * spread.spread:.1f} points; up to {100 * spread.floor_95:.1f} would be chance",
        fontsize="medium",
        color=THEORY if spread.exceeds_floor else "darkgreen",
    )
    _legend_above(axes, columns=1)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= min(100, axes.get_ylim()[1])])


def _legend_above(axes: Axes, columns: int) -> None:
    """Add a legend above the plot, where it hides nothing."""
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    axes.legend(loc="upper center", ncols=columns, fontsize="small", edgecolor="none", columnspacing=1.2)


def _with_errors(
    valid: NDArray[np.int64], checked: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return rates in % [blocks], and how far their 95% bounds (for all at once) lie below and above [2, blocks]."""
    rates = valid / checked
    low, high = rate_intervals(valid, checked)
    return 100 * rates, 100 * np.stack([rates - low, high - rates]).clip(0)


def _short(block_hash: str) -> str:
    return block_hash if len(block_hash) <= 16 else f"{block_hash[:8]}…"
