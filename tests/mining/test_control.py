"""Whose rounds are mined: the table, and what follows from it over a real store and a real miner."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import cast

import orjson
import pytest
import structlog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pocd.clock import SYSTEM
from pocd.mining.control import MINING, Control, NoRoundError, RoundRequest, Runs, decode, encode
from pocd.mining.miner import Miner
from pocd.mining.phases import TABLE, Call, DaemonState, Mode, mode_after, state_of
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.store.errors import StoreUnavailableError
from pocd.store.outbox import Outbox, Work
from pocd.store.thread import OutboxThread
from tests.support.clocks import ManualClock

OURS, THEIRS = Node(1, 3), Node(0, 2)
FIRST, SECOND = (Round(f"{height:02X}", height, "miner", 1.4, "poc2", "tiny", 16) for height in (10, 20))
ASKED = RoundRequest(Round("asked", 7, "other", 1.5, "poc2", "tiny", 8), THEIRS, 0.02, callback=None)
AGAIN = RoundRequest(Round("asked again", 8, "other", 1.5, "poc2", "tiny", 8), THEIRS, 0.02, callback=None)
RUNS = {"model.name": "tiny", "model.revision": None, "model.dtype": "float32", "round.scheme": "poc2"}
INITS = (Call.INIT, Call.INIT_GENERATE, Call.INIT_VALIDATE)
QUIET = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger("critical"))


# The table


@pytest.mark.parametrize(
    ("mode", "expected"),
    {
        # init, init/generate, init/validate, phase/generate, phase/validate, stop, resume
        "FOLLOWING": "READY GENERATING VALIDATING - - STOPPED FOLLOWING",
        "READY": "READY GENERATING VALIDATING GENERATING VALIDATING STOPPED FOLLOWING",
        "GENERATING": "READY GENERATING VALIDATING GENERATING VALIDATING STOPPED FOLLOWING",
        "VALIDATING": "READY GENERATING VALIDATING GENERATING VALIDATING STOPPED FOLLOWING",
        "STOPPED": "READY GENERATING VALIDATING - - STOPPED FOLLOWING",
    }.items(),
)
def test_every_pair_of_mode_and_call_has_its_answer(mode: str, expected: str) -> None:
    assert [str(mode_after(Mode(mode), call) or "-") for call in Call] == expected.split()


def test_the_documentation_shows_the_same_table() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "api.md").read_text()
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in page.splitlines() if "| `" in line]
    shown = {row[0]: row[1:] for row in rows if row[0] in list(Mode) and len(row) > len(Call)}
    assert shown == {mode: [TABLE.get((mode, call), "409") for call in Call] for mode in Mode}


def test_a_call_repeated_changes_nothing_more() -> None:
    for (_, call), after in TABLE.items():
        assert mode_after(after, call) == after


@pytest.mark.parametrize(
    ("mode", "ready", "mining", "state"),
    [
        (Mode.STOPPED, False, False, "STOPPED"),
        (Mode.STOPPED, True, True, "STOPPED"),
        (Mode.FOLLOWING, False, True, "LOADING"),
        (Mode.VALIDATING, False, False, "LOADING"),
        (Mode.VALIDATING, True, False, "VALIDATING"),
        (Mode.READY, True, False, "IDLE"),
        (Mode.FOLLOWING, True, False, "IDLE"),
        (Mode.FOLLOWING, True, True, "GENERATING"),
        (Mode.GENERATING, True, True, "GENERATING"),
        (Mode.GENERATING, True, False, "IDLE"),  # the store takes nothing
    ],
)
def test_what_status_shows(mode: Mode, *, ready: bool, mining: bool, state: DaemonState) -> None:
    assert state_of(mode, ready=ready, mining=mining) == state


def test_what_is_remembered_reads_back_as_it_was() -> None:
    for mode in Mode:
        for asked in (None, ASKED, RoundRequest(FIRST, OURS, 0.5, "callback-1")):
            expected = (Mode.FOLLOWING, None) if mode is Mode.FOLLOWING else (mode, asked)
            assert decode(encode(mode, asked, RUNS)) == expected


# What follows from it


class Controlled:
    """A control over a real store and miner, as long as its process lives."""

    def __init__(self, path: Path, runs: Runs = RUNS) -> None:
        self.outbox = OutboxThread(path)
        self.miner = Miner(self.outbox, Changes(), clock=ManualClock(), group_seconds=0)
        self.events = Events(SYSTEM)
        self.control = Control(
            self.miner, self.outbox, OURS, runs=runs, clock=ManualClock(), log=QUIET, events=self.events
        )

    def close(self) -> None:
        self.outbox.close()

    @property
    def mined(self) -> Work | None:
        """What leases are given of."""
        current = self.miner.current
        return Work(current.round, current.node) if current else None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


async def test_the_chain_decides_until_a_round_is_asked_for_and_again_after_resume(path: Path) -> None:
    with closing(Controlled(path)) as controlled:
        await controlled.control.follow(FIRST)
        assert controlled.mined == Work(FIRST, OURS)
        await controlled.control.call(Call.INIT_GENERATE, ASKED)
        await controlled.control.follow(SECOND)
        assert controlled.mined == Work(ASKED.round, THEIRS)
        await controlled.control.call(Call.RESUME)
        assert controlled.mined == Work(SECOND, OURS)
        assert controlled.control.asked is None
        told = await controlled.events.after(0)
    assert isinstance(told, list)
    assert [(event.data["id"], event.data["by"]) for event in told if event.kind == "round"] == [
        (FIRST.id, "chain"),
        (ASKED.round.id, "api"),
        (SECOND.id, "chain"),
    ]


async def test_init_then_phase_generate_refused(path: Path) -> None:
    """It was; here it mines what was initialised."""
    with closing(Controlled(path)) as controlled:
        await controlled.control.call(Call.INIT, ASKED)
        assert controlled.mined is None
        await controlled.control.call(Call.PHASE_GENERATE)
        assert controlled.mined == Work(ASKED.round, THEIRS)


async def test_two_init_calls_racing_are_done_one_after_the_other(path: Path) -> None:
    with closing(Controlled(path)) as controlled:
        calls = [controlled.control.call(Call.INIT_GENERATE, asked) for asked in (ASKED, AGAIN) * 5]
        await asyncio.gather(*calls)
        assert controlled.mined == AGAIN_WORK
        assert decode(controlled.outbox.view.control) == (Mode.GENERATING, AGAIN)
        (rounds,) = await controlled.outbox(lambda outbox: outbox.db.execute("SELECT count(*) FROM rounds").fetchone())
        assert rounds == 2


AGAIN_WORK = Work(AGAIN.round, THEIRS)


async def test_a_round_goes_on_where_it_was_left_through_stop_and_another_round(path: Path) -> None:
    with closing(Controlled(path)) as controlled:
        for call, asked in (
            (Call.INIT_GENERATE, ASKED),
            (Call.STOP, None),
            (Call.INIT_GENERATE, AGAIN),
            (Call.INIT_GENERATE, ASKED),
            (Call.PHASE_VALIDATE, None),
            (Call.PHASE_GENERATE, None),
        ):
            await controlled.control.call(call, asked)
            if controlled.mined == Work(ASKED.round, THEIRS):
                lease = await controlled.miner.lease(2)
                controlled.miner.give_back(lease)
                assert lease.span.start == 0
        lease = await controlled.miner.lease(2)
        assert list(lease.nonces) == [0, 2]


@pytest.mark.parametrize("call", [Call.PHASE_GENERATE, Call.PHASE_VALIDATE])
@pytest.mark.parametrize("before", [None, Call.STOP])
async def test_a_phase_without_a_round_is_refused_and_changes_nothing(
    path: Path, call: Call, before: Call | None
) -> None:
    with closing(Controlled(path)) as controlled:
        await controlled.control.follow(FIRST)
        if before:
            await controlled.control.call(before)
        known = controlled.control.mode, controlled.mined
        with pytest.raises(NoRoundError):
            await controlled.control.call(call)
        assert (controlled.control.mode, controlled.mined) == known


async def test_where_the_store_takes_nothing_a_call_fails_and_changes_nothing(path: Path) -> None:
    with closing(Controlled(path)) as controlled:
        await controlled.control.follow(FIRST)
        await controlled.outbox(lambda outbox: outbox.db.execute("PRAGMA query_only = ON"))
        for call in Call:
            if mode_after(controlled.control.mode, call) is not None and call is not Call.RESUME:
                with pytest.raises(StoreUnavailableError):
                    await controlled.control.call(call, ASKED if call in INITS else None)
        assert controlled.mined == Work(FIRST, OURS)
        assert (controlled.control.mode, controlled.control.asked) == (Mode.FOLLOWING, None)
        await controlled.outbox(lambda outbox: outbox.db.execute("PRAGMA query_only = OFF"))
        await controlled.control.call(Call.INIT_GENERATE, ASKED)
        assert controlled.mined == Work(ASKED.round, THEIRS)


async def test_a_call_whose_caller_gives_up_is_done_all_the_same(path: Path) -> None:
    with closing(Controlled(path)) as controlled:
        call = asyncio.ensure_future(controlled.control.call(Call.INIT_GENERATE, ASKED))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await controlled.control.call(Call.PHASE_GENERATE)  # waits for its turn
        assert controlled.mined == Work(ASKED.round, THEIRS)
        assert decode(controlled.outbox.view.control) == (Mode.GENERATING, ASKED)


# A restart with another configuration


@pytest.mark.parametrize("mode", [Mode.READY, Mode.GENERATING, Mode.VALIDATING, Mode.STOPPED])
@pytest.mark.parametrize(
    "other", [{"model.name": "other"}, {"model.revision": "v2"}, {"model.dtype": "bfloat16"}, {"round.scheme": "poc3"}]
)
async def test_a_requested_round_is_restored_only_where_the_daemon_runs_what_it_was_made_for(
    path: Path, mode: Mode, other: dict[str, str]
) -> None:
    calls = {Mode.READY: Call.INIT, Mode.GENERATING: Call.INIT_GENERATE, Mode.VALIDATING: Call.INIT_VALIDATE}
    with closing(Controlled(path)) as controlled:
        await controlled.control.call(calls.get(mode, Call.INIT), ASKED)
        if mode is Mode.STOPPED:
            await controlled.control.call(Call.STOP)
    with closing(Controlled(path, RUNS | other)) as controlled:
        await controlled.control.restore()
        await controlled.control.follow(FIRST)
        ((key, value),) = other.items()
        assert f"is of {key} {RUNS[key]!r}, but this daemon runs {key} {value!r}" in str(controlled.control.foreign)
        assert (controlled.control.mode, controlled.control.asked, controlled.mined) == (Mode.STOPPED, None, None)
        for call in (Call.PHASE_GENERATE, Call.PHASE_VALIDATE):
            with pytest.raises(NoRoundError):
                await controlled.control.call(call)
    with closing(Controlled(path)) as controlled:  # as before: the round was kept
        assert (controlled.control.mode, controlled.control.asked, controlled.control.foreign) == (mode, ASKED, None)
    with closing(Controlled(path, RUNS | other)) as controlled:
        await controlled.control.call(Call.INIT_GENERATE, AGAIN)
        assert (controlled.control.foreign, controlled.mined) == (None, AGAIN_WORK)
    with closing(Controlled(path, RUNS | other)) as controlled:  # the round requested last is of what is run now
        assert (controlled.control.mode, controlled.control.asked, controlled.control.foreign) == (
            Mode.GENERATING,
            AGAIN,
            None,
        )


async def test_a_round_that_an_earlier_version_stored_is_known_by_its_model_and_scheme(path: Path) -> None:
    with closing(Controlled(path)) as controlled:
        stored = orjson.loads(encode(Mode.GENERATING, ASKED, RUNS) or "")
        del stored["runs"]
        await controlled.outbox(Outbox.set_control, orjson.dumps(stored).decode(), None, 0.0)
    for other, mode in (({"model.dtype": "bfloat16"}, Mode.GENERATING), ({"model.name": "other"}, Mode.STOPPED)):
        with closing(Controlled(path, RUNS | other)) as controlled:
            assert controlled.control.mode is mode


# All lives


class Lives(RuleBasedStateMachine):
    """Calls, heads of the chain and restarts in any order, beside what the table says."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.mode, self.asked, self.chain = (
            Mode.FOLLOWING,
            cast("RoundRequest | None", None),
            cast("Round | None", None),
        )
        self.shown: Work | None = None

    @initialize()
    def open(self) -> None:
        self.controlled = Controlled(Path(self.folder.name) / "store.db")

    @rule(round_=st.sampled_from([None, FIRST, SECOND]))
    def head(self, round_: Round | None) -> None:
        self.loop.run_until_complete(self.controlled.control.follow(round_))
        self.chain = round_

    @rule(call=st.sampled_from(Call), asked=st.sampled_from([ASKED, AGAIN]))
    def call(self, call: Call, asked: RoundRequest) -> None:
        after = TABLE.get((self.mode, call))
        given = asked if call in INITS else None
        if after is None:
            with pytest.raises(NoRoundError):
                self.loop.run_until_complete(self.controlled.control.call(call, given))
            return
        self.loop.run_until_complete(self.controlled.control.call(call, given))
        self.mode = after
        self.asked = None if after is Mode.FOLLOWING else given or self.asked

    @rule()
    def restart(self) -> None:
        self.controlled.close()
        self.controlled = Controlled(Path(self.folder.name) / "store.db")
        self.loop.run_until_complete(self.controlled.control.restore())
        self.chain = None

    @invariant()
    def mines_what_it_should(self) -> None:
        expected = {
            Mode.FOLLOWING: Work(self.chain, OURS) if self.chain else None,
            Mode.GENERATING: Work(self.asked.round, self.asked.node) if self.asked else None,
        }.get(self.mode)
        assert self.controlled.mined == expected
        assert (self.controlled.control.mode, self.controlled.control.asked) == (self.mode, self.asked)
        assert self.controlled.miner.paused == (self.mode not in MINING)

    def teardown(self) -> None:
        self.controlled.close()
        self.loop.close()
        self.folder.cleanup()


Lives.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestLives = Lives.TestCase
