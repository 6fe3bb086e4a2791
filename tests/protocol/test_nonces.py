"""The cursor's arithmetic: dense, nothing twice, nothing skipped, in whatever order spans come back."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pocd.protocol.nonces import Ledger, Node, Progress, Span, unskipped

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=12)


def cut(lengths: list[int]) -> list[Span]:
    """Cut the positions from 0 on into spans of these lengths."""
    return [Span(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]


def take(ledger: Ledger, count: int) -> Span:
    span = ledger.take(count)
    assert span is not None, "there are always more"
    return span


def positions(progress: Progress) -> set[int]:
    return set(range(progress.cursor)).union(*(range(span.start, span.stop) for span in progress.islands))


@given(data=st.data(), lengths=sizes)
def test_progress_ends_dense_whatever_the_order(data: st.DataObject, lengths: list[int]) -> None:
    progress = Progress()
    for span in data.draw(st.permutations(cut(lengths))):
        progress = progress.add(span)
    assert progress == Progress(sum(lengths))


@given(data=st.data(), lengths=sizes)
def test_progress_holds_exactly_what_was_added(data: st.DataObject, lengths: list[int]) -> None:
    progress, done = Progress(), set[int]()
    for span in data.draw(st.lists(st.sampled_from(cut(lengths)), unique=True)):
        progress = progress.add(span)
        done |= set(range(span.start, span.stop))

        assert positions(progress) == done
        assert progress.end == max(done) + 1
        assert all(before.stop < after.start for before, after in pairwise(progress.islands)), "islands are apart"
        assert all(progress.cursor < island.start for island in progress.islands)
        missing = [position for gap in progress.gaps() for position in range(gap.start, gap.stop)]
        assert missing == sorted(set(range(progress.end)) - done)


@pytest.mark.parametrize(
    "again",
    [Span(0, 1), Span(1, 3), Span(1, 2), Span(4, 6), Span(5, 6), Span(5, 9), Span(7, 8), Span(3, 9), Span(0, 20)],
    ids=str,
)
def test_what_was_done_cannot_be_done_again(again: Span) -> None:
    with pytest.raises(AssertionError, match="was done before"):
        Progress(2, (Span(5, 8),)).add(again)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 3), (4, 3), (-1, 2)])
def test_a_span_holds_at_least_one_position_and_no_negative_one(start: int, stop: int) -> None:
    with pytest.raises(AssertionError, match="not a span"):
        Span(start, stop)


@given(node_id=st.integers(0, 50), count=st.integers(1, 50), start=st.integers(0, 10**15), length=st.integers(1, 50))
def test_position_x_is_nonce_id_plus_count_times_x(node_id: int, count: int, start: int, length: int) -> None:
    node = Node(node_id, count)
    expected = [node.id + node.count * x for x in range(start, start + length)]
    assert list(node.nonces(Span(start, start + length))) == expected


shares = st.builds(Node, st.integers(0, 30), st.integers(1, 12))  # an orchestrator's ids may be above the count
spans = st.builds(lambda start, length: Span(start, start + length), st.integers(0, 30), st.integers(1, 30))


@given(one=shares, other=shares, span=spans)
def test_the_positions_of_nonces_are_those_at_which_a_node_has_them(one: Node, other: Node, span: Span) -> None:
    nonces = other.nonces(span)
    assert list(one.positions(nonces)) == [x for x in range(nonces.stop) if one.id + one.count * x in nonces]


@given(
    skipped=st.lists(st.builds(range, st.integers(0, 40), st.integers(0, 40), st.integers(1, 4)), max_size=4),
    progress=st.builds(Progress, st.integers(0, 3), st.sampled_from([(), (Span(5, 9),), (Span(5, 6), Span(20, 30))])),
    count=st.integers(1, 7),
)
def test_what_is_skipped_is_leased_with_what_is_not_and_nothing_else_is_left_out(
    skipped: list[range], progress: Progress, count: int
) -> None:
    ledger = Ledger(progress, skipped)
    due = [x for x in range(80) if x not in positions(progress) and not any(x in each for each in skipped)]
    leased, done = list[int](), progress
    while len(leased) < len(due):
        span = take(ledger, count)
        done = done.add(span)
        taken = list(unskipped(span, skipped))
        assert 1 <= len(taken) <= count
        assert len(taken) == count or span.stop in positions(progress), "full, but where a gap ends"
        leased += taken
    assert leased[: len(due)] == due


@given(
    skipped=st.lists(st.builds(range, st.integers(0, 50), st.integers(0, 70), st.integers(1, 5)), max_size=3),
    size=st.integers(0, 60),
    count=st.integers(1, 9),
    back=st.integers(0, 9),
)
def test_all_positions_there_are_can_be_leased_and_no_other(
    skipped: list[range], size: int, count: int, back: int
) -> None:
    ledger, leased = Ledger(Progress(), skipped, size=size), list[Span]()
    while span := ledger.take(count):
        leased.append(span)
    assert ledger.is_used_up
    assert ledger.take(count) is None, "and so it stays"
    taken = [x for span in leased for x in unskipped(span, skipped)]
    assert taken == [x for x in range(size) if not any(x in each for each in skipped)]
    if leased:
        assert leased[-1].stop <= size
        ledger.give_back(leased[back % len(leased)])
        assert not ledger.is_used_up
        assert ledger.take(60) == leased[back % len(leased)]
        ledger.set_aside(leased[-1])
        assert ledger.is_used_up
        ledger.retry()
        assert not ledger.is_used_up


@given(count=st.integers(1, 9), largest=st.integers(0, 40), data=st.data())
def test_the_size_of_a_share_counts_its_nonces(count: int, largest: int, data: st.DataObject) -> None:
    node = Node(data.draw(st.integers(0, count - 1)), count)
    assert node.size(largest) == len([nonce for nonce in range(largest + 1) if nonce % count == node.id])


@given(count=st.integers(1, 9), length=st.integers(1, 20))
def test_the_nodes_together_check_every_nonce_once(count: int, length: int) -> None:
    checked = [nonce for node_id in range(count) for nonce in Node(node_id, count).nonces(Span(0, length))]
    assert sorted(checked) == list(range(count * length))


def test_spans_given_back_are_lent_again_before_new_ones_lowest_first() -> None:
    ledger = Ledger(Progress())
    first, second, third = take(ledger, 4), take(ledger, 4), take(ledger, 4)
    ledger.give_back(third)
    ledger.give_back(first)
    assert [take(ledger, 3), take(ledger, 3), take(ledger, 4), take(ledger, 4)] == [
        Span(0, 3),
        Span(3, 4),
        third,
        Span(12, 16),
    ]
    assert second == Span(4, 8)


def test_spans_set_aside_are_lent_again_after_a_retry_only() -> None:
    ledger = Ledger(Progress())
    first, second = take(ledger, 3), take(ledger, 3)
    ledger.set_aside(first)
    ledger.give_back(second)
    assert [take(ledger, 3) for _ in range(2)] == [second, Span(6, 9)]
    ledger.retry()
    assert [take(ledger, 2) for _ in range(2)] == [Span(0, 2), Span(2, 3)], "once more, in other pieces too"
    ledger.set_aside(Span(2, 3))
    ledger.give_back(Span(0, 2))
    ledger.retry()
    assert [take(ledger, 3) for _ in range(2)] == [Span(0, 2), Span(9, 12)], "the second time is the last one"


def test_after_a_restart_the_holes_are_lent_first() -> None:
    ledger = Ledger(Progress(2, (Span(5, 6), Span(8, 10))))
    assert [ledger.take(2) for _ in range(4)] == [Span(2, 4), Span(4, 5), Span(6, 8), Span(10, 12)]


class LedgerMachine(RuleBasedStateMachine):
    """Leases taken, finished, given back and lost, against plain sets of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress()
        self.ledger = Ledger(self.progress)
        self.leased: list[Span] = []
        self.done: set[int] = set()
        self.taken: set[int] = set()
        self.aside: list[Span] = []
        self.lost: list[Span] = []
        self.retried: set[int] = set()

    def held(self) -> set[int]:
        return {position for span in self.leased + self.aside + self.lost for position in range(span.start, span.stop)}

    def lowest_free(self) -> int:
        busy = self.done | self.held()
        return min(set(range(len(busy) + 1)) - busy)

    def finish_lease(self, index: int) -> None:
        span = self.leased.pop(index)
        self.progress = self.progress.add(span)
        self.done |= set(range(span.start, span.stop))

    @rule(count=st.integers(1, 8))
    def take(self, count: int) -> None:
        expected = self.lowest_free()
        busy = self.done | self.held()
        span = take(self.ledger, count)
        assert span.start == expected, "the lowest free position is lent first"
        assert len(span) <= count
        assert busy.isdisjoint(range(span.start, span.stop)), "handed out twice"
        self.leased.append(span)
        self.taken |= set(range(span.start, span.stop))

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.finish_lease(data.draw(st.integers(0, len(self.leased) - 1)))

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.ledger.give_back(self.leased.pop(data.draw(st.integers(0, len(self.leased) - 1))))

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def set_aside(self, data: st.DataObject) -> None:
        span = self.leased.pop(data.draw(st.integers(0, len(self.leased) - 1)))
        self.ledger.set_aside(span)
        (self.lost if span.start in self.retried else self.aside).append(span)

    @rule()
    def retry(self) -> None:
        self.ledger.retry()
        self.retried |= {position for span in self.aside for position in range(span.start, span.stop)}
        self.aside = []

    @rule()
    def restart(self) -> None:
        self.leased, self.aside, self.lost, self.retried = [], [], [], set()
        self.ledger = Ledger(self.progress)

    @invariant()
    def progress_is_what_was_finished(self) -> None:
        assert positions(self.progress) == self.done

    def teardown(self) -> None:
        self.restart()  # finds what was given up
        while self.lowest_free() <= max(self.taken, default=-1):
            self.take(3)
        while self.leased:
            self.finish_lease(-1)
        assert self.progress == Progress(len(self.taken))
        assert self.taken == set(range(len(self.taken))), "a position was skipped"


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40)
