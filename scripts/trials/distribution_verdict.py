"""Verdict of `distribution.py` on the lines of one model and scheme."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from pocd.lab.statistics import Spread, spread_of_rates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scripts.trials.distribution_lines import Found, LineKey


@dataclass(frozen=True, slots=True)
class DistributionVerdict:
    """Statistics over the blocks of one model and scheme; keys of a block count as one sample.

    Attributes:
        blocks: Block hashes.
        found: Results in the order of blocks, then keys.
        keys: Public keys.
        valid_first: Valid nonces of each block at the first block's r_target, [blocks].
        valid_theory: Valid nonces of each block at the theoretical r_target, [blocks].
        checked: Nonces of each block, [blocks].
        first: Spread of the valid rates at the first block's r_target.
        theory: Spread of the valid rates at the theoretical r_target.
        equal: p of Pearson's chi-square test that all blocks have one rate, at the theoretical r_target.
        outside: How many blocks' exact 99% intervals (Clopper and Pearson 1934) do not hold the theoretical rate.
    """

    asked: LineKey
    blocks: list[str]
    keys: list[str]
    found: list[Found]
    valid_first: NDArray[np.int64]
    valid_theory: NDArray[np.int64]
    checked: NDArray[np.int64]
    first: Spread
    theory: Spread
    equal: float
    outside: int


def verdict(lines: Sequence[tuple[LineKey, Found]]) -> DistributionVerdict:
    """Judge one model and scheme; lines come in the order of blocks, then keys."""
    asked, found = lines[0]
    blocks = list(dict.fromkeys(each.block_hash for each, _ in lines))
    keys = list(dict.fromkeys(each.public_key for each, _ in lines))
    samples = np.array([each.sample() for _, each in lines]).reshape(len(blocks), -1)
    valid_first = (samples < found.r_target_first).sum(axis=1)
    valid_theory = (samples < found.r_target_theory).sum(axis=1)
    checked = np.full(len(blocks), samples.shape[1])
    first, theory = (
        spread_of_rates(
            valid,
            checked,
            hidden_size=None if found.target_per_nonce else found.hidden_size,
            dimension=found.dimension,
            generator=np.random.default_rng(list(asked.seed.encode())),
        )
        for valid in (valid_first, valid_theory)
    )
    every = [each for _, each in lines]
    intervals = [
        stats.binomtest(int(k), int(n)).proportion_ci(0.99) for k, n in zip(valid_theory, checked, strict=True)
    ]
    return DistributionVerdict(
        asked,
        blocks,
        keys,
        every,
        valid_first,
        valid_theory,
        checked,
        first,
        theory,
        equal=equal_rates(valid_theory, checked),
        outside=sum(not interval.low <= asked.rate <= interval.high for interval in intervals),
    )


def equal_rates(valid: NDArray[np.int64], checked: NDArray[np.int64]) -> float:
    """Return p of Pearson's chi-square test that all blocks have one rate."""
    if not 0 < valid.sum() < checked.sum():
        return 1.0  # no nonce is valid, or all are: in all blocks alike
    return float(stats.chi2_contingency(np.array([valid, checked - valid])).pvalue)


def verdicts(lines: dict[LineKey, Found]) -> list[DistributionVerdict]:
    """Judge each model and scheme; lines come in the order of models, schemes, blocks, keys."""
    groups = itertools.groupby(lines.items(), key=lambda line: (line[0].model, line[0].scheme))
    return [verdict(list(group)) for _, group in groups]
