"""Cut the power at many moments of a store's life, and judge what is left of it.

Usage: .venv/bin/python -m scripts.trials.powercut [--steps 500] [--cuts 4000] [--seed 1] [--begin FILE.sql]

A store lives in processes of its own, whose every write is recorded (workload.py, recorder.c). Each cut draws a moment
of the recording, half of them beside a sync or a change of names, and what the disk has by then (disk.py); the store's
own code opens that, and verdict.py judges it. The draws follow from the seed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sqlite3
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.table import Table

from pocd.process import EXIT_OK, EndedError
from scripts.trials.powercut.disk import Disk, Left, Operation
from scripts.trials.powercut.recording import recorded, scratch
from scripts.trials.powercut.verdict import STORE, Promise, is_commit, is_mark, judge

if TYPE_CHECKING:
    from collections.abc import Mapping


LIVES = 3  # of the process; each ends by a kill, and the next one finds the log


def live(folder: Path, seed: int, steps: int, begin: str | None = None) -> tuple[dict[str, bytes], list[Operation]]:
    """Let a store live under the recorder, through kills of its process.

    Args:
        folder: An empty folder.
        seed: What is drawn follows from it.
        steps: Number of things that it does until it is killed.
        begin: SQL that makes the store at first, as of an earlier version; None for a new one.

    Returns:
        The files at the beginning, and what was done to them.
    """
    root = folder / "root"
    root.mkdir()
    files: dict[str, bytes] = {}
    if begin is not None:
        path = root / STORE
        path.parent.mkdir()
        with closing(sqlite3.connect(path)) as db:
            db.executescript(begin)
        files[STORE] = path.read_bytes()
    program = ["-m", "scripts.trials.powercut.workload", str(root)]
    return files, recorded(folder, root, [[*program, f"{seed}-{life}", str(steps)] for life in range(LIVES)])


def moments(operations: list[Operation], cuts: int, chance: random.Random) -> Counter[int]:
    """Draw the moments of the cuts: how many there are before each operation."""
    last = len(operations)
    edges = [at for at, each in enumerate(operations) if each.kind not in {"write", "truncate"}]
    drawn = [chance.randint(0, last) for _ in range(cuts - cuts // 2)]
    return Counter(drawn + [min(last, chance.choice(edges) + chance.randint(0, 1)) for _ in range(cuts // 2)])


def cut(
    files: Mapping[str, bytes], operations: list[Operation], cuts: Mapping[int, int], folder: Path, seed: int
) -> tuple[Counter[str], list[str]]:
    """Cut the power at the given moments.

    Args:
        files: The files at the beginning.
        operations: What was done to them.
        cuts: Number of cuts before each operation, by its place.
        folder: A folder for what is left.
        seed: What is left of writes that were not synced follows from it.

    Returns:
        Number of cuts by what was left, and what was wrong.
    """
    chance = random.Random(seed)  # noqa: S311 - it has to be repeatable, not secret
    disk, tally, complaints = Disk(files), Counter[str](), list[str]()
    promise = Promise.first(operations)
    for at in range(len(operations) + 1):
        for number in range(cuts.get(at, 0)):
            how = chance.choice(get_args(Left))
            root = folder / f"{at}-{number}"
            _write(root, disk.left(how, chance))
            tally[how] += 1
            complaints += [f"cut before operation {at}, left {how}: {each}" for each in judge(root, promise)]
            shutil.rmtree(root)
        for operation in operations[at : at + 1]:
            if is_mark(operation):
                promise.heed(operation)
            else:
                disk.do(operation)
    return tally, complaints


def _write(root: Path, files: Mapping[str, bytes]) -> None:
    (root / STORE).parent.mkdir(parents=True)
    for name, content in files.items():
        (root / name).write_bytes(content)


def report(operations: list[Operation], tally: Counter[str], complaints: list[str], seconds: float) -> Table:
    """Return a table of what was recorded, cut and found."""
    table = Table("what", "count", title=f"power cuts, {seconds:.0f} s")
    kinds = Counter(each.kind for each in operations if not is_mark(each))
    table.add_row("operations recorded", str(kinds.total()))
    for kind in ("write", "truncate", "sync", "unlink"):
        table.add_row(f"of which {kind}", str(kinds[kind]))
    table.add_row("commits", str(sum(is_commit(each) for each in operations)))
    for how in get_args(Left):
        table.add_row(f"cuts that left {how} of what was not synced", str(tally[how]))
    table.add_row("complaints", str(len(complaints)))
    table.add_row("verdict", "WRONG" if complaints else "all is well")
    return table


def main() -> int:
    """Live, cut, judge and print."""
    parser = argparse.ArgumentParser(description="Cut the power at many moments of a store's life.")
    parser.add_argument("--steps", type=int, default=500, help="things that the store does until each of its kills")
    parser.add_argument("--cuts", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--begin", type=Path, help="SQL that makes the store at first, as of an earlier version")
    arguments = parser.parse_args()
    console, began = Console(highlight=False), time.monotonic()
    console.print(f"seed {arguments.seed}, {arguments.steps} steps, {arguments.cuts} cuts")
    with scratch() as folder:
        try:
            begin = arguments.begin.read_text() if arguments.begin else None
            files, operations = live(folder, arguments.seed, arguments.steps, begin)
        except EndedError as error:
            console.print(f"wrong: {error}", soft_wrap=True)
            return 1
        chance = random.Random(arguments.seed)  # noqa: S311 - it has to be repeatable, not secret
        drawn = moments(operations, arguments.cuts, chance)
        tally, complaints = cut(files, operations, drawn, folder, arguments.seed)
    console.print(report(operations, tally, complaints, time.monotonic() - began))
    for complaint in complaints[:20]:
        console.print(f"wrong: {complaint}", soft_wrap=True)
    return 1 if complaints else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
