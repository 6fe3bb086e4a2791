"""When to try again: a pure decision, held to its bounds for every input."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pocd.delivery.policy import BACKOFF_SECONDS, JITTER, LONGEST_WAIT, Outcome, backoff, remaining_wait

jitters = st.floats(-1, 1)
failure_counts = st.integers(1, 10_000)
times = st.floats(0, 4e9)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 226, 299])
def test_any_2xx_is_acceptance(status: int) -> None:
    assert Outcome(status, "").accepted


@pytest.mark.parametrize("status", [None, 100, 101, 199, 300, 301, 302, 304, 307, 308, 400, 401, 404, 409, 500, 503])
def test_nothing_else_is_acceptance(status: int | None) -> None:
    assert not Outcome(status, "").accepted


def test_the_first_failure_waits_a_second_and_later_ones_up_to_a_minute() -> None:
    waits = [backoff(failures, 0.0) for failures in range(1, 10)]
    assert waits == [1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]


@given(failures=failure_counts)
def test_backoff_never_shrinks_and_ends_at_the_cap(failures: int) -> None:
    assert backoff(failures, 0.0) <= backoff(failures + 1, 0.0) <= BACKOFF_SECONDS[-1]


@given(failures=failure_counts, jitter=jitters)
def test_backoff_stays_within_a_fifth_of_its_base(failures: int, jitter: float) -> None:
    base = backoff(failures, 0.0)
    assert base * 0.8 == pytest.approx(backoff(failures, -1.0))
    assert base * 1.2 == pytest.approx(backoff(failures, 1.0))
    assert backoff(failures, -1.0) <= backoff(failures, jitter) <= backoff(failures, 1.0) <= LONGEST_WAIT
    assert JITTER == 0.2


@given(next_at=times, now=times)
def test_a_wait_is_never_negative_nor_longer_than_the_longest_backoff(next_at: float, now: float) -> None:
    assert 0.0 <= remaining_wait(next_at, now) <= LONGEST_WAIT


@given(next_at=times, now=times)
def test_what_is_due_goes_at_once(next_at: float, now: float) -> None:
    if next_at <= now:
        assert remaining_wait(next_at, now) == 0.0


@given(failed_at=times, failures=failure_counts, jitter=st.floats(-1, 0.99), part=st.floats(0, 0.99))
def test_a_backoff_is_waited_out_while_the_clock_goes_on(
    failed_at: float, failures: int, jitter: float, part: float
) -> None:
    delay = backoff(failures, jitter)
    now = failed_at + part * delay
    assert remaining_wait(failed_at + delay, now) == pytest.approx(delay * (1 - part), abs=1e-5)


@given(failed_at=times, failures=failure_counts, jitter=jitters, now=times)
@example(failed_at=1.7e9, failures=3, jitter=0.0, now=1.7e9 - 3600)  # set back an hour
@example(failed_at=1.7e9, failures=7, jitter=0.0, now=1.7e9 - 5)  # set back a little
@example(failed_at=1.7e9, failures=7, jitter=0.0, now=0.0)  # no clock at all yet
def test_a_clock_set_anywhere_never_blocks_delivery(failed_at: float, failures: int, jitter: float, now: float) -> None:
    next_at = failed_at + backoff(failures, jitter)
    wait = remaining_wait(next_at, now)
    assert wait <= LONGEST_WAIT
    assert remaining_wait(next_at, now + wait) <= 1e-6, "one wait is enough, unless the clock is set again"
