"""Whole lives of a store and its receivers: mining, delivering, crashes, clocks, operators, in any order.

The network is the only thing that is played: the store is real SQLite, the dispatchers are the daemon's own.
"""

import shutil
import tempfile
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from struct import unpack
from typing import Any, Concatenate, ParamSpec, TypeVar

import orjson
import structlog
import uvloop
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pocd.delivery.dispatcher import Dispatcher
from pocd.delivery.policy import Outcome
from pocd.delivery.posting import Receiver
from pocd.protocol.nonces import Ledger, Node, Span
from pocd.protocol.proof import Proofs, Round, results_in
from pocd.store import deliveries, selections, upkeep
from pocd.store.batches import form_batches
from pocd.store.deliveries import PendingDelivery, next_pending
from pocd.store.outbox import Outbox, Queue, Totals, Work
from pocd.store.proofs import CheckedSpan, Weights, commit_spans
from pocd.store.rounds import replace_round
from pocd.store.selections import Selection
from pocd.store.thread import OutboxThread
from tests.support.clocks import ManualClock
from tests.support.delivering import events
from tests.support.stored import proofs_of

P = ParamSpec("P")
T = TypeVar("T")

WEIGHTS = Weights("f00d", "float32")
NODE = Node(1, 3)
WEEK = 604_800.0
MEMORY = Path("/dev/shm")  # thousands of transactions: their fsyncs are tested elsewhere
ROUNDS = (
    Round("X", 1, "miner", 1.4, "poc2", "tiny", 16),
    Round("Y", 2, "miner", None, "poc4", "tiny", 16),
    Round("Z", 3, "miner", 1.4, "poc2", "tiny", 16),
)
BY_ID = {each.id: each for each in ROUNDS}
BY_HASH = {each.block_hash: each for each in ROUNDS}
RECEIVERS = ("a", "b")
QUIET = structlog.wrap_logger(structlog.PrintLogger(), wrapper_class=structlog.make_filtering_bound_logger(50))
SET_ASIDE: tuple[selections.DeliveryState, ...] = ("dead", "expired", "withdrawn")

OUTCOMES = st.sampled_from(
    [
        Outcome(status, f"HTTP {status}")
        for status in (200, 200, 200, 204, 302, 401, 404, 422, 413, 410, 429, 500, 500, 503)
    ]
    + [
        Outcome(503, "HTTP 503", retry_after=1e9),
        Outcome(429, "HTTP 429", retry_after=0.0),
        Outcome(None, "no answer within 15 s", broke=True),
        Outcome(None, "no answer within 15 s", broke=True),
        Outcome(None, "refused"),
    ]
)


class Played(Dispatcher):
    """A dispatcher whose attempts end as the test says, and that notes what a receiver got to see."""

    outcomes: list[Outcome]
    arrivals: list[PendingDelivery]

    async def _attempt(self, _session: object, delivery: PendingDelivery) -> Outcome:
        outcome = self.outcomes.pop(0) if self.outcomes else Outcome(None, "refused")
        if outcome.status is not None or outcome.broke:
            self.arrivals.append(delivery)
        return outcome


@dataclass
class Model:
    """What the store has to hold, kept in plain lists. Deliveries are pairs of receiver and batch number."""

    done: dict[Round, set[int]] = field(default_factory=dict)
    found: list[tuple[str, int, float | bytes]] = field(default_factory=list)  # round id, nonce, distance or vector
    batches: dict[int, tuple[str, bytes, int, tuple[str, ...]]] = field(default_factory=dict)  # id, body, nonces, whose
    arrived: dict[str, list[PendingDelivery]] = field(default_factory=lambda: {name: [] for name in RECEIVERS})
    accepted: set[tuple[str, int]] = field(default_factory=set)
    purged: set[tuple[str, int]] = field(default_factory=set)


@dataclass(frozen=True)
class Seen:
    """Rows of the store at one moment."""

    proofs: list[tuple[str, int, bytes, bytes]]  # round id, size, nonces, results
    deliveries: dict[tuple[str, int], str]  # the state of each
    bodies: dict[int, bytes]


def seen(outbox: Outbox) -> Seen:
    rows = outbox.db.execute
    return Seen(
        rows("SELECT id, size, nonces, results FROM proofs JOIN rounds ON rounds.number = proofs.round").fetchall(),
        {(name, batch): state for name, batch, state in rows("SELECT receiver, batch, state FROM deliveries")},
        dict(rows("SELECT number, body FROM batches").fetchall()),
    )


def listed(round_: Round, proofs: Proofs) -> list[tuple[str, int, float | bytes]]:
    """Return proofs as `Model.found` has them."""
    results: Sequence[float | bytes] = proofs.distances if round_.output == "distance" else proofs.vectors
    name = round_.id
    return [(name, nonce, result) for nonce, result in zip(proofs.nonces, results, strict=True)]


class OutboxLife(RuleBasedStateMachine):
    """A life of the store with crashes at every point between its transactions."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="pocd-outbox-", dir=MEMORY if MEMORY.is_dir() else None))
        self.generation = 0
        self.clock = ManualClock()
        self.model = Model()
        self.loop = uvloop.new_event_loop()
        self.open()

    @property
    def path(self) -> Path:
        return self.folder / f"{self.generation}.db"

    @property
    def outbox(self) -> Outbox:
        return self.thread.view

    def call(self, method: Callable[Concatenate[Outbox, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.loop.run_until_complete(self.thread(method, *args, **kwargs))

    def open(self) -> None:
        self.thread = OutboxThread(self.path)
        self.dispatchers = {name: self.dispatcher(name) for name in RECEIVERS}
        self.leased: list[Span] = []
        self.active: Round | None = None

    def dispatcher(self, name: str) -> Played:
        made = Played(
            Receiver(name, "http://127.0.0.1:1", None),
            self.thread,
            expire_after=WEEK,
            clock=self.clock,
            jitter=lambda: 0.0,
            log=QUIET,
            events=events(),
        )
        made.outcomes, made.arrivals = [], self.model.arrived[name]
        return made

    @initialize()
    def start(self) -> None:
        self.begin(ROUNDS[0])

    # Mining

    @rule(round_=st.sampled_from(ROUNDS))
    def begin(self, round_: Round) -> None:
        """Take up a round as the miner does: from what the store says was done."""
        done = self.call(Outbox.begin_round, Work(round_, NODE), self.clock.now)
        mine = self.model.done.setdefault(round_, set())
        islands = [range(island.start, island.stop) for island in done.progress.islands]
        assert set(range(done.progress.cursor)).union(*islands) == mine
        assert done.checked == len(mine)
        assert done.valid == sum(round_id == round_.id for round_id, _, _ in self.model.found)
        self.ledger = Ledger(done.progress)
        self.leased = []
        self.active = round_

    @precondition(lambda self: self.active)
    @rule(count=st.integers(1, 4))
    def lease(self, count: int) -> None:
        span = self.ledger.take(count)
        assert span is not None
        self.leased.append(span)

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), count=st.integers(1, 3))
    def commit_spans(self, data: st.DataObject, count: int) -> None:
        """Commit some of what is leased, in one group."""
        assert self.active is not None
        spans = [self.leased.pop(data.draw(st.integers(0, len(self.leased) - 1))) for _ in self.leased[:count]]
        group = [CheckedSpan(self.active, NODE, span, self.draw_proofs(data, span), WEIGHTS) for span in spans]
        counted = self.call(commit_spans, group, self.clock.now)
        assert [(each.checked, each.proofs) for each in counted] == [(len(done.span), done.proofs) for done in group]
        for done in group:
            self.note_found(done.span, done.proofs)

    def draw_proofs(self, data: st.DataObject, span: Span) -> Proofs:
        assert self.active is not None
        valid = sorted(data.draw(st.lists(st.sampled_from(NODE.nonces(span)), unique=True)))
        if self.active.output == "vector":
            return proofs_of(self.active, valid)
        below = st.floats(0, 1.4, exclude_max=True)
        return Proofs.of_distances((nonce, data.draw(below)) for nonce in valid)

    def note_found(self, span: Span, proofs: Proofs) -> None:
        assert self.active is not None
        self.model.done[self.active] |= set(range(span.start, span.stop))
        self.model.found += listed(self.active, proofs)

    @rule(
        receivers=st.sampled_from([(), ("a",), RECEIVERS, RECEIVERS]),
        size=st.integers(1, 3),
        over=st.booleans(),
    )
    def form_batches(self, receivers: tuple[str, ...], size: int, over: bool) -> None:  # noqa: FBT001 - drawn by name
        current = None if over else self.active
        self.call(form_batches, receivers, size=size, age=100.0, now=self.clock.now, current=current)
        for number, name, body, nonces in self.rows("SELECT number, id, body, nonces FROM batches ORDER BY number"):
            if number not in self.model.batches:
                self.model.batches[number] = (name, body, nonces, receivers)
                assert 1 <= nonces <= size
        if receivers and over:
            assert self.rows("SELECT count(*) FROM proofs") == [(0,)]

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self.call(lambda outbox: outbox.db.execute(sql).fetchall())

    @precondition(lambda self: self.active)
    @rule(count=st.integers(1, 4), receivers=st.sampled_from([("a",), RECEIVERS, RECEIVERS]), size=st.integers(1, 2))
    def store(self, count: int, receivers: tuple[str, ...], size: int) -> None:
        """Find nonces and form batches of them, so that there is something to deliver."""
        assert self.active is not None
        span = self.ledger.take(count)
        assert span is not None
        proofs = proofs_of(self.active, NODE.nonces(span))
        self.call(commit_spans, [CheckedSpan(self.active, NODE, span, proofs, WEIGHTS)], self.clock.now)
        self.note_found(span, proofs)
        self.form_batches(receivers, size, over=True)

    # Delivering

    @rule(receiver=st.sampled_from(RECEIVERS), outcomes=st.lists(OUTCOMES, min_size=1, max_size=6))
    def attempt(self, receiver: str, outcomes: list[Outcome]) -> None:
        """Deliver as the dispatcher does, its waits left out, until the script is played or the queue empty."""
        dispatcher = self.dispatchers[receiver]
        dispatcher.outcomes = list(outcomes)
        while dispatcher.outcomes and dispatcher.state.parked_at is None:
            self.clock.now += max(0.0, min(dispatcher.state.next_at - self.clock.now, 1000.0))
            head = self.call(next_pending, receiver)
            if head is None:
                break
            self.loop.run_until_complete(dispatcher._deliver(None, head))  # type: ignore[arg-type] # the network is played
        self.note_accepted()

    def note_accepted(self) -> None:
        for receiver, batch in self.rows("SELECT receiver, batch FROM deliveries WHERE state = 'delivered'"):
            self.model.accepted.add((receiver, batch))

    # Operators, chains, clocks

    @rule(receiver=st.sampled_from([None, *RECEIVERS]), states=st.sets(st.sampled_from(SET_ASIDE), min_size=1))
    def send_again(self, receiver: str | None, states: set[selections.DeliveryState]) -> None:
        selection = Selection(tuple(sorted(states)), receiver)
        queued = self.call(selections.send_again, selection, self.clock.now)
        assert not self.call(selections.send_again, selection, self.clock.now)
        for name, batch in queued:
            assert (name, batch) not in self.model.accepted
        for name in {name for name, _ in queued} | ({receiver} if receiver else set()):
            self.call(deliveries.ask_again, name)

    @rule(receiver=st.sampled_from(RECEIVERS), state=st.sampled_from([*SET_ASIDE, "pending"]))
    def purge(self, receiver: str, state: selections.DeliveryState) -> None:
        self.model.purged |= set(self.call(selections.purge, Selection((state,), receiver), self.clock.now))

    @precondition(lambda self: self.active)
    @rule(found=st.integers(0, 3), comes_back=st.booleans())
    def replace_round(self, found: int, comes_back: bool) -> None:  # noqa: FBT001 - drawn by name
        """The active round's block is replaced, with something of it unsent; perhaps it is the chain's again later."""
        assert self.active is not None
        if found:
            self.store(found, RECEIVERS, size=1)
        replaced = self.active
        self.call(replace_round, replaced, "block replaced", withdraw=True, now=self.clock.now)
        self.nothing_is_wrong()
        self.active, self.leased = None, []
        if comes_back:
            self.begin(replaced)

    @rule(receiver=st.sampled_from(RECEIVERS))
    def expire_unserved(self, receiver: str) -> None:
        self.call(deliveries.expire, receiver, queued_before=self.clock.now - WEEK, now=self.clock.now)

    @rule()
    def prune(self) -> None:
        self.call(upkeep.prune_delivered, self.clock.now - WEEK)
        self.call(upkeep.prune_rounds)

    @rule(seconds=st.sampled_from([-1e9, -3600.0, 1.0, 60.0, WEEK]))
    def set_clock(self, seconds: float) -> None:
        self.clock.now = max(1e9, self.clock.now + seconds)
        if seconds < 0:
            self.call(upkeep.clamp_times, self.clock.now)

    @rule()
    def reopen(self) -> None:
        self.thread.close()
        self.open()

    @rule()
    def crash(self) -> None:
        """Go on from a copy of the files as they are on disk, with no chance for the store to say goodbye."""
        old = self.path
        self.generation += 1
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{old}{suffix}", f"{self.path}{suffix}")
        self.thread.close()
        self.open()

    def teardown(self) -> None:
        """In the end every receiver is well: then it gets everything that nobody gave up."""
        self.call(selections.send_again, Selection(SET_ASIDE), self.clock.now)
        for name, dispatcher in self.dispatchers.items():
            self.call(deliveries.ask_again, name)
            while head := self.call(next_pending, name):
                dispatcher.outcomes = [Outcome(200, "HTTP 200")]
                self.loop.run_until_complete(dispatcher._deliver(None, head))  # type: ignore[arg-type] # the network is played
        self.note_accepted()
        every = {(name, number) for number, (_, _, _, names) in self.model.batches.items() for name in names}
        assert every - self.model.purged <= self.model.accepted
        self.nothing_is_wrong()
        self.thread.close()
        self.loop.close()
        shutil.rmtree(self.folder)

    @invariant()
    def nothing_is_wrong(self) -> None:
        now = self.call(seen)
        self.every_proof_is_in_one_place(now)
        self.every_delivery_is_in_one_state(now)
        self.arrivals_are_in_order_and_unchanged()
        self.the_counts_are_those_of_the_rows(now)

    def every_proof_is_in_one_place(self, now: Seen) -> None:
        held: list[tuple[str, int, float | bytes]] = []
        for name, size, nonces, results in now.proofs:
            held += listed(BY_ID[name], Proofs(unpack(f"<{size}q", nonces), results))
        for _, body, _, _ in self.model.batches.values():
            batch = orjson.loads(body)
            name = BY_HASH[batch["block_hash"]].id
            held += [
                (name, nonce, b64decode(result) if isinstance(result, str) else result)
                for nonce, result in results_in(batch)
            ]
        order = itemgetter(0, 1)  # a nonce is in one place, so there is nothing else to order by
        assert sorted(held, key=order) == sorted(self.model.found, key=order)

    def every_delivery_is_in_one_state(self, now: Seen) -> None:
        """Nothing vanishes: what has no row any more was accepted or given up by every receiver."""
        rows, bodies = now.deliveries, now.bodies
        for number, (_, body, _, names) in self.model.batches.items():
            pairs = [(name, number) for name in names]
            if number in bodies:
                assert bodies[number] == body
                assert all(pair in rows for pair in pairs)
            else:
                assert all(pair in self.model.accepted | self.model.purged for pair in pairs)
        for pair in self.model.accepted & rows.keys():
            assert rows[pair] == "delivered"
        for pair, state in rows.items():
            assert (state == "purged") == (pair in self.model.purged - self.model.accepted)

    def arrivals_are_in_order_and_unchanged(self) -> None:
        for name, arrivals in self.model.arrived.items():
            seen: set[tuple[int, int]] = set()
            newest = 0
            for arrival in arrivals:
                assert (arrival.id, arrival.body) == self.model.batches[arrival.batch][:2]
                if (arrival.batch, arrival.sequence) not in seen:
                    assert arrival.sequence > newest, f"{name} got {arrival.sequence} after {newest}"
                    newest = arrival.sequence
                    seen.add((arrival.batch, arrival.sequence))

    def the_counts_are_those_of_the_rows(self, now: Seen) -> None:
        stages: Counter[str] = Counter()
        queues: dict[str, Counter[str]] = {name: Counter() for name in RECEIVERS}
        for number, (_, _, nonces, names) in self.model.batches.items():
            found = []
            for name in names:
                gone = "delivered" if (name, number) in self.model.accepted else "purged"
                found.append(now.deliveries.get((name, number), gone))
                queues[name][f"{found[-1]}_batches"] += 1
                queues[name][f"{found[-1]}_nonces"] += nonces
            order = ("pending", "dead", "expired", "withdrawn", "purged", "delivered")
            stages[next(state for state in order if state in found)] += nonces
        stages.pop("pending", None)
        assert self.outbox.totals == Totals(
            checked=sum(map(len, self.model.done.values())),
            valid=len(self.model.found),
            stored=sum(nonces for _, _, nonces, _ in self.model.batches.values()),
            **stages,
        )
        for name, counts in queues.items():
            assert self.outbox.queues.get(name, Queue()) == Queue(**counts)


TestOutboxLife = OutboxLife.TestCase
TestOutboxLife.settings = settings(max_examples=100, stateful_step_count=50)
