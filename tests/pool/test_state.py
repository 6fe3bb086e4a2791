"""The phases of a worker's lives, and what follows from how they end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocd.observe.rates import RateWindow
from pocd.pool.causes import Cause, WorkerError, WorkerRefusedError
from pocd.pool.state import LEFT_OUT_SECONDS, LONGEST_BACKOFF, MOST_FAILURES, Phase, WorkerState
from pocd.worker.messages import Ready
from tests.support.clocks import ManualClock

CRASH = WorkerError(Cause.CRASH, "gone")
READY = Ready(
    "m", "f00d", "float32", "cuda:0", 128, 4, "flat", "it agrees", "captured", "asked", 1.5, 0.0, 8, 4096, "2.13.0"
)


def state() -> WorkerState:
    return WorkerState(3, ("cuda:0",), 32, RateWindow(ManualClock()))


def live(
    worker: WorkerState, error: WorkerError = CRASH, *, ready: bool = False, lived: float = 61.0, others_work: bool
) -> float:
    """Let a worker have one life, which fails."""
    worker.start()
    if ready:
        worker.load("loading m")
        worker.become_ready(READY)
    worker.end()
    return worker.fail(error, lived=lived, others_work=others_work)


def test_a_life_is_shown_phase_by_phase() -> None:
    worker = state()
    shown = [(worker.phase, worker.stage, worker.ready)]
    for step in (
        worker.start,
        lambda: worker.load("computing known distances"),
        lambda: worker.load("loading m"),
        lambda: worker.become_ready(READY),
        worker.end,
    ):
        step()
        shown.append((worker.phase, worker.stage, worker.ready))
    assert shown == [
        (Phase.WAITING, None, False),
        (Phase.STARTING, "starting", False),
        (Phase.LOADING, "computing known distances", False),
        (Phase.LOADING, "loading m", False),
        (Phase.READY, None, True),
        (Phase.WAITING, None, False),
    ]
    assert (worker.info, worker.batch_size) == (READY, 8)
    assert worker.most == 32, "the next life may find a larger size: a busy host made this one choose less"


STEPS = {
    "start": WorkerState.start,
    "load": lambda worker: worker.load("loading m"),
    "become ready": lambda worker: worker.become_ready(READY),
    "end": WorkerState.end,
}


@pytest.mark.parametrize(
    ("before", "step"),
    [
        ([], "load"),
        ([], "become ready"),
        ([], "end"),
        (["start"], "start"),
        (["start"], "become ready"),
        (["start", "load"], "start"),
        (["start", "load", "become ready"], "load"),
        (["start", "load", "become ready"], "become ready"),
        (["start", "end"], "load"),
    ],
)
def test_a_phase_follows_only_where_it_may(before: list[str], step: str) -> None:
    worker = state()
    for each in before:
        STEPS[each](worker)
    phase = worker.phase
    with pytest.raises(AssertionError, match=f"worker 3 cannot go from {phase} to "):
        STEPS[step](worker)
    assert worker.phase is phase


def test_a_worker_waits_longer_from_failure_to_failure_and_is_never_left_out_while_no_other_works() -> None:
    worker = state()
    waits = [live(worker, others_work=False) for _ in range(10)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert not worker.left_out
    assert worker.alarm == "failed 10 times in a row, still tried; the last time: gone"


def test_a_worker_is_left_out_while_another_works_and_comes_back_when_it_works() -> None:
    worker = state()
    waits = [live(worker, others_work=True) for _ in range(MOST_FAILURES)]
    assert waits == [1, 2, 4, 8, LEFT_OUT_SECONDS]
    assert worker.left_out
    worker.start()
    assert worker.alarm == "failed 5 times in a row, left out, and tried every 30 min; the last time: gone"
    worker.end()
    assert live(worker, others_work=True) == LEFT_OUT_SECONDS
    assert live(worker, others_work=False) == LONGEST_BACKOFF, "now it is needed"
    assert live(worker, ready=True, lived=60.0, others_work=True) == LEFT_OUT_SECONDS, "that was no long life"
    assert live(worker, ready=True, lived=61.0, others_work=True) == 1
    assert not worker.left_out
    assert worker.alarm is None
    assert worker.causes == {Cause.CRASH: MOST_FAILURES + 4}


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans())))
def test_what_a_refusal_means_ends_with_the_next_failure(failures: list[tuple[bool, bool, bool]]) -> None:
    worker = state()
    for refused, ready, others in failures:
        error = WorkerRefusedError(Cause.DEVICE, "not there") if refused else CRASH
        wait = live(worker, error, ready=ready, others_work=others)
        assert worker.unusable == refused
        assert worker.last_error == str(error)
        assert 1 <= wait <= LEFT_OUT_SECONDS
        assert (wait == LEFT_OUT_SECONDS) == worker.left_out


@pytest.mark.parametrize(
    ("device", "decoder", "execution", "compiling", "alarmed"),
    [
        ("cuda:0", "flat", "eager", True, True),
        ("cuda:0", "flat", "captured", True, False),
        ("cuda:0", "flat", "compiled", True, False),
        ("cuda:0", "layers", "eager", True, False),  # nobody can change that
        ("cuda:0", "flat", "eager", False, False),  # as was asked
        ("cpu", "flat", "eager", True, False),
    ],
)
def test_a_gpu_that_runs_eagerly_what_could_be_compiled_is_told_loudly(
    device: str, decoder: str, execution: str, *, compiling: bool, alarmed: bool
) -> None:
    worker = WorkerState(0, (device,), 32, RateWindow(ManualClock()), is_compiling=compiling)
    worker.start()
    worker.load("loading m")
    reason = "there is no C compiler"
    worker.become_ready(replace(READY, decoder=decoder, execution=execution, execution_reason=reason))
    expected = f"batches run eagerly, which is slower than compiled code: {reason}"
    assert worker.alarm == (expected if alarmed else None)
    worker.end()
    assert worker.alarm is None
