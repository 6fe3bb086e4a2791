"""Rates over a sliding window, with the clock given by the test."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocd.observe.rates import RateWindow
from tests.support.clocks import ManualClock


def test_in_the_first_second_a_rate_is_per_whole_second() -> None:
    clock = ManualClock(elapsed=1000.5)
    window = RateWindow(clock)
    assert window.per_second(60) == 0.0
    window.add(7)
    clock.elapsed += 0.01
    assert window.per_second(60) == 7.0


def test_before_the_window_is_full_the_rate_is_over_the_time_since_the_start() -> None:
    clock = ManualClock(elapsed=1000.0)
    window = RateWindow(clock)
    clock.elapsed = 1010.0
    window.add(30)
    clock.elapsed = 1020.0
    assert window.per_second(60) == window.per_second(900) == 1.5


def test_what_is_older_than_the_window_does_not_count() -> None:
    clock = ManualClock(elapsed=0.0)
    window = RateWindow(clock)
    window.add(6000)
    clock.elapsed = 100.0
    window.add(60)
    clock.elapsed = 130.0
    assert window.per_second(60) == 1.0
    assert window.per_second(900) == pytest.approx(6060 / 130)


@pytest.mark.parametrize(("at", "counted"), [(39.0, 0), (39.99, 0), (40.0, 0), (41.0, 60), (99.0, 60), (100.0, 60)])
def test_the_window_ends_where_it_says(at: float, counted: int) -> None:
    clock = ManualClock(elapsed=0.0)
    window = RateWindow(clock)
    clock.elapsed = at
    window.add(60)
    clock.elapsed = 100.0
    assert window.per_second(60) * 60 == counted


def test_a_quarter_of_an_hour_is_kept_and_no_more() -> None:
    clock = ManualClock(elapsed=0.0)
    window = RateWindow(clock)
    for second in range(5000):
        clock.elapsed = second + 0.25
        window.add(1)
        window.add(1)
    assert window.per_second(900) == pytest.approx(2.0)
    assert 900 <= len(window._seconds) < 1800


@given(
    start=st.floats(0, 1000),
    events=st.lists(st.tuples(st.floats(0, 120), st.integers(0, 1000)), max_size=30),
    after=st.floats(0, 1200),
    seconds=st.sampled_from([1.0, 60.0, 900.0]),
)
def test_a_rate_counts_the_window_to_within_one_second(
    start: float, events: list[tuple[float, int]], after: float, seconds: float
) -> None:
    clock = ManualClock(elapsed=start)
    window = RateWindow(clock)
    added: list[tuple[float, int]] = []
    for pause, count in events:
        clock.elapsed += pause
        window.add(count)
        added.append((clock.elapsed, count))
    clock.elapsed += after
    span = min(seconds, clock.elapsed - start)
    counted = window.per_second(seconds) * max(1.0, span)  # a shorter one counts as a second

    surely = sum(count for at, count in added if at >= clock.elapsed - seconds + 1 + 1e-6)
    perhaps = sum(count for at, count in added if at > clock.elapsed - seconds)
    assert surely <= round(counted) <= perhaps
