"""What the end-to-end tests must leave behind, and what they say together: pure functions over what was found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from measuring import new_table
from scipy.special import chdtrc

from pocd.statistics import rate_intervals

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from rich.table import Table

NAMED = 3  # nonces that a complaint names; the others it counts


@dataclass(frozen=True, slots=True)
class Asked:
    """What the daemon was asked to generate, as its batches have to repeat it, and its share of the nonces."""

    block_hash: str
    public_key: str
    r_target: float
    seq_len: int
    scheme: str
    node_id: int
    node_count: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What the daemon's store says of one round on one node: pocd/delivery/schema.py."""

    node_id: int
    node_count: int
    cursor: int
    islands: str
    checked: int
    valid: int


@dataclass(frozen=True, slots=True)
class Said:
    """What the daemon says.

    Attributes:
        status: Its last answer, after it was stopped.
        progress: Of each round in its store, after its end.
        batches: The bodies of the batches in its store, by whether every receiver has accepted them.
        waiting: Proofs in its store that no batch holds.
    """

    status: dict[str, Any]
    progress: list[Progress]
    batches: list[tuple[bool, dict[str, Any]]]
    waiting: int


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the results, with the report's fields.

    Attributes:
        test: Its number, from 1.
        model: What it is called in the files' names.
        valid_rate: In percent; 0 where nothing was checked.
        callback_batches: That the receiver holds; likewise the nonces.
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


def complaints(asked: Asked, said: Said, held: list[dict[str, Any]], stats: dict[str, Any]) -> list[str]:
    """Name all that is not as it must be, one thing each; empty where the two sides agree.

    Args:
        asked: What the test is about.
        said: By the daemon.
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


def _of_daemon(asked: Asked, said: Said, progress: Progress) -> list[str]:
    """Hold what the daemon says against itself."""
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


def _of_receiver(asked: Asked, held: list[dict[str, Any]], stats: dict[str, Any]) -> list[str]:
    """Hold what the receiver has against what was asked for, and against what it counts."""
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
    """The first few of them."""
    texts = list(map(str, things))
    return ", ".join(texts[:NAMED]) + (", …" if len(texts) > NAMED else "")


# All tests together


def results_table(lines: list[Line]) -> Table:
    """Show each line."""
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
    """Show how far valid rates lie apart, per model: between the block hashes, and between the keys as a control.

    All in points but p. The interval holds the spread of the true rates with 95% confidence, whatever it is; p is the
    probability of rates so far apart, by the noise of sampling alone, were all of them one (chi-square).
    """
    table = new_table(
        "spread of valid rates (points)",
        *("model", "between", "valid rates", "spread", "95% interval", "p if all were one"),
    )
    for model in dict.fromkeys(line.model for line in lines):
        for between, of in (("blocks", "block_hash"), ("keys", "public_key"), ("tests", "test")):
            counts: dict[Any, list[int]] = {}
            for line in lines:
                if line.model == model and line.total_checked:
                    sums = counts.setdefault(getattr(line, of), [0, 0])
                    sums[0] += line.total_valid
                    sums[1] += line.total_checked
            if len(counts) < 2:
                table.add_row(model, between, "too few to compare", "", "", "")
                continue
            valid, checked = np.array(list(counts.values()), np.int64).T
            low, high, p_value = _spread(valid, checked)
            rates = 100 * valid / checked
            shown = [f"{rate:.2f}" for rate in rates] if of != "test" else [f"{rates.min():.2f}–{rates.max():.2f}"]
            table.add_row(
                *(model, between, "  ".join(shown), f"{np.ptp(rates):.2f}"),
                *(f"{100 * low:.2f}–{100 * high:.2f}", f"{p_value:.2g}"),
            )
    return table


def _spread(valid: NDArray[np.int64], checked: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return the bounds of the true rates' spread, shares, and the p-value of equal rates."""
    lowest, highest = rate_intervals(valid, checked)
    low, high = max(0.0, float(lowest.max() - highest.min())), float(highest.max() - lowest.min())
    common = valid.sum() / checked.sum()
    if common in {0, 1}:
        return low, high, 1.0
    square = ((valid - common * checked) ** 2 / (checked * common * (1 - common))).sum()
    return low, high, float(chdtrc(len(valid) - 1, square))
