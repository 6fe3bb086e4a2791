"""A life of the store, as a daemon leads it: mining, batches, deliveries, validations, upkeep, copies, restarts.

Usage: python -m scripts.trials.powercut.workload FOLDER SEED STEPS

Run under the recorder. What the store says to its callers is written to FOLDER/marks, so that it stands in the
recording between the writes: `intent` before a commit, with what the store holds then, `done` after it, `opened` after
an opening, and `copy` after a copy of the store. Every nonce is valid; what is done follows from the seed.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import get_args

import orjson

from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs, Round
from pocd.store import deliveries, selections, upkeep, validations
from pocd.store.backup import back_up
from pocd.store.batches import form_batches
from pocd.store.outbox import Outbox, Work
from pocd.store.proofs import CheckedSpan, Weights, commit_spans
from pocd.store.requested import register_callback
from pocd.store.rounds import recent_rounds, reinstate_round, replace_round
from pocd.store.selections import Selection, SetAsideState
from scripts.trials.powercut.verdict import MARKS, STORE, content

NODE = Node(1, 3)
WEIGHTS = Weights("f00d", "float32")
RECEIVERS = ("first", "second")
SET_ASIDE: tuple[SetAsideState, ...] = get_args(SetAsideState)
NOW = 1_700_000_000.0
# Far below what a daemon has: so the log is brought into the file, and is cut, many times.
CHECKPOINT_PAGES, LOG_BYTES = 40, 64 * 1024


class Marks:
    """What the store says, written down between the writes."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / MARKS, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def __call__(self, kind: str, outbox: Outbox, file: str = "") -> None:
        """Write what the store holds now."""
        os.write(self._file, orjson.dumps({"kind": kind, "content": content(outbox.db), "file": file}))

    def arm(self) -> None:
        """Mark every commit."""
        commit = Outbox._commit  # noqa: SLF001 - it is wrapped

        def committing(outbox: Outbox) -> None:
            self("intent", outbox)
            commit(outbox)
            self("done", outbox)

        setattr(Outbox, "_commit", committing)  # noqa: B010 - mypy takes no assignment to a method


class Life:
    """The store at work, step by step."""

    def __init__(self, folder: Path, chance: random.Random, marks: Marks) -> None:
        self._path = folder / STORE
        self._chance = chance
        self._marks = marks
        self._now = NOW
        self._outbox = self._opened()
        self._height = max((known.block_height for known in recent_rounds(self._outbox, 1)), default=100)
        self._round = self._next_round()

    def _opened(self) -> Outbox:
        outbox = Outbox.open(self._path)
        outbox.db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        outbox.db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        self._marks("opened", outbox)
        return outbox

    def _next_round(self) -> Round:
        self._height += 1
        round_ = Round(f"H{self._height}", self._height, "miner", 2.0, "poc2", "tiny", 16)
        self._outbox.begin_round(Work(round_, NODE), self._now)
        return round_

    def step(self) -> None:
        """Do one of the things that a daemon does, the frequent ones more often."""
        self._now += self._chance.uniform(0, 20)
        does = {
            self._mine: 30,
            self._form: 15,
            self._deliver: 40,
            self._head: 5,
            self._turn: 4,
            self._reorganise: 2,
            self._operate: 5,
            self._validate: 4,
            self._keep: 4,
            self._copy: 1,
            self._restart: 2,
        }
        (chosen,) = self._chance.choices(list(does), list(does.values()))
        chosen()

    def _mine(self) -> None:
        progress = self._outbox.begin_round(Work(self._round, NODE), self._now).progress
        start = progress.cursor if self._chance.random() < 0.8 else _end(progress.islands, progress.cursor) + 8
        stop = min([start + 8, *(island.start for island in progress.islands if island.start > start)])
        span = Span(start, stop)
        proofs = Proofs.of_distances((nonce, self._chance.uniform(0, 2)) for nonce in NODE.nonces(span))
        commit_spans(self._outbox, [CheckedSpan(self._round, NODE, span, proofs, WEIGHTS)], self._now)

    def _form(self) -> None:
        form_batches(self._outbox, RECEIVERS, size=7, age=10.0, now=self._now, current=self._round)

    def _deliver(self) -> None:
        receiver = self._chance.choice(RECEIVERS)
        head = deliveries.next_pending(self._outbox, receiver)
        if head is None:
            return
        match self._chance.choices(("accepted", "failed", "refused", "parked", "expired"), (80, 10, 5, 2, 3))[0]:
            case "accepted":
                deliveries.record_delivered(self._outbox, receiver, head.batch, self._now)
            case "failed":
                next_at = self._now + 1
                deliveries.record_failed(self._outbox, receiver, head.batch, "HTTP 503", fault=True, next_at=next_at)
            case "refused":
                deliveries.record_set_aside(self._outbox, receiver, head.batch, "HTTP 422", self._now)
            case "parked":
                deliveries.record_parked(self._outbox, receiver, head.batch, "HTTP 410", "http://there", self._now)
            case _:
                deliveries.expire(self._outbox, receiver, queued_before=self._now - 300, now=self._now)

    def _head(self) -> None:
        self._outbox.remember_head("chain", self._height)

    def _turn(self) -> None:
        self._round = self._next_round()

    def _reorganise(self) -> None:
        replace_round(self._outbox, self._round, "replaced", withdraw=True, now=self._now)
        if self._chance.random() < 0.5:
            reinstate_round(self._outbox, self._round, self._now)

    def _operate(self) -> None:
        state = self._chance.choice(SET_ASIDE)
        match self._chance.choice(("again", "purge", "control", "ask", "callback")):
            case "again":
                selections.send_again(self._outbox, Selection((state,)), self._now)
            case "purge":
                selections.purge(self._outbox, Selection((state,)), self._now)
            case "control":
                mode = self._chance.choice(('{"mode":"STOPPED","asked":null}', None))
                self._outbox.set_control(mode, None, self._now)
            case "ask":
                deliveries.ask_again(self._outbox, self._chance.choice(RECEIVERS))
            case _:
                with self._outbox.transaction():
                    register_callback(self._outbox.db, f"callback-{self._height}", "http://there")

    def _validate(self) -> None:
        name = f"v{self._chance.randrange(10)}"
        if name not in validations.pending(self._outbox):
            validations.ask(self._outbox, name, b"asked", callback=None, most=5, now=self._now)
        else:
            validations.fail(self._outbox, name, "no distance", self._now)

    def _keep(self) -> None:
        upkeep.prune_delivered(self._outbox, self._now - 100)
        upkeep.prune_rounds(self._outbox)
        validations.prune(self._outbox, self._now - 100)
        upkeep.shift_times(self._outbox, 1.0)
        upkeep.clamp_times(self._outbox, self._now)

    def _copy(self) -> None:
        number = len(list(self._path.parent.glob("copy-*.db"))) + 1
        copy = self._path.with_name(f"copy-{number}.db")
        back_up(self._outbox.db, copy)
        self._marks("copy", self._outbox, copy.name)

    def _restart(self) -> None:
        if self._chance.random() < 0.5:
            self._outbox.look_again()
            self._marks("opened", self._outbox)
        else:
            self._outbox.close()
            self._outbox = self._opened()


def _end(islands: tuple[Span, ...], cursor: int) -> int:
    return max([cursor, *(island.stop for island in islands)])


def main() -> None:
    """Live so many steps, then end at once, as a kill does."""
    folder, seed, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    marks = Marks(folder)
    marks.arm()
    life = Life(folder, random.Random(seed), marks)  # noqa: S311 - it has to be repeatable, not secret
    for _ in range(steps):
        life.step()
    os._exit(0)


if __name__ == "__main__":
    main()
