"""Rounds by epoch: what is due at each height, whatever was seen or missed before."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocd.protocol.epochs import (
    Confirmation,
    EpochInfo,
    EpochRound,
    LiveScheme,
    Phase,
    Stage,
    Windows,
    accepted_at,
    scheme_of,
    stage_at,
)

P = 6_450_112
LIVE = Windows(epoch=15_391, generation=35, exchange=0, delay=5, validation=240, new_validators=120)
INFO = EpochInfo(
    height=P,
    epoch=419,
    start=P,
    windows=LIVE,
    confirmation=None,
    recipes=(),
    scheme=LiveScheme.PREFILL,
    confirmation_scheme=LiveScheme.PREFILL,
    confirmation_scheme_rounds=0,
    stronger_rng=False,
)
SEED = "9b4c" * 16
EVENT = Confirmation(sequence=1, trigger=P + 4888, start=P + 4890, seed=SEED)
CONFIRMING = dataclasses.replace(INFO, confirmation=EVENT)


@pytest.mark.parametrize(
    ("offset", "phase", "until"),
    [
        (-1, Phase.INFERENCE, 0),
        (0, Phase.GENERATE, 28),
        (27, Phase.GENERATE, 28),
        (28, Phase.GENERATE_WIND_DOWN, 40),
        (39, Phase.GENERATE_WIND_DOWN, 40),
        (40, Phase.VALIDATE, 232),
        (231, Phase.VALIDATE, 232),
        (232, Phase.VALIDATE_WIND_DOWN, 280),
        (279, Phase.VALIDATE_WIND_DOWN, 280),
        (280, Phase.INFERENCE, 15_391),
        (15_390, Phase.INFERENCE, 15_391),
        (15_391, Phase.UNKNOWN, None),
    ],
)
def test_the_phases_of_the_live_network_by_height(offset: int, phase: Phase, until: int | None) -> None:
    stage = stage_at(INFO, P + offset)
    assert (stage.phase, stage.until) == (phase, None if until is None else P + until)
    assert stage.round == (EpochRound(P, None, LiveScheme.PREFILL, P + 35) if phase is Phase.GENERATE else None)


@pytest.mark.parametrize(
    ("offset", "phase", "until"),
    [
        (4887, Phase.INFERENCE, 15_391),
        (4888, Phase.ANNOUNCED, 4890),
        (4890, Phase.CONFIRM, 4925),
        (4924, Phase.CONFIRM, 4925),
        (4925, Phase.CONFIRM_CLOSED, 4929),
        (4929, Phase.CONFIRM_VALIDATE, 5169),
        (5168, Phase.CONFIRM_VALIDATE, 5169),
        (5169, Phase.INFERENCE, 15_391),
    ],
)
def test_a_confirmation_round_by_height(offset: int, phase: Phase, until: int) -> None:
    stage = stage_at(CONFIRMING, P + offset)
    assert (stage.phase, stage.until) == (phase, P + until)
    confirmed = EpochRound(P + 4888, SEED, LiveScheme.PREFILL, P + 4924)
    assert stage.round == (confirmed if phase is Phase.CONFIRM else None)


def test_a_confirmation_round_is_not_begun_without_the_hash_that_the_chain_names() -> None:
    unnamed = dataclasses.replace(INFO, confirmation=dataclasses.replace(EVENT, seed=None))
    stage = stage_at(unnamed, EVENT.start)
    assert (stage.phase, stage.round) == (Phase.CONFIRM, None)
    assert "block hash" in stage.awaits


def test_the_first_confirmation_rounds_of_an_epoch_may_have_another_scheme() -> None:
    info = dataclasses.replace(CONFIRMING, confirmation_scheme=LiveScheme.DECODE, confirmation_scheme_rounds=1)
    for sequence, scheme in ((0, LiveScheme.DECODE), (1, LiveScheme.PREFILL)):
        event = dataclasses.replace(EVENT, sequence=sequence)
        found = stage_at(dataclasses.replace(info, confirmation=event), EVENT.start).round
        assert found is not None
        assert found.scheme is scheme


def test_artifacts_are_accepted_from_the_rounds_name_to_its_last_height() -> None:
    assert accepted_at(INFO, P - 1) == {}
    assert accepted_at(INFO, P) == accepted_at(INFO, P + 35) == {P: P + 35}
    assert accepted_at(INFO, P + 36) == {}
    assert accepted_at(CONFIRMING, P + 4887) == {}
    assert accepted_at(CONFIRMING, P + 4888) == accepted_at(CONFIRMING, P + 4924) == {P + 4888: P + 4924}
    assert accepted_at(CONFIRMING, P + 4925) == accepted_at(INFO, P + 4900) == {}
    late = dataclasses.replace(EVENT, trigger=P + 15_380, start=P + 15_382)
    assert accepted_at(dataclasses.replace(INFO, confirmation=late), P + 15_391) == {}, "the next epoch has begun"
    assert accepted_at(dataclasses.replace(INFO, epoch=0), P) == {}


def test_the_first_epoch_has_no_regular_round() -> None:
    stage = stage_at(dataclasses.replace(INFO, epoch=0), P)
    assert (stage.phase, stage.until) == (Phase.INFERENCE, P + LIVE.epoch)


# Laws for any chain

blocks = st.integers(0, 9)


@st.composite
def windows(draw: st.DrawFn) -> Windows:
    generation, exchange, delay, validation, new = draw(st.integers(1, 9)), *(draw(blocks) for _ in range(4))
    used = generation + exchange + delay + validation + new
    return Windows(used + draw(st.integers(1, 40)), generation, exchange, delay, validation, new)


@st.composite
def infos(draw: st.DrawFn) -> EpochInfo:
    """Any epoch, mostly with a confirmation round somewhere in it, whose hash may not be there yet."""
    made, start = draw(windows()), draw(st.integers(1, 10**9))
    event = None
    if draw(st.integers(0, 3)):
        trigger = start + draw(st.integers(0, made.epoch))
        seed = draw(st.none() | st.sampled_from([SEED, SEED.upper()]))
        event = Confirmation(draw(st.integers(0, 3)), trigger, trigger + draw(st.integers(1, 5)), seed)
    return EpochInfo(
        height=start,
        epoch=draw(st.integers(0, 3)),
        start=start,
        windows=made,
        confirmation=event,
        recipes=(),
        scheme=LiveScheme.PREFILL,
        confirmation_scheme=draw(st.sampled_from(LiveScheme)),
        confirmation_scheme_rounds=draw(st.integers(0, 2)),
        stronger_rng=False,
    )


def every(info: EpochInfo) -> dict[int, Stage]:
    """What is due at each height of the epoch, and around it."""
    return {height: stage_at(info, height) for height in range(info.start - 5, info.start + info.windows.epoch + 5)}


def test_without_delay_and_validation_a_confirmation_round_still_generates_to_its_end() -> None:
    short = Windows(epoch=100, generation=3, exchange=0, delay=0, validation=0, new_validators=0)
    info = dataclasses.replace(
        INFO, windows=short, confirmation=Confirmation(1, INFO.start + 50, INFO.start + 52, SEED)
    )
    stages = [stage_at(info, INFO.start + height) for height in range(50, 56)]
    assert [stage.phase for stage in stages] == [*[Phase.ANNOUNCED] * 2, *[Phase.CONFIRM] * 3, Phase.INFERENCE]


@given(infos())
def test_a_phase_lasts_until_the_height_that_it_names(info: EpochInfo) -> None:
    stages = every(info)
    for height, stage in stages.items():
        following = stages.get(height + 1)
        if stage.until is None:
            assert following is None or following == stage
        elif following is not None and not begins(info, height + 1):
            assert (following == stage) == (height + 1 < stage.until), (height, stage, following)
        assert stage.until is None or stage.until > height


def begins(info: EpochInfo, height: int) -> bool:
    """Whether a confirmation round is announced at `height`: nobody knows before."""
    return info.confirmation is not None and height == info.confirmation.trigger


@given(infos())
def test_each_round_runs_in_one_piece_and_only_while_its_artifacts_are_accepted(info: EpochInfo) -> None:
    running: dict[EpochRound, list[int]] = {}
    for height, stage in every(info).items():
        if stage.round:
            running.setdefault(stage.round, []).append(height)
            assert accepted_at(info, height)[stage.round.height] == stage.round.accepted_through
    for heights in running.values():
        assert heights == list(range(heights[0], heights[-1] + 1))
    assert sum(round_.seed is None for round_ in running) <= 1
    assert all(round_.seed == info.confirmation.seed for round_ in running if info.confirmation and round_.seed)


@given(infos(), st.data())
def test_who_comes_late_or_misses_blocks_runs_the_same_rounds(info: EpochInfo, data: st.DataObject) -> None:
    stages = every(info)
    seen = data.draw(st.sets(st.sampled_from(sorted(stages))))
    for round_ in {stage.round for stage in stages.values() if stage.round}:
        heights = {height for height, stage in stages.items() if stage.round == round_}
        assert {stage_at(info, height).round for height in seen & heights} <= {round_}


@given(infos(), windows())
def test_parameters_that_change_in_mid_epoch_change_no_round_but_how_long_it_lasts(
    info: EpochInfo, other: Windows
) -> None:
    """Whatever they become, what runs is the epoch's regular round or its confirmation round, by the same names."""
    named: dict[tuple[int, str | None], LiveScheme] = {(info.start, None): info.scheme}
    if info.confirmation and info.confirmation.seed:  # without its hash it does not run
        named[info.confirmation.trigger, info.confirmation.seed] = scheme_of(info, info.confirmation)
    for windows in (info.windows, other):
        for stage in every(dataclasses.replace(info, windows=windows)).values():
            if stage.round:
                assert named[stage.round.height, stage.round.seed] is stage.round.scheme


@given(infos(), st.integers(1, 1000))
def test_what_was_said_of_an_earlier_epoch_starts_nothing(info: EpochInfo, later: int) -> None:
    stage = stage_at(info, info.start + info.windows.epoch - 1 + later)
    assert (stage.phase, stage.round, stage.until) == (Phase.UNKNOWN, None, None)
