"""Which round is active: a pure function of the head, held against its definition by walking back block by block."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocd.protocol.rounds import RoundPolicy, active_start


@st.composite
def policies(draw: st.DrawFn) -> RoundPolicy:
    every = draw(st.integers(1, 40))
    return RoundPolicy(every, draw(st.integers(0, every - 1)), draw(st.integers(1, every)))


def walk_back(height: int, policy: RoundPolicy) -> int | None:
    """Look for a start among the `duration` blocks that end at `height`; the first block has height 1."""
    for start in range(height, height - policy.duration, -1):
        if start >= 1 and start % policy.every == policy.offset:
            return start
    return None


@given(height=st.integers(0, 200), policy=policies())
def test_the_active_round_is_the_one_that_walking_back_finds(height: int, policy: RoundPolicy) -> None:
    assert active_start(height, policy) == walk_back(height, policy)


@given(height=st.integers(1, 10**12), policy=policies())
def test_every_height_of_a_round_names_the_same_start(height: int, policy: RoundPolicy) -> None:
    start = active_start(height, policy)
    if start is None:
        return
    lived = {active_start(start + age, policy) for age in range(policy.duration)}
    assert lived == {start}
    assert active_start(start + policy.duration, policy) in {None, start + policy.every}


@pytest.mark.parametrize(
    ("height", "expected"),
    [(0, None), (2, None), (3, 3), (6, 3), (7, None), (12, None), (13, 13), (16, 13), (17, None)],
)
def test_a_round_lives_from_its_start_for_duration_blocks(height: int, expected: int | None) -> None:
    assert active_start(height, RoundPolicy(every=10, offset=3, duration=4)) == expected


def test_rounds_as_long_as_their_period_follow_one_another_without_a_gap() -> None:
    policy = RoundPolicy(every=3, offset=0, duration=3)
    assert [active_start(height, policy) for height in range(1, 8)] == [None, None, 3, 3, 3, 6, 6]


def test_each_block_can_be_a_round() -> None:
    policy = RoundPolicy(every=1, offset=0, duration=1)
    assert [active_start(height, policy) for height in (0, 1, 2, 10**12)] == [None, 1, 2, 10**12]


def test_height_zero_is_an_empty_chain_and_no_start() -> None:
    assert active_start(0, RoundPolicy(every=5, offset=0, duration=5)) is None
    assert active_start(4, RoundPolicy(every=5, offset=0, duration=5)) is None
