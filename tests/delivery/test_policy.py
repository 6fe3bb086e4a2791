"""What becomes of a batch, and when to try again: pure decisions, held to their bounds for every input."""

import random
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from math import isfinite

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pocd.delivery.policy import (
    BACKOFF_SECONDS,
    JITTER,
    LONGEST_RETRY_AFTER,
    LONGEST_WAIT,
    POISON_FAULTS,
    Accept,
    Decision,
    Outcome,
    Park,
    Retry,
    SetAside,
    backoff,
    calls_a_person,
    decide,
    may_be_poison,
    remaining_wait,
)
from pocd.http.retry_after import parse_retry_after

NOW = datetime(2026, 7, 14, 9, 30, tzinfo=UTC)

jitters = st.floats(-1, 1)
failure_counts = st.integers(1, 10_000)
times = st.floats(0, 4e9)
statuses = st.none() | st.integers(100, 599)
EVERY_STATUS = [None, *range(100, 600)]


def decided(
    outcome: Outcome, *, failures: int = 1, faults: int = 1, overtaken: bool = False, others_pass: bool = False
) -> Decision:
    return decide(outcome, failures=failures, faults=faults, overtaken=overtaken, others_pass=others_pass, jitter=0.0)


def group(status: int | None) -> str:
    """The table of docs/protocol.md section 6, written once more."""
    match status:
        case None:
            return "waits"
        case 410:
            return "parks"
        case 400 | 409 | 413 | 422:
            return "refuses"
        case _:
            return "accepts" if status // 100 == 2 else "waits"


EXPECTED = {
    "accepts": Accept(),
    "waits": Retry(1.0),
    "refuses": Retry(1.0),
    "parks": Park(),
}


def test_every_status_has_one_consequence() -> None:
    for status in EVERY_STATUS:
        outcome = Outcome(status, "said so")
        assert decided(outcome) == EXPECTED[group(status)], status
        assert outcome.accepted == (group(status) == "accepts"), status


def test_only_a_batch_that_is_refused_while_others_pass_is_set_aside() -> None:
    for status in EVERY_STATUS:
        outcome = Outcome(status, "said so")
        assert outcome.refused == (group(status) == "refuses"), status
        expected = SetAside("refused: said so") if outcome.refused else EXPECTED[group(status)]
        assert decided(outcome, others_pass=True) == expected, status


@pytest.mark.parametrize("failures", [1, 2, 3, 4, 100])
def test_a_run_of_refusals_calls_a_person(failures: int) -> None:
    for status in EVERY_STATUS:
        outcome = Outcome(status, "")
        expected = outcome.alarm or (group(status) == "refuses" and failures >= 3)
        assert calls_a_person(outcome, failures) == expected, status


@given(
    answers=st.lists(st.sampled_from([200, 400, 409, 413, 422, 401, 503, None]), min_size=1, max_size=30),
    jitter=jitters,
)
def test_no_answers_make_a_batch_dead_while_no_other_is_accepted(answers: list[int | None], jitter: float) -> None:
    for failures, status in enumerate(answers, start=1):
        found = decide(
            Outcome(status, ""), failures=failures, faults=failures, overtaken=False, others_pass=False, jitter=jitter
        )
        assert not isinstance(found, SetAside)


def test_only_5xx_and_answers_that_never_came_whole_may_be_the_batch_s_fault() -> None:
    for status in EVERY_STATUS:
        assert Outcome(status, "").fault == (status in range(500, 600)), status
        assert Outcome(status, "", broke=True).fault


def test_redirects_and_4xx_are_raised_as_alarms_but_for_those_of_the_message_and_those_that_pass() -> None:
    unalarming = {400, 409, 413, 422, 408, 425, 429, 410}  # 410 parks the receiver, an alarm of its own
    for status in EVERY_STATUS:
        assert Outcome(status, "").alarm == (status in range(300, 500) and status not in unalarming), status


@given(status=statuses, faults=st.integers(1, 20), overtaken=st.booleans(), broke=st.booleans())
def test_a_batch_is_poison_only_after_eight_faults_and_if_a_later_one_passed(
    status: int | None,
    faults: int,
    overtaken: bool,  # noqa: FBT001 - hypothesis passes it by name
    broke: bool,  # noqa: FBT001 - hypothesis passes it by name
) -> None:
    outcome = Outcome(status, "said so", broke=broke)
    poison = group(status) == "waits" and outcome.fault and faults >= POISON_FAULTS and overtaken
    found = decided(outcome, faults=faults, overtaken=overtaken)
    if poison:
        assert found == SetAside(f"poison: failed {faults} times while a later batch was accepted: said so")
    else:
        assert found == EXPECTED[group(status)]


def test_poison_is_set_aside_whatever_retry_after_says() -> None:
    found = decided(Outcome(503, "", retry_after=30.0), faults=8, overtaken=True)
    assert isinstance(found, SetAside)


@pytest.mark.parametrize(("faults", "expected"), [(1, False), (6, False), (7, True), (8, True), (100, True)])
def test_the_next_batch_is_tried_from_the_seventh_fault_on(faults: int, expected: bool) -> None:  # noqa: FBT001 - a case
    assert may_be_poison(Outcome(500, ""), faults) == expected
    assert may_be_poison(Outcome(None, "", broke=True), faults) == expected
    assert not may_be_poison(Outcome(429, ""), faults)
    assert not may_be_poison(Outcome(None, "nobody there"), faults)


# Waiting


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


@given(failures=failure_counts, jitter=jitters, retry_after=st.none() | st.floats(0, allow_nan=False))
@example(failures=1, jitter=1.0, retry_after=float("inf"))
@example(failures=1, jitter=-1.0, retry_after=0.0)
def test_a_retry_waits_at_least_a_little_and_never_longer_than_the_longest_wait(
    failures: int, jitter: float, retry_after: float | None
) -> None:
    outcome = Outcome(429, "", retry_after)
    found = decide(outcome, failures=failures, faults=0, overtaken=False, others_pass=False, jitter=jitter)
    assert isinstance(found, Retry)
    assert 0.8 <= found.seconds < LONGEST_WAIT


@given(jitter=jitters, retry_after=st.floats(0, LONGEST_RETRY_AFTER), failures=failure_counts)
def test_jitter_never_comes_earlier_than_retry_after_asked_for(
    jitter: float, retry_after: float, failures: int
) -> None:
    found = decide(
        Outcome(503, "", retry_after), failures=failures, faults=1, overtaken=False, others_pass=False, jitter=jitter
    )
    assert isinstance(found, Retry)
    assert max(retry_after, 1.0) <= found.seconds <= max(retry_after, 1.0) * 1.2


@pytest.mark.parametrize(("asked", "waits"), [(0.0, 1.0), (0.5, 1.0), (7.0, 7.0), (600.0, 600.0), (86_400.0, 600.0)])
def test_retry_after_is_clamped_both_ways(asked: float, waits: float) -> None:
    assert decided(Outcome(429, "", asked), failures=5) == Retry(waits)


@given(jitter=jitters, retry_after=st.none() | st.floats(0, allow_nan=False), failures=failure_counts)
def test_what_is_worthless_later_waits_no_longer_whatever_retry_after_asks(
    jitter: float, retry_after: float | None, failures: int
) -> None:
    outcome = Outcome(503, "", retry_after)
    found = decide(
        outcome, failures=failures, faults=1, overtaken=False, others_pass=False, jitter=jitter, longest_wait=5.0
    )
    assert isinstance(found, Retry)
    assert 0 < found.seconds <= 5.0


@given(next_at=times, now=times)
def test_a_wait_is_never_negative_nor_longer_than_the_longest_wait(next_at: float, now: float) -> None:
    assert 0.0 <= remaining_wait(next_at, now) <= LONGEST_WAIT


@given(next_at=times, now=times)
def test_what_is_due_goes_at_once(next_at: float, now: float) -> None:
    if next_at <= now:
        assert remaining_wait(next_at, now) == 0.0


@given(
    failed_at=times,
    asked=st.none() | st.floats(0, 1e6),
    failures=failure_counts,
    jitter=jitters,
    part=st.floats(0, 0.99),
)
@example(failed_at=4e9, asked=1e6, failures=1, jitter=1.0, part=0.0)
def test_a_wait_is_waited_out_while_the_clock_goes_on(
    failed_at: float, asked: float | None, failures: int, jitter: float, part: float
) -> None:
    found = decide(
        Outcome(503, "", asked), failures=failures, faults=1, overtaken=False, others_pass=False, jitter=jitter
    )
    assert isinstance(found, Retry)
    now = failed_at + part * found.seconds
    assert remaining_wait(failed_at + found.seconds, now) == pytest.approx(found.seconds * (1 - part), abs=1e-5)


@given(failed_at=times, failures=failure_counts, jitter=jitters, now=times)
@example(failed_at=1.7e9, failures=3, jitter=0.0, now=1.7e9 - 3600)  # set back an hour
@example(failed_at=1.7e9, failures=7, jitter=0.0, now=1.7e9 - 5)  # set back a little
@example(failed_at=1.7e9, failures=7, jitter=0.0, now=0.0)  # no clock at all yet
def test_a_clock_set_anywhere_never_blocks_delivery(failed_at: float, failures: int, jitter: float, now: float) -> None:
    next_at = failed_at + backoff(failures, jitter)
    wait = remaining_wait(next_at, now)
    assert wait <= LONGEST_WAIT
    assert remaining_wait(next_at, now + wait) <= 1e-6, "one wait is enough, unless the clock is set again"


# Retry-After


FORMS = {
    "IMF-fixdate": "%a, %d %b %Y %H:%M:%S GMT",
    "RFC 850": "%A, %d-%b-%y %H:%M:%S GMT",
    "asctime": "%a %b %e %H:%M:%S %Y",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(seconds=st.integers(-(10**6), 10**6))
def test_each_form_of_an_http_date_is_understood(form: str, seconds: int) -> None:
    text = (NOW + timedelta(seconds=seconds)).strftime(form)
    assert parse_retry_after(text, NOW.timestamp()) == max(0.0, seconds)


def test_the_date_of_the_standard_is_understood_in_all_three_forms() -> None:
    """RFC 9110 section 5.6.7."""
    before = datetime(1994, 11, 6, 8, 49, 0, tzinfo=UTC).timestamp()
    for text in ("Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"):
        assert parse_retry_after(text, before) == 37.0
        assert parse_retry_after(text, NOW.timestamp()) == 0.0, "long past"


def test_a_date_without_a_zone_is_not_of_the_host_s(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        assert parse_retry_after("Tue Jul 14 09:30:05 2026", NOW.timestamp()) == 5.0
    time.tzset()


def test_a_date_that_names_another_zone_is_taken_at_its_word() -> None:
    zone = datetime.fromisoformat("2026-07-14T11:30:05+02:00")
    assert parse_retry_after(format_datetime(zone), NOW.timestamp()) == 5.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("120", 120.0), (" 7 ", 7.0), ("007", 7.0), ("1.5", 1.5), ("30.", 30.0), (".5", 0.5)],
)
def test_seconds_are_understood(text: str, seconds: float) -> None:
    assert parse_retry_after(text, NOW.timestamp()) == seconds


@pytest.mark.parametrize("text", ["9" * 30, "9" * 400, "9" * 10_000, "9" * 400 + ".5", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_absurd_numbers_are_clamped(text: str) -> None:
    seconds = parse_retry_after(text, NOW.timestamp())
    assert seconds is not None
    assert decided(Outcome(429, "", seconds)) == Retry(LONGEST_RETRY_AFTER)


NONSENSE = [
    *(
        "",
        " ",
        "soon",
        "-5",
        "+5",
        "1,5",
        ".",
        "1.5.0",
        "-1.5",
        "1e3",
        "0x10",
        "1 2",
        "٣",
        "²",
        "NaN",
        "inf",
        "12 seconds",
    ),
    *("Sun, 99 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 25:61:61 GMT", "Sun, 06 Nov", "06 Nov 99999 08:49:37 GMT"),
    "Fri, 31 Dec 9999 23:59:59 -9999",
]


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_asks_for_nothing(text: str) -> None:
    assert parse_retry_after(text, NOW.timestamp()) is None


words = ["Sun", "Nov", ",", " ", "-", ":", "GMT", "+0000", "-9999", "+999999999", "1994", "94", "06", "08:49:37", "0"]
pieces = st.lists(st.sampled_from(words), max_size=12).map(" ".join)


@given(text=st.text() | pieces | st.from_regex("[A-Za-z]{3}, [0-9]+ [A-Za-z]{3} [0-9]+ [0-9]+:[0-9]+:[0-9]+ .*"))
def test_no_text_breaks_the_parser_or_the_wait(text: str) -> None:
    seconds = parse_retry_after(text, NOW.timestamp())
    assert seconds is None or seconds >= 0.0
    found = decided(Outcome(429, "", seconds))
    assert isinstance(found, Retry)
    assert isfinite(found.seconds)
    assert 1.0 <= found.seconds <= LONGEST_RETRY_AFTER


def test_hosts_that_failed_together_do_not_come_back_together() -> None:
    uniform = random.Random(7).uniform
    waits = {backoff(7, uniform(-1, 1)) for _ in range(100)}
    assert len(waits) == 100
    assert 48 <= min(waits) < 52
    assert 68 < max(waits) <= 72
