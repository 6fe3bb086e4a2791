"""The store over real SQLite files: what is committed is there, once, whatever ends the process."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from pocd.mining.control import decode
from pocd.mining.phases import Mode
from pocd.protocol.nonces import Node, Progress, Span
from pocd.protocol.proof import ProofBatch, Proofs, Round
from pocd.store import deliveries, opening, selections
from pocd.store import thread as module
from pocd.store.batches import form_batches
from pocd.store.deliveries import PendingDelivery, next_pending, record_delivered, record_failed
from pocd.store.errors import StoreError, StoreUnavailableError
from pocd.store.outbox import KnownChain, Outbox, Queue, ReceiverState, Totals, Work
from pocd.store.progress import RoundProgress
from pocd.store.proofs import CheckedSpan, Counted, Weights, commit_spans
from pocd.store.requested import MOST_SHARES, TooManySharesError
from pocd.store.rounds import recent_rounds, replace_round
from pocd.store.schema import APPLICATION_ID, VERSION
from pocd.store.thread import OutboxThread
from tests.support import stored
from tests.support.clocks import NEXT, NOW, ROUND
from tests.support.stored import commit_span
from tests.support.waiting import PATIENCE, soon

WEIGHTS = Weights("f00d", "float32")
NODE = Node(1, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    with opened(path) as store:
        store.begin_round(Work(ROUND, NODE), NOW)
        yield store


@contextmanager
def opened(path: Path) -> Iterator[Outbox]:
    with closing(Outbox.open(path)) as store:
        yield store


def proofs_of(span: Span, node: Node = NODE) -> Proofs:
    """Make a proof of every nonce of `span`."""
    return Proofs.of_distances((nonce, 1 + nonce / 1000) for nonce in node.nonces(span))


def commit(outbox: Outbox, start: int, stop: int, *, round_: Round = ROUND, now: float = NOW) -> Proofs:
    """Commit a span in which every nonce is valid."""
    proofs = proofs_of(Span(start, stop))
    commit_span(outbox, round_, NODE, Span(start, stop), proofs, WEIGHTS, now)
    return proofs


def on_chain(outbox: Outbox, limit: int = 10) -> list[Round]:
    """The rounds whose blocks were not replaced, among the `limit` highest."""
    return [round_ for round_, replaced in recent_rounds(outbox, limit).items() if not replaced]


def form(
    outbox: Outbox,
    *receivers: str,
    size: int = 100,
    age: float = 10.0,
    now: float = NOW,
    current: Round | None = ROUND,
) -> float | None:
    return form_batches(outbox, receivers, size=size, age=age, now=now, current=current).due


def drain(outbox: Outbox, receiver: str) -> list[PendingDelivery]:
    """Accept everything for `receiver`, in the order in which it comes."""
    accepted = []
    while head := next_pending(outbox, receiver):
        record_delivered(outbox, receiver, head.batch, NOW)
        accepted.append(head)
    return accepted


def nonces_of(body: bytes) -> list[int]:
    nonces = orjson.loads(body)["nonces"]
    assert isinstance(nonces, list)
    return nonces


def batched(outbox: Outbox) -> list[list[int]]:
    """Return the nonces of every batch, in order."""
    return [nonces_of(body) for (body,) in outbox.db.execute("SELECT body FROM batches ORDER BY number")]


def waiting(outbox: Outbox) -> int:
    (count,) = outbox.db.execute("SELECT total(size) FROM proofs").fetchone()
    return int(count)


def recount(outbox: Outbox) -> Totals:
    """Count the funnel from the rows themselves (of which none was pruned or purged)."""
    (checked, valid) = outbox.db.execute("SELECT total(checked), total(valid) FROM progress").fetchone()
    (stored,) = outbox.db.execute("SELECT total(nonces) FROM batches").fetchone()
    states: dict[int, tuple[int, set[str]]] = {}
    for number, nonces, state in outbox.db.execute(
        "SELECT number, nonces, deliveries.state FROM batches JOIN deliveries ON batch = number"
    ):
        states.setdefault(number, (nonces, set()))[1].add(state)
    stages: Counter[str] = Counter()
    for nonces, found in states.values():
        order = ("pending", "dead", "expired", "withdrawn", "purged", "delivered")
        stages[next(state for state in order if state in found)] += nonces
    stages.pop("pending", None)
    return Totals(int(checked), int(valid), int(stored), **stages)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


# Opening


def test_a_new_store_makes_its_folder_and_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "store.db"
    with opened(path) as outbox:
        assert outbox.totals == Totals()
        assert outbox.queues == {}
        assert outbox.control is None
        assert next_pending(outbox, "a") is None
    assert path.is_file()


def test_writes_are_fsynced_and_the_file_is_ours_alone(outbox: Outbox) -> None:
    def pragma(name: str) -> object:
        return outbox.db.execute(f"PRAGMA {name}").fetchone()[0]

    assert pragma("journal_mode") == "wal"
    assert pragma("synchronous") == 2
    assert pragma("locking_mode") == "exclusive"
    assert pragma("foreign_keys") == 1
    assert pragma("application_id") == APPLICATION_ID
    assert pragma("user_version") == VERSION


def test_a_second_open_names_the_file_and_the_other_process(
    path: Path, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "HELD_SECONDS", 0.0)
    with pytest.raises(StoreError, match="another process holds it") as caught:
        Outbox.open(path)
    assert str(path) in str(caught.value)
    assert caught.value.code == 75, "the other may end"
    commit(outbox, 0, 1)  # and the first goes on unharmed


def test_another_process_cannot_open_a_store_that_is_held(path: Path, outbox: Outbox) -> None:
    commit(outbox, 0, 1)
    code = (
        "import sys, pathlib\n"
        "from pocd.store.outbox import Outbox\n"
        "from pocd.store.errors import StoreError\n"
        "from pocd.store import opening\n"
        "opening.HELD_SECONDS = 0\n"
        "try:\n"
        "    Outbox.open(pathlib.Path(sys.argv[1]))\n"
        "except StoreError as error:\n"
        "    print(error)\n"
    )
    result = run_python(code, str(path))
    assert result.returncode == 0, result.stderr
    assert str(path) in result.stdout
    assert "another process holds it" in result.stdout
    commit(outbox, 1, 2)


def test_a_closed_store_can_be_opened_by_another_process(path: Path, outbox: Outbox) -> None:
    commit(outbox, 0, 3)
    outbox.close()
    code = (
        "import sys, pathlib\n"
        "from pocd.store.outbox import Outbox\n"
        "print(Outbox.open(pathlib.Path(sys.argv[1])).totals.checked)\n"
    )
    result = run_python(code, str(path))
    assert (result.returncode, result.stdout) == (0, "3\n"), result.stderr


@pytest.mark.parametrize("below", ["file/store.db", "file/folder/store.db"])
def test_a_path_that_cannot_be_written_is_refused_by_name(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(StoreError, match="cannot be opened") as caught:
        Outbox.open(tmp_path / below)
    assert str(tmp_path / below) in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="it is no plain file") as caught:
        Outbox.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"hi", b"listen = 1\n" * 1000, bytes(range(256)) * 64], ids=["short", "text", "binary"]
)
def test_what_is_no_database_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreError, match="not a SQLite database") as caught:
        Outbox.open(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_another_programs_database_is_refused_and_left_alone(path: Path, journal: str) -> None:
    with closing(sqlite3.connect(path)) as theirs:
        theirs.execute(f"PRAGMA journal_mode = {journal}")
        theirs.execute("CREATE TABLE notes (text)")
        theirs.execute("INSERT INTO notes VALUES ('mine')")
        theirs.commit()
    before = path.read_bytes()

    with pytest.raises(StoreError, match="another program's database") as caught:
        Outbox.open(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_store_of_version_1_is_brought_up_to_date_and_loses_nothing(path: Path) -> None:
    with closing(sqlite3.connect(path)) as old:
        old.executescript((Path(__file__).parent.parent / "data" / "store_v1.sql").read_text())
        old.execute("UPDATE rounds SET id = ?", (ROUND.id,))
        old.commit()
    with opened(path) as store:
        assert store.totals == Totals(checked=4, valid=2, stored=1)
        assert store.begin_round(Work(ROUND, NODE), NOW) == RoundProgress(Progress(4), checked=4, valid=2)
        commit(store, 4, 5)
        form(store, "main", size=1)
        first, old_proof, new_proof = drain(store, "main")
        assert (first.body, first.attempts) == (b'{"nonces":[1]}', 3)
        # Version 1 did not say which weights a proof is of.
        assert old_proof.body == ProofBatch(ROUND, 1, None, None, Proofs.of_distances([(10, 1.25)])).to_json()
        assert new_proof.body == ProofBatch(ROUND, 1, "f00d", "float32", Proofs.of_distances([(13, 1.013)])).to_json()
    with opened(path) as again:
        assert again.db.execute("PRAGMA user_version").fetchone() == (VERSION,)
        assert again.totals == Totals(checked=5, valid=3, stored=3, delivered=3)
    assert_schema_is_as_made_anew(path)


def test_a_store_of_version_2_is_brought_up_to_date_and_loses_nothing(path: Path) -> None:
    with closing(sqlite3.connect(path)) as old:
        old.executescript((Path(__file__).parent.parent / "data" / "store_v2.sql").read_text())
        old.execute("UPDATE rounds SET id = ?", (ROUND.id,))
        old.commit()
    with opened(path) as store:
        assert store.totals == recount(store) == Totals(checked=8, valid=4, stored=3)
        assert store.queues == {
            "main": Queue(pending_batches=2, pending_nonces=3),
            "other": Queue(pending_batches=1, pending_nonces=2, delivered_batches=1, delivered_nonces=1),
        }
        assert store.receivers == {
            "main": ReceiverState(failures=3, next_at=NOW + 1, error="HTTP 503"),
            "other": ReceiverState(failures=2, next_at=NOW + 9, error="HTTP 500"),
        }
        assert store.begin_round(Work(ROUND, NODE), NOW) == RoundProgress(Progress(8), checked=8, valid=4)
        form(store, "main", "other", size=1)
        new = ProofBatch(
            ROUND, 1, "f00d", None, Proofs.of_distances([(10, 1.25)])
        ).to_json()  # it did not say which dtype
        first, second = b'{"nonces":[1]}', b'{"nonces":[4,7]}'
        found = {name: drain(store, name) for name in ("main", "other")}
        assert [(each.sequence, each.body, each.attempts) for each in found["main"]] == [
            (1, first, 3),
            (2, second, 0),
            (3, new, 0),
        ]
        assert [(each.sequence, each.body) for each in found["other"]] == [(2, second), (3, new)]
        assert store.totals == recount(store) == Totals(checked=8, valid=4, stored=4, delivered=4)
    assert_schema_is_as_made_anew(path)


def test_a_store_of_version_3_is_brought_up_to_date_and_mining_stays_stopped(path: Path) -> None:
    with closing(sqlite3.connect(path)) as old:
        old.executescript((Path(__file__).parent.parent / "data" / "store_v3.sql").read_text())
    with opened(path) as store:
        assert store.totals == recount(store) == Totals(checked=9, valid=5, stored=4)
        assert decode(store.control) == (Mode.STOPPED, None)
        assert on_chain(store) == [ROUND]
        assert store.begin_round(Work(ROUND, NODE), NOW) == RoundProgress(Progress(9), checked=9, valid=5)
        form(store, "main", "other", size=1)
        last = drain(store, "main")[-1]
        # Version 3 did not say in which precision a proof was found.
        assert last.body == ProofBatch(ROUND, 1, "f00d", None, Proofs.of_distances([(25, 1.25)])).to_json()
        drain(store, "other")
        assert store.totals == recount(store) == Totals(checked=9, valid=5, stored=5, delivered=5)
        # A share of another size leaves out what the old version checked.
        assert store.begin_round(Work(ROUND, Node(0, 1)), NOW).skipped == (range(1, 26, 3),)
    assert_schema_is_as_made_anew(path)


def test_a_store_of_version_4_is_brought_up_to_date_and_loses_nothing(path: Path) -> None:
    with closing(sqlite3.connect(path)) as old:
        old.executescript((Path(__file__).parent.parent / "data" / "store_v4.sql").read_text())
    with opened(path) as store:
        assert store.totals == recount(store) == Totals(checked=9, valid=4, stored=2)
        assert waiting(store) == 2
        assert store.begin_round(Work(ROUND, NODE), NOW) == RoundProgress(Progress(9), checked=9, valid=4)
        form(store, "main", size=2, current=None)
        _, single, half = drain(store, "main")
        assert single.body == ProofBatch(ROUND, 1, "f00d", "float32", Proofs.of_distances([(13, 1.013)])).to_json()
        assert half.body == ProofBatch(ROUND, 1, "f00d", "bfloat16", Proofs.of_distances([(25, 1.25)])).to_json()
    assert_schema_is_as_made_anew(path)


def assert_schema_is_as_made_anew(path: Path) -> None:
    fresh = path.with_name("fresh.db")
    with opened(fresh), opened(path):
        pass
    assert columns(path) == columns(fresh)
    assert made_of(path) == made_of(fresh)


def made_of(path: Path) -> list[tuple[str, str]]:
    """Every index and trigger, in words."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(
            "SELECT name, sql FROM sqlite_schema WHERE type IN ('index', 'trigger') AND sql IS NOT NULL ORDER BY 1"
        ).fetchall()


def columns(path: Path) -> list[tuple[str, str, str]]:
    """Every table's columns and their types."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(
            "SELECT m.name, c.name, c.type FROM sqlite_schema AS m, pragma_table_info(m.name) AS c ORDER BY 1, 2"
        ).fetchall()


def test_vectors_go_into_batches_by_the_size_wanted_whatever_the_spans(outbox: Outbox) -> None:
    round_ = Round("AB", 11, "miner", None, "poc4", "tiny", 16)
    outbox.begin_round(Work(round_, NODE), NOW)
    spans = [Span(0, 300), Span(300, 301), Span(301, 500)]
    done = [CheckedSpan(round_, NODE, span, stored.proofs_of(round_, NODE.nonces(span)), WEIGHTS) for span in spans]
    commit_spans(outbox, done, NOW)
    form(outbox, "a", size=200, current=round_)
    assert waiting(outbox) == 100
    form(outbox, "a", size=200, now=NOW + 60, current=round_)
    nonces = NODE.nonces(Span(0, 500))
    batches = [
        ProofBatch(round_, NODE.id, WEIGHTS.fingerprint, WEIGHTS.dtype, stored.proofs_of(round_, nonces[start:stop]))
        for start, stop in ((0, 200), (200, 400), (400, 500))
    ]
    (deflated,) = outbox.db.execute("SELECT length(body) FROM batches WHERE number = 1").fetchone()
    assert deflated < len(batches[0].to_json()) / 2
    shown = selections.shown(outbox, batches[0].id)
    assert shown is not None
    assert shown[1] == batches[0].to_json()
    assert [(each.id, each.body) for each in drain(outbox, "a")] == [(each.id, each.to_json()) for each in batches]


def test_proofs_of_other_weights_go_into_another_batch(outbox: Outbox) -> None:
    half, full = Weights("old", "float16"), Weights("old", "float32")
    for start, weights in enumerate([full, full, Weights("new", "float32"), half, full]):
        span = Span(start, start + 1)
        commit_span(outbox, ROUND, NODE, span, proofs_of(span), weights, NOW)
    form(outbox, "a", size=2, now=NOW + 60)
    found = [orjson.loads(delivery.body) for delivery in drain(outbox, "a")]
    assert [(body["model_fingerprint"], body["dtype"], body["nonces"]) for body in found] == [
        ("old", "float32", [1, 4]),
        ("old", "float32", [13]),
        ("new", "float32", [7]),
        ("old", "float16", [10]),
    ]


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_newer_store_is_refused_and_left_alone(path: Path, journal: str) -> None:
    with opened(path) as outbox:
        outbox.set_control("{}", None, NOW)
    with closing(sqlite3.connect(path)) as newer:
        newer.execute(f"PRAGMA user_version = {VERSION + 1}")
        newer.execute(f"PRAGMA journal_mode = {journal}")
    before = path.read_bytes()

    with pytest.raises(StoreError, match=f"has version {VERSION + 1}, made by a newer pocd") as caught:
        Outbox.open(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_a_refused_file_is_not_kept_locked(path: Path) -> None:
    with closing(sqlite3.connect(path)) as theirs:
        theirs.execute("CREATE TABLE notes (text)")
    with pytest.raises(StoreError):
        Outbox.open(path)
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as theirs:
        theirs.execute("INSERT INTO notes VALUES ('still mine')")


# Surviving


def test_closing_and_opening_again_keeps_everything(path: Path, outbox: Outbox) -> None:
    commit(outbox, 0, 4)
    commit(outbox, 6, 8)  # leaves a hole
    form(outbox, "a", "b", size=2)
    commit(outbox, 8, 9)
    first = next_pending(outbox, "a")
    assert first is not None
    record_delivered(outbox, "a", first.batch, NOW)
    record_failed(outbox, "b", first.batch, "HTTP 500", fault=True, next_at=NOW + 5)
    outbox.set_control("stopped", None, NOW)
    totals, queues, bodies = outbox.totals, outbox.queues, batched(outbox)
    heads = next_pending(outbox, "a"), next_pending(outbox, "b")
    outbox.close()

    with opened(path) as again:
        assert again.totals == totals == recount(again) == Totals(checked=7, valid=7, stored=6, delivered=0)
        assert again.queues == queues == {"a": Queue(2, 4, 1, 2), "b": Queue(3, 6)}
        assert (next_pending(again, "a"), next_pending(again, "b")) == heads
        assert batched(again) == bodies
        assert again.control == "stopped"
        assert again.begin_round(Work(ROUND, NODE), NOW) == RoundProgress(
            Progress(4, (Span(6, 9),)), checked=7, valid=7
        )
        assert waiting(again) == 1


def test_what_a_killed_process_announced_is_there(path: Path) -> None:
    """The child prints each span after its commit; it is killed without warning in the middle of its work."""
    code = (
        "import sys, pathlib\n"
        "from pocd.store.batches import form_batches\n"
        "from pocd.store.outbox import Outbox, Work\n"
        "from pocd.store.proofs import Weights\n"
        "from tests.support.stored import commit_span\n"
        "from pocd.protocol.nonces import Node, Span\n"
        "from pocd.protocol.proof import Proofs, Round\n"
        "outbox, node = Outbox.open(pathlib.Path(sys.argv[1])), Node(1, 3)\n"
        "round_ = Round('AB', 10, 'miner', 1.4, 'poc2', 'tiny', 16)\n"
        "outbox.begin_round(Work(round_, node), 0.0)\n"
        "for start in range(0, 10**9, 10):\n"
        "    span = Span(start, start + 10)\n"
        "    proofs = Proofs.of_distances((nonce, 1.0) for nonce in node.nonces(span)[:3])\n"
        "    commit_span(outbox, round_, node, span, proofs, Weights('f00d', 'float32'), 0.0)\n"
        "    form_batches(outbox, ['a'], size=2, age=1e9, now=0.0, current=round_)\n"
        "    print(span.stop, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(20):
            child.stdout.readline()
        child.kill()
        announced = 200 + 10 * len(child.stdout.readlines())
    assert child.returncode != 0

    with opened(path) as outbox:
        done = outbox.begin_round(Work(ROUND, NODE), NOW)
        assert done.progress.cursor >= announced
        assert done == RoundProgress(Progress(done.checked), done.checked, done.valid)
        assert outbox.totals == recount(outbox)
        form(outbox, "a", current=None)
        expected = [nonce for start in range(0, done.checked, 10) for nonce in NODE.nonces(Span(start, start + 3))]
        assert [nonce for nonces in batched(outbox) for nonce in nonces] == expected


def test_a_batch_keeps_its_bytes_and_id_across_failures_and_restarts(path: Path, outbox: Outbox) -> None:
    proofs = commit(outbox, 0, 3)
    form(outbox, "a", size=3)
    first = next_pending(outbox, "a")
    assert first is not None
    batch = ProofBatch(ROUND, NODE.id, WEIGHTS.fingerprint, WEIGHTS.dtype, proofs)
    assert (first.id, first.kind, first.body) == (batch.id, "generated", batch.to_json())
    assert (first.sequence, first.attempts, first.queued_at) == (1, 0, NOW)

    record_failed(outbox, "a", first.batch, "HTTP 500", fault=True, next_at=NOW + 1)
    outbox.close()
    with opened(path) as again:
        record_failed(again, "a", first.batch, "HTTP 502", fault=True, next_at=NOW + 3)
        assert next_pending(again, "a") == replace(first, attempts=2, faults=2)
        assert again.receivers["a"] == ReceiverState(failures=2, next_at=NOW + 3, error="HTTP 502")


# Checking nonces


def test_another_round_has_progress_of_its_own(outbox: Outbox) -> None:
    commit(outbox, 0, 5)
    assert outbox.begin_round(Work(NEXT, NODE), NOW) == RoundProgress(Progress(), 0, 0)
    assert outbox.begin_round(Work(ROUND, NODE), NOW) == RoundProgress(Progress(5), 5, 5)


def test_another_share_of_a_round_skips_what_was_checked_before(outbox: Outbox) -> None:
    """The nonces 1, 4, 7, 10 and 13 are checked."""
    commit(outbox, 0, 5)
    assert outbox.begin_round(Work(ROUND, Node(2, 3)), NOW) == RoundProgress(Progress(), 5, 5)
    assert outbox.begin_round(Work(ROUND, Node(1, 6)), NOW) == RoundProgress(Progress(), 5, 5, (range(3),))
    assert outbox.begin_round(Work(ROUND, Node(1, 4)), NOW) == RoundProgress(Progress(), 5, 5, (range(0, 4, 3),))
    assert outbox.begin_round(Work(ROUND, Node(0, 1)), NOW) == RoundProgress(Progress(), 5, 5, (range(1, 14, 3),))


def test_what_was_checked_as_another_node_is_neither_counted_nor_stored_again(outbox: Outbox) -> None:
    """Leases of the share before were under way when it changed: 1, 4, 7 and 10."""
    all_ = Node(0, 1)
    outbox.begin_round(Work(ROUND, all_), NOW)
    commit_span(outbox, ROUND, all_, Span(2, 6), proofs_of(Span(2, 6), all_), WEIGHTS, NOW)
    assert commit_span(outbox, ROUND, NODE, Span(0, 4), proofs_of(Span(0, 4)), WEIGHTS, NOW) == Counted(
        3, proofs_of(Span(0, 4)).only([True, False, True, True])
    )
    assert outbox.totals == recount(outbox) == Totals(checked=7, valid=7)
    form(outbox, "a", current=None)
    assert sorted(nonce for delivery in drain(outbox, "a") for nonce in nonces_of(delivery.body)) == [
        *range(1, 6),
        7,
        10,
    ]
    assert outbox.begin_round(Work(ROUND, NODE), NOW).checked == 7


def test_a_span_cannot_be_committed_twice(outbox: Outbox) -> None:
    commit(outbox, 0, 5)
    with pytest.raises(AssertionError, match="was done before"):
        commit(outbox, 3, 6)
    assert outbox.totals == recount(outbox) == Totals(5, 5, 0, 0)
    commit(outbox, 5, 6)


def test_progress_and_proofs_are_one_transaction(path: Path, outbox: Outbox) -> None:
    commit(outbox, 0, 2)
    outbox.db.execute(
        "CREATE TEMP TRIGGER broken BEFORE UPDATE ON totals WHEN new.checked > 4"
        " BEGIN SELECT RAISE(ABORT, 'broken'); END"
    )
    with pytest.raises(sqlite3.IntegrityError, match="broken"):
        commit(outbox, 2, 6)  # it fails when the proofs are already inserted
    assert outbox.totals == recount(outbox) == Totals(2, 2, 0, 0)
    assert waiting(outbox) == 2
    assert outbox.begin_round(Work(ROUND, NODE), NOW).progress == Progress(2)

    outbox.close()
    with opened(path) as again:
        assert again.begin_round(Work(ROUND, NODE), NOW) == RoundProgress(Progress(2), 2, 2)
        commit(again, 2, 6)
        assert again.totals == recount(again) == Totals(6, 6, 0, 0)


def test_a_full_disk_is_named_as_the_cause_and_costs_nothing_committed(outbox: Outbox) -> None:
    commit(outbox, 0, 1)
    (pages,) = outbox.db.execute("PRAGMA page_count").fetchone()
    outbox.db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.Error, match="full"):
        commit(outbox, 1, 2000)
    outbox.db.execute(f"PRAGMA max_page_count = {10 * pages}")
    assert outbox.begin_round(Work(ROUND, NODE), NOW) == RoundProgress(Progress(1), 1, 1)
    commit(outbox, 1, 2000)
    assert outbox.totals == recount(outbox) == Totals(2000, 2000, 0, 0)


def test_what_the_api_decided_is_remembered_until_the_chain_decides_again(path: Path, outbox: Outbox) -> None:
    for control in ("one", "two", "two", None, None, "three"):
        assert outbox.set_control(control, None, NOW) is None
        assert outbox.control == control
    outbox.close()
    with opened(path) as again:
        assert again.control == "three"
        again.set_control(None, None, NOW)
    with opened(path) as again:
        assert again.control is None


def test_a_round_that_is_asked_for_begins_with_what_was_decided_or_not_at_all(path: Path, outbox: Outbox) -> None:
    commit(outbox, 0, 4)
    done = outbox.set_control("mine", Work(ROUND, NODE, by_chain=False), NOW)
    assert done == RoundProgress(Progress(4), 4, 4)
    outbox.db.execute("CREATE TEMP TRIGGER broken BEFORE INSERT ON progress BEGIN SELECT RAISE(ABORT, 'broken'); END")
    with pytest.raises(sqlite3.IntegrityError, match="broken"):
        outbox.set_control("another", Work(NEXT, NODE, by_chain=False), NOW)
    assert outbox.control == "mine"
    outbox.close()
    with opened(path) as again:
        assert again.control == "mine"
        assert again.db.execute("SELECT count(*) FROM rounds").fetchone() == (1,)


def test_only_rounds_that_the_chain_began_say_what_its_hashes_are(outbox: Outbox) -> None:
    outbox.begin_round(Work(NEXT, NODE, by_chain=False), NOW)
    assert on_chain(outbox) == [ROUND]
    outbox.begin_round(Work(NEXT, NODE), NOW)
    assert on_chain(outbox) == [NEXT, ROUND]
    outbox.begin_round(Work(ROUND, NODE, by_chain=False), NOW)
    assert on_chain(outbox) == [NEXT, ROUND]


def test_a_rounds_own_receiver_gets_its_batches_beside_the_others_or_alone(outbox: Outbox) -> None:
    work = Work(ROUND, NODE, by_chain=False, callback="own", callback_url="http://127.0.0.1/own")
    outbox.begin_round(work, NOW)
    outbox.begin_round(Work(NEXT, NODE), NOW)
    commit(outbox, 0, 2)
    commit(outbox, 0, 3, round_=NEXT)
    form(outbox, size=2, now=NOW + 99)
    assert [nonces_of(each.body) for each in drain(outbox, "own")] == [[1, 4]]
    assert waiting(outbox) == 3, "what has no receiver waits for one"
    commit(outbox, 2, 4)
    form(outbox, "a", "own", size=3, now=NOW + 99)
    assert [nonces_of(each.body) for each in drain(outbox, "a")] == [[1, 4, 7], [7, 10]]
    assert [nonces_of(each.body) for each in drain(outbox, "own")] == [[1, 4, 7], [7, 10]]


# Forming batches


def test_batches_are_formed_of_size_proofs_in_order_and_the_rest_waits(outbox: Outbox) -> None:
    commit(outbox, 4, 7)
    commit(outbox, 0, 4)
    form(outbox, "a", size=3)
    assert batched(outbox) == [[13, 16, 19], [1, 4, 7]]
    assert waiting(outbox) == 1
    assert outbox.totals == recount(outbox) == Totals(7, 7, 6, 0)


def test_a_short_batch_is_formed_when_the_oldest_proof_is_old_enough(outbox: Outbox) -> None:
    commit(outbox, 0, 1)
    commit(outbox, 1, 2, now=NOW + 4)
    assert form(outbox, "a", now=NOW + 9.5) == NOW + 10
    assert batched(outbox) == []
    assert form(outbox, "a", now=NOW + 10) is None
    assert batched(outbox) == [[1, 4]]


def test_what_is_left_of_full_batches_is_due_by_its_own_age(outbox: Outbox) -> None:
    commit(outbox, 0, 3)
    commit(outbox, 3, 4, now=NOW + 4)
    due = form(outbox, "a", size=3, now=NOW + 5)
    assert due is not None
    assert NOW + 5 < due <= NOW + 14, "asking too early is harmless, too late is not"
    assert form(outbox, "a", size=3, now=due) == NOW + 14
    assert form(outbox, "a", size=3, now=NOW + 14) is None
    assert batched(outbox) == [[1, 4, 7], [10]]


@pytest.mark.parametrize(
    ("most_batches", "most_nonces", "size", "each_time"),
    [(3, 1000, 2, 3), (1000, 6, 2, 3), (1000, 7, 2, 3), (1000, 1, 5, 1)],
)
def test_one_call_forms_a_bounded_number_of_batches_and_the_rest_is_due_at_once(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, most_batches: int, most_nonces: int, size: int, each_time: int
) -> None:
    monkeypatch.setattr("pocd.store.batches.MOST_BATCHES", most_batches)
    monkeypatch.setattr("pocd.store.batches.MOST_NONCES", most_nonces)
    commit(outbox, 0, 10 * size - 1)
    outbox.begin_round(Work(NEXT, NODE), NOW)
    commit(outbox, 0, 1, round_=NEXT)
    for formed in range(each_time, 11, each_time):
        assert form(outbox, "a", size=size, current=None) == NOW, "due at once"
        assert len(batched(outbox)) == formed
    assert form(outbox, "a", size=size, current=None) is None
    assert len(batched(outbox)) == 11
    assert waiting(outbox) == 0
    assert [nonce for nonces in batched(outbox) for nonce in nonces] == [*NODE.nonces(Span(0, 10 * size - 1)), 1]


def test_forming_batches_is_one_transaction(outbox: Outbox) -> None:
    commit(outbox, 0, 6)
    outbox.db.execute(
        "CREATE TEMP TRIGGER broken BEFORE INSERT ON deliveries WHEN new.batch = 3 AND new.receiver = 'b'"
        " BEGIN SELECT RAISE(ABORT, 'broken'); END"
    )
    with pytest.raises(sqlite3.IntegrityError, match="broken"):
        form(outbox, "a", "b", size=2)
    assert batched(outbox) == []
    assert waiting(outbox) == 6
    assert outbox.totals == recount(outbox) == Totals(6, 6, 0, 0)
    assert outbox.queues == {}
    outbox.db.execute("DROP TRIGGER broken")
    form(outbox, "a", "b", size=2)
    assert batched(outbox) == [[1, 4], [7, 10], [13, 16]]
    assert outbox.queues == {"a": Queue(3, 6, 0, 0), "b": Queue(3, 6, 0, 0)}


def test_proofs_of_a_round_that_is_over_are_batched_at_once(outbox: Outbox) -> None:
    commit(outbox, 0, 2)
    outbox.begin_round(Work(NEXT, NODE), NOW)
    commit(outbox, 0, 1, round_=NEXT, now=NOW + 1)
    assert form(outbox, "a", current=NEXT, now=NOW + 2) == NOW + 11
    assert batched(outbox) == [[1, 4]]
    assert form(outbox, "a", current=None, now=NOW + 2) is None
    assert batched(outbox) == [[1, 4], [1]]


def test_a_batch_holds_proofs_of_one_round_and_one_node_only(outbox: Outbox) -> None:
    other = Node(2, 3)
    outbox.begin_round(Work(NEXT, NODE), NOW)
    outbox.begin_round(Work(ROUND, other), NOW)
    expected = []
    for round_, node in ((ROUND, NODE), (NEXT, NODE), (ROUND, other)):
        proofs = proofs_of(Span(0, 2), node)
        commit_span(outbox, round_, node, Span(0, 2), proofs, WEIGHTS, NOW)
        expected.append(ProofBatch(round_, node.id, WEIGHTS.fingerprint, WEIGHTS.dtype, proofs))
    form(outbox, "a", current=None)
    accepted = drain(outbox, "a")
    assert [delivery.id for delivery in accepted] == [batch.id for batch in expected]
    assert [delivery.body for delivery in accepted] == [batch.to_json() for batch in expected]


def test_without_receivers_proofs_wait_for_one(path: Path, outbox: Outbox) -> None:
    commit(outbox, 0, 5)
    assert form(outbox, size=1, now=NOW + 1000, current=None) is None
    assert waiting(outbox) == 5
    outbox.close()
    with opened(path) as again:
        form(again, "late", size=1000, now=NOW + 1000)
        assert batched(again) == [[1, 4, 7, 10, 13]]
        assert again.queues == {"late": Queue(1, 5, 0, 0)}


@pytest.mark.parametrize("now", [NOW - 1, NOW - 1e9, 0.0])
def test_a_clock_that_was_set_back_keeps_no_proof(outbox: Outbox, now: float) -> None:
    commit(outbox, 0, 1)
    form(outbox, "a", now=now)
    assert batched(outbox) == [[1]]


def test_with_nothing_to_batch_nothing_is_due(outbox: Outbox) -> None:
    assert form(outbox, "a") is None
    assert batched(outbox) == []


# Delivering


def test_each_receiver_gets_every_batch_in_order_at_its_own_pace(outbox: Outbox) -> None:
    commit(outbox, 0, 4)
    form(outbox, "slow", "fast", size=2)
    fast = drain(outbox, "fast")
    commit(outbox, 4, 8)
    form(outbox, "slow", "fast", size=2)
    fast += drain(outbox, "fast")
    slow = drain(outbox, "slow")
    assert [nonces_of(delivery.body) for delivery in fast] == [[1, 4], [7, 10], [13, 16], [19, 22]]
    assert [(delivery.id, delivery.body) for delivery in slow] == [(delivery.id, delivery.body) for delivery in fast]


def test_a_batch_that_failed_stays_at_the_head_of_its_queue(outbox: Outbox) -> None:
    commit(outbox, 0, 2)
    form(outbox, "a", size=1)
    first = next_pending(outbox, "a")
    assert first is not None
    record_failed(outbox, "a", first.batch, "HTTP 500", fault=True, next_at=NOW + 100)
    again = next_pending(outbox, "a")
    assert again is not None
    assert (again.batch, again.attempts) == (first.batch, 1)


def test_delivered_counts_a_batch_when_its_last_receiver_has_it(outbox: Outbox) -> None:
    commit(outbox, 0, 3)
    form(outbox, "a", "b", size=3)
    head = next_pending(outbox, "a")
    assert head is not None
    record_delivered(outbox, "a", head.batch, NOW)
    assert outbox.totals == recount(outbox) == Totals(3, 3, 3, 0)
    assert outbox.queues == {"a": Queue(0, 0, 1, 3), "b": Queue(1, 3, 0, 0)}
    record_failed(outbox, "b", head.batch, "HTTP 500", fault=True, next_at=NOW)
    assert outbox.totals.delivered == 0
    record_delivered(outbox, "b", head.batch, NOW)
    assert outbox.totals == recount(outbox) == Totals(3, 3, 3, 3)
    assert outbox.queues["b"] == Queue(0, 0, 1, 3)


def test_batches_are_kept_after_their_delivery(path: Path, outbox: Outbox) -> None:
    commit(outbox, 0, 3)
    form(outbox, "a", size=3)
    drain(outbox, "a")
    outbox.close()
    with opened(path) as again:
        assert batched(again) == [[1, 4, 7]]
        assert again.queues == {"a": Queue(0, 0, 1, 3)}


def test_each_receiver_counts_its_own_messages_without_a_gap(outbox: Outbox) -> None:
    commit(outbox, 0, 2)
    form(outbox, "a", size=1)
    commit(outbox, 2, 4)
    form(outbox, "a", "b", size=1)
    assert [delivery.sequence for delivery in drain(outbox, "a")] == [1, 2, 3, 4]
    assert [delivery.sequence for delivery in drain(outbox, "b")] == [1, 2]


# Blocks that are replaced


def test_the_chain_and_its_greatest_height_are_remembered(path: Path, outbox: Outbox) -> None:
    assert outbox.chain is None
    outbox.remember_head("chain-1", 7)
    outbox.remember_head("chain-1", 9)
    outbox.close()
    with opened(path) as again:
        assert again.chain == KnownChain("chain-1", 9)


def test_what_a_replaced_round_found_is_withdrawn_and_comes_back_with_its_block(outbox: Outbox) -> None:
    commit(outbox, 0, 3)
    form(outbox, "a", "b", size=1)
    sent = next_pending(outbox, "a")
    assert sent is not None
    record_delivered(outbox, "a", sent.batch, NOW)
    commit(outbox, 3, 4)  # in no batch yet
    replace_round(outbox, ROUND, "block replaced", withdraw=True, now=NOW)
    assert on_chain(outbox) == []
    assert next_pending(outbox, "a") is next_pending(outbox, "b") is None
    form(outbox, "a", "b", current=None)
    assert next_pending(outbox, "a") is None, "a late find is withdrawn too"
    assert outbox.totals == recount(outbox) == Totals(4, 4, 4, withdrawn=4)

    outbox.begin_round(Work(ROUND, NODE), NOW)
    assert on_chain(outbox) == [ROUND]
    assert [nonces_of(delivery.body) for delivery in drain(outbox, "a")] == [[4], [7], [10]]
    assert [nonces_of(delivery.body) for delivery in drain(outbox, "b")] == [[1], [4], [7], [10]]
    assert outbox.totals == recount(outbox) == Totals(4, 4, 4, delivered=4)


def test_a_refusal_of_what_was_withdrawn_meanwhile_is_no_dead_letter(outbox: Outbox) -> None:
    commit(outbox, 0, 1)
    form(outbox, "a", size=1)
    under_way = next_pending(outbox, "a")
    assert under_way is not None
    replace_round(outbox, ROUND, "block replaced", withdraw=True, now=NOW)
    deliveries.record_set_aside(outbox, "a", under_way.batch, "refused", NOW)
    assert outbox.totals == recount(outbox) == Totals(1, 1, 1, withdrawn=1)
    outbox.begin_round(Work(ROUND, NODE), NOW)
    record_delivered(outbox, "a", under_way.batch, NOW)
    assert outbox.totals == recount(outbox) == Totals(1, 1, 1, delivered=1)


def test_what_was_accepted_while_it_was_withdrawn_is_delivered(outbox: Outbox) -> None:
    commit(outbox, 0, 1)
    form(outbox, "a", size=1)
    under_way = next_pending(outbox, "a")
    assert under_way is not None
    replace_round(outbox, ROUND, "block replaced", withdraw=True, now=NOW)
    record_delivered(outbox, "a", under_way.batch, NOW)
    assert outbox.totals == recount(outbox) == Totals(1, 1, 1, delivered=1)


def test_what_a_replaced_round_found_is_sent_where_that_is_wanted(outbox: Outbox) -> None:
    commit(outbox, 0, 1)
    form(outbox, "a", size=1)
    commit(outbox, 1, 2)
    replace_round(outbox, ROUND, "block replaced", withdraw=False, now=NOW)
    form_batches(outbox, ["a"], size=9, age=1.0, now=NOW, current=None, withdraw=False)
    assert [nonces_of(delivery.body) for delivery in drain(outbox, "a")] == [[1], [4]]


def test_rounds_are_told_from_the_greatest_height_down(outbox: Outbox) -> None:
    outbox.begin_round(Work(NEXT, NODE), NOW)
    assert on_chain(outbox) == [NEXT, ROUND]
    assert on_chain(outbox, 1) == [NEXT]
    replace_round(outbox, NEXT, "block replaced", withdraw=True, now=NOW)
    assert on_chain(outbox) == [ROUND]


# The thread


def test_a_store_that_cannot_be_opened_is_told_to_who_starts_the_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(StoreError):
        OutboxThread(tmp_path)
    assert threading.active_count() == before


async def test_calls_run_in_one_thread_one_after_another_and_give_results_and_errors(path: Path) -> None:
    def where(_: Outbox) -> int:
        return threading.get_ident()

    def fail(_: Outbox) -> None:
        raise ValueError("told")

    with closing(OutboxThread(path)) as thread:
        idents = await asyncio.gather(*(thread(where) for _ in range(10)))
        assert len(set(idents)) == 1
        assert threading.get_ident() not in idents
        with pytest.raises(ValueError, match="told"):
            await thread(fail)
        done = await thread(Outbox.begin_round, Work(ROUND, NODE), NOW)
        assert done == RoundProgress(Progress(), 0, 0)


async def test_a_write_that_began_is_finished_though_its_caller_was_cancelled(path: Path) -> None:
    began, may_go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow_commit(outbox: Outbox) -> None:
        loop.call_soon_threadsafe(began.set)
        assert may_go_on.wait(PATIENCE)
        commit(outbox, 0, 3)

    with closing(OutboxThread(path)) as thread:
        await thread(Outbox.begin_round, Work(ROUND, NODE), NOW)
        call = asyncio.create_task(thread(slow_commit))
        await began.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        may_go_on.set()
    with opened(path) as again:
        assert again.totals == recount(again) == Totals(3, 3, 0, 0)


async def test_more_calls_than_may_wait_are_refused_and_what_has_to_be_recorded_comes_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 1)
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.001)
    may_go_on = threading.Event()
    with closing(OutboxThread(path)) as thread:
        slow = asyncio.create_task(thread(lambda _: may_go_on.wait(PATIENCE)))
        try:
            await asyncio.sleep(0)  # the task begins
            with pytest.raises(StoreUnavailableError, match="too slow: 1 calls are waiting already"):
                await thread(Outbox.begin_round, Work(ROUND, NODE), NOW)
            record = asyncio.create_task(thread.persistently(Outbox.begin_round, Work(ROUND, NODE), NOW))
            await asyncio.sleep(0)
            assert not record.done()
        finally:
            may_go_on.set()
        assert await soon(slow)
        assert await soon(record) == RoundProgress(Progress(), 0, 0)


async def test_closing_the_thread_finishes_what_was_asked_and_frees_the_file(path: Path) -> None:
    thread = OutboxThread(path)
    calls = [asyncio.create_task(thread(Outbox.begin_round, Work(round_, NODE), NOW)) for round_ in (ROUND, NEXT)]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    thread.close()
    await asyncio.gather(*calls)
    with opened(path) as again:
        (rounds,) = again.db.execute("SELECT count(*) FROM rounds").fetchone()
        assert rounds == 2


def test_the_shares_that_a_round_is_asked_for_with_are_bounded(outbox: Outbox) -> None:
    for number in range(MOST_SHARES - 1):  # beside the one that was begun before
        outbox.begin_round(Work(ROUND, Node(number, 1000), by_chain=False), NOW)
    with pytest.raises(TooManySharesError, match="use one of these"):
        outbox.set_control("x", Work(ROUND, Node(0, 999), by_chain=False), NOW)
    assert outbox.control is None
    assert outbox.begin_round(Work(ROUND, Node(7, 1000), by_chain=False), NOW).checked == 0
    assert outbox.begin_round(Work(ROUND, Node(0, 999)), NOW).checked == 0  # the chain's is ours


async def test_what_asks_a_closed_store_is_refused_and_what_has_to_be_recorded_goes_on_asking(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.001)
    with closing(OutboxThread(path)) as thread:
        pass
    with pytest.raises(StoreUnavailableError, match=r"store\.db is closed"):
        await thread(Outbox.begin_round, Work(ROUND, NODE), NOW)
    record = asyncio.create_task(thread.persistently(Outbox.begin_round, Work(ROUND, NODE), NOW))
    await asyncio.wait([record], timeout=0.05)
    record.cancel()  # as the end of the loop does
    with pytest.raises(asyncio.CancelledError):
        await record


async def test_a_body_that_is_damaged_ends_with_the_remedy_and_is_never_sent(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    with closing(OutboxThread(path)) as outbox:

        def spoil(opened: Outbox) -> None:
            opened.begin_round(Work(ROUND, NODE), NOW)
            span = Span(0, 2000)
            proofs = Proofs.of_distances((nonce, 1 + nonce * 0.618 % 1) for nonce in NODE.nonces(span))
            commit_span(opened, ROUND, NODE, span, proofs, WEIGHTS, NOW)
            form_batches(opened, ["a"], size=2000, age=0.0, now=NOW, current=ROUND)
            opened.db.execute("UPDATE batches SET body = CAST(substr(body, 1, 2000) || randomblob(2000) AS BLOB)")

        await outbox(spoil)
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="a stored batch cannot be read"):
                await outbox(deliveries.next_pending, "a")
        with pytest.raises(StoreError, match=r"is damaged: a stored batch cannot be read.*\.recover"):
            await outbox(deliveries.next_pending, "a")
