"""Verdicts on the end-to-end tests, one by one and together: pure functions of the tests' results."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import chdtrc

from pocd.lab.statistics import rate_intervals
from scripts.bench.measuring import new_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from rich.table import Table

NAMED = 3  # nonces that a complaint names; the others it counts


@dataclass(frozen=True, slots=True)
class TrialRound:
    """The round that the daemon was asked to generate, as its batches have to repeat it, and the node's share."""

    block_hash: str
    public_key: str
    r_target: float
    seq_len: int
    scheme: str
    node_id: int
    node_count: int


@dataclass(frozen=True, slots=True)
class StoredProgress:
    """Row of the daemon's store about one round on one node: pocd/store/schema.py."""

    node_id: int
    node_count: int
    cursor: int
    islands: str
    checked: int
    valid: int


@dataclass(frozen=True, slots=True)
class Said:
    """Status and store of the daemon.

    Attributes:
        status: The daemon's last status, after mining was stopped.
        progress: Progress of each round in the daemon's store, after the daemon's end.
        batches: Batches in the daemon's store: whether every receiver has accepted it, and its body.
        waiting: Number of proofs in the daemon's store that no batch holds.
    """

    status: dict[str, Any]
    progress: list[StoredProgress]
    batches: list[tuple[bool, dict[str, Any]]]
    waiting: int


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the results, with the report's fields.

    Attributes:
        test: Number of the test, from 1.
        model: Label of the model in the files' names.
        valid_rate: Valid rate in percent; 0 where nothing was checked.
        callback_batches: Number of batches that the receiver holds; `callback_nonces` is that of nonces.
        rate_per_second: Nonces checked per second, when the daemon was stopped.
        error: All that went wrong or is not consistent; None where nothing is.
    """

    test: int
    model: str
    block_hash: str
    public_key: str
    r_target: float
    total_checked: int = 0
    total_valid: int = 0
    valid_rate: float = 0.0
    callback_batches: int = 0
    callback_nonces: int = 0
    rate_per_second: float = 0.0
    error: str | None = None


# One test: is what the receiver holds what the daemon says?


def complaints(asked: TrialRound, said: Said, held: list[dict[str, Any]], stats: dict[str, Any]) -> list[str]:
    """Name all that is not as it must be, one thing each; empty where the two sides agree.

    Args:
        asked: The round that was requested.
        said: Status and store of the daemon.
        held: The bodies of the batches that the receiver holds.
        stats: The receiver's own counts (its `GET /stats`).
    """
    if len(said.progress) != 1:
        return [f"the daemon mined {len(said.progress)} rounds, and was asked for one"]
    (progress,) = said.progress
    found = [*_of_daemon(asked, said, progress), *_of_receiver(asked, held, stats)]
    theirs = Counter(_proofs(held))
    ours = Counter(_proofs(body for _, body in said.batches))
    if count := theirs.total() - progress.valid:
        found.append(f"the receiver holds {theirs.total()} nonces, {count:+} against the daemon's {progress.valid}")
    for what, proofs in (("are missing at the receiver", ours - theirs), ("are not the daemon's", theirs - ours)):
        if proofs:
            found.append(f"{proofs.total()} nonces {what}, or with another distance: {_some(proofs)}")
    held_nonces = Counter(nonce for nonce, _ in theirs.elements())
    if doubled := [nonce for nonce, times in held_nonces.items() if times > 1]:
        found.append(f"{len(doubled)} nonces were delivered more than once: {_some(doubled)}")
    end = asked.node_id + asked.node_count * progress.checked
    share = range(asked.node_id, end, asked.node_count)
    if foreign := [nonce for nonce in held_nonces if nonce not in share]:
        found.append(f"{len(foreign)} nonces are not of what node {asked.node_id} checked: {_some(foreign)}")
    if invalid := [nonce for nonce, distance in theirs if not 0 <= distance < asked.r_target]:
        found.append(f"{len(invalid)} nonces have a distance that is not below r_target: {_some(invalid)}")
    return found


def _of_daemon(asked: TrialRound, said: Said, progress: StoredProgress) -> list[str]:
    """Check that the daemon's status and store agree."""
    found = []
    if progress.checked == 0:
        found.append("no nonce was checked")
    if progress.cursor != progress.checked or progress.islands != "[]":
        found.append(
            f"the nonces are not dense: {progress.checked} were checked, but without gaps only {progress.cursor}, "
            f"and then {progress.islands}"
        )
    if (progress.node_id, progress.node_count) != (asked.node_id, asked.node_count):
        found.append(f"the daemon mined as node {progress.node_id} of {progress.node_count}")
    status = said.status
    # A batch may have been under way when it answered, so its store may be ahead of it.
    for name, stored in (("total_checked", progress.checked), ("total_valid", progress.valid)):
        if status[name] > stored:
            found.append(f"the daemon's status said {name} {status[name]}, and its store holds {stored}")
    if said.waiting:
        found.append(f"{said.waiting} nonces are in no batch")
    if undelivered := sum(not delivered for delivered, _ in said.batches):
        found.append(f"{undelivered} batches were not delivered")
    return found


def _of_receiver(asked: TrialRound, held: list[dict[str, Any]], stats: dict[str, Any]) -> list[str]:
    """Compare the receiver's batches with the requested round, and with the receiver's own counts."""
    terms = ("block_hash", "public_key", "r_target", "seq_len", "scheme", "node_id")
    others = {name: {body[name] for body in held} - {getattr(asked, name)} for name in terms}
    found = [
        f"{name} should be {getattr(asked, name)!r}, but there are batches with {_some(other)}"
        for name, other in others.items()
        if other
    ]
    counts = {
        "batches": len(held),
        "nonces": sum(len(body["nonces"]) for body in held),
        "conflicts": 0,
        "rejected": 0,
        "validated_batches": 0,
    }
    found += [
        f"the receiver counts {stats[name]} {name}, and it should be {count}"
        for name, count in counts.items()
        if stats[name] != count
    ]
    return found


def _proofs(bodies: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    return [proof for body in bodies for proof in zip(body["nonces"], body["dist"], strict=True)]


def _some(things: Iterable[object]) -> str:
    """Return the first few items as text."""
    texts = list(map(str, things))
    return ", ".join(texts[:NAMED]) + (", …" if len(texts) > NAMED else "")


# All tests together


def results_table(lines: list[Line]) -> Table:
    """Return a table with a row for each line."""
    table = new_table(
        "tests",
        "test",
        "model",
        "block",
        "key",
        "r_target",
        "checked",
        "valid",
        "rate",
        "batches",
        "nonces",
        "/s",
        "error",
    )
    for line in lines:
        table.add_row(
            *(str(line.test), line.model, line.block_hash, line.public_key, f"{line.r_target:g}"),
            *(str(line.total_checked), str(line.total_valid), f"{line.valid_rate:.2f}%"),
            *(str(line.callback_batches), str(line.callback_nonces), f"{line.rate_per_second:.1f}", line.error or "–"),
        )
    return table


def spread_table(lines: list[Line]) -> Table:
    """Return a table of how far valid rates lie apart, per model: between block hashes, and as a control between keys.

    All in points but p. The interval holds the spread of the true rates with 95% confidence, whatever it is; p is the
    probability of rates so far apart, by the noise of sampling alone, were all of them one (chi-square: a rough one
    where fewer than about 5 are valid).
    """
    table = new_table(
        "spread of valid rates (points)",
        *("model", "between", "valid rates", "spread", "95% interval", "p if all were one"),
    )
    for model in dict.fromkeys(line.model for line in lines):
        ours = [line for line in lines if line.model == model and line.total_checked]
        groups = {"blocks": _by((line.block_hash, line) for line in ours)}
        # Keys are compared within a block only: over all of them a key that checked more of one would differ.
        for block in dict.fromkeys(line.block_hash for line in ours):
            groups[f"keys of {block}"] = _by((line.public_key, line) for line in ours if line.block_hash == block)
        for between, counts in groups.items():
            table.add_row(model, between, *_spread_cells(counts))
    return table


def _by(named: Iterable[tuple[str, Line]]) -> NDArray[np.int64]:
    """Return valid and checked nonces [2, names], summed over the lines of each name."""
    sums: dict[str, NDArray[np.int64]] = {}
    for name, line in named:
        sums[name] = sums.get(name, np.zeros(2, np.int64)) + np.array([line.total_valid, line.total_checked])
    return np.array(list(sums.values()), np.int64).reshape(-1, 2).T


def _spread_cells(counts: NDArray[np.int64]) -> list[str]:
    if counts.shape[1] < 2:
        return ["too few to compare", "", "", ""]
    valid, checked = counts
    low, high, p_value = _spread(valid, checked)
    rates = 100 * valid / checked
    shown = "  ".join(f"{rate:.2f}" for rate in rates)
    return [shown, f"{np.ptp(rates):.2f}", f"{100 * low:.2f}–{100 * high:.2f}", f"{p_value:.2g}"]


def _spread(valid: NDArray[np.int64], checked: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return the bounds of the true rates' spread, shares, and the p-value of equal rates."""
    lowest, highest = rate_intervals(valid, checked)
    low, high = max(0.0, float(lowest.max() - highest.min())), float(highest.max() - lowest.min())
    common = valid.sum() / checked.sum()
    if common in {0, 1}:
        return low, high, 1.0
    square = ((valid - common * checked) ** 2 / (checked * common * (1 - common))).sum()
    return low, high, float(chdtrc(len(valid) - 1, square))
