"""What a fleet asks of one chain node and one receiver: `python -m scripts.trials.fleet`.

Fleets of several sizes run through one plan in virtual time, each with the jitter of polls, batches and retries, and
without: all hosts start at one moment, a round begins, the chain's node fails for a minute, the receiver for ten.
With `--real` three real daemons run through a shorter plan, beside three simulated ones that find as much.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from scripts.bench.measuring import new_table, show
from scripts.trials import virtual_time
from scripts.trials.fleet_real import PLAN, observe
from scripts.trials.fleet_world import Plan, Seen, simulate

if TYPE_CHECKING:
    from collections import Counter

AFTER_SECONDS = 30.0  # that count as being after an outage
ROUND_SECONDS = 10.0  # that count as the beginning of a round


def over(counter: Counter[int], begin: float, end: float) -> tuple[float, int]:
    """Return the mean a second, and the most in one, from one second to another."""
    counts = [counter[second] for second in range(int(begin), int(end))]
    return sum(counts) / len(counts), max(counts)


def rows(plan: Plan, seen: Seen) -> dict[str, str]:
    """Return what is to be told of a fleet, by the name of each quantity."""
    usual, fresh = (plan.steady, plan.new_round), (plan.new_round, plan.new_round + ROUND_SECONDS)
    recovery = plan.receiver_down[1]
    return {
        "chain, first second": f"{seen.polls[0]:,}",
        "chain": _both(over(seen.polls, *usual)),
        "chain, a round begins": _both(over(seen.polls, *fresh)),
        "chain, node fails": _both(over(seen.polls, *plan.node_down)),
        "chain, node is back": _both(over(seen.polls, plan.node_down[1], plan.receiver_down[0])),
        "receiver": _both(over(seen.posts, *usual)),
        "receiver, a round begins": _both(over(seen.posts, *fresh)),
        "receiver fails": _both(over(seen.posts, *plan.receiver_down)),
        "receiver is back": _both(over(seen.posts, recovery, recovery + AFTER_SECONDS)),
        "bytes to the receiver": _both(over(seen.sent, *usual)),
        "proofs": _both(over(seen.proofs, *usual)),
        "queues empty again": "never" if seen.drained_at is None else f"{seen.drained_at - recovery:,.0f} s later",
        "attempts for a batch": f"{seen.posts.total() / max(1, seen.accepted.total()):.2f}",
    }


def _both(found: tuple[float, int]) -> str:
    mean, peak = found
    return f"{mean:,.1f} / {peak:,}" if mean < 1000 else f"{mean:,.0f} / {peak:,}"


def compare(title: str, columns: dict[str, dict[str, str]]) -> None:
    """Print quantities side by side."""
    table = new_table(f"{title}: mean / most in one second", "a second", *columns)
    for name in next(iter(columns.values())):
        table.add_row(name, *(column[name] for column in columns.values()))
    show(table)


def main() -> None:
    """Run the trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--proofs", type=float, default=15.0, help="that a host finds in a second")
    parser.add_argument("--receiver", type=float, default=600.0, help="batches that the receiver takes in a second")
    parser.add_argument("--real", action="store_true", help="three real daemons instead, beside three simulated ones")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    if given.real:
        with tempfile.TemporaryDirectory() as folder:
            plan, seen = asyncio.run(observe(PLAN, Path(folder)))
        simulated = virtual_time.run(simulate(plan))
        compare(f"{plan.hosts} hosts", {"real": rows(plan, seen), "simulated": rows(plan, simulated)})
        return
    for has_jitter in (True, False):
        plans = [Plan(hosts, given.proofs, given.receiver, has_jitter) for hosts in given.hosts]
        columns = {f"{plan.hosts:,}": rows(plan, virtual_time.run(simulate(plan))) for plan in plans}
        compare(f"hosts {'with' if has_jitter else 'without'} jitter", columns)


if __name__ == "__main__":
    main()
