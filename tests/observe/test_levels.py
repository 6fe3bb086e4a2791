"""How something that is well or not becomes few lines of log."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pocd.observe.levels import CALM, Level


def test_what_gets_worse_and_better_is_told_at_once() -> None:
    level = Level()
    assert [level.look(0, bad=bad) for bad in (False, True, True, False, False)] == [
        None,
        "worse",
        None,
        "better",
        None,
    ]
    assert level.times == 1
    assert level.look(CALM, bad=True) == "worse"
    assert level.look(CALM + 1, bad=False) == "better"


def test_what_flaps_is_told_as_better_when_it_was_well_for_long_enough() -> None:
    level = Level()
    told = [level.look(look, bad=look % 2 == 0) for look in range(101)]
    assert told == ["worse", "better", "worse", *[None] * 98]
    assert level.look(101, bad=False) is None
    assert level.look(100 + CALM, bad=False) is None
    assert level.look(101 + CALM, bad=False) == "better"
    assert level.times == 50


@given(st.lists(st.tuples(st.integers(0, 2 * int(CALM)), st.booleans()), max_size=100))
def test_turns_alternate_and_none_is_missed(looks: list[tuple[int, bool]]) -> None:
    level, now, told = Level(), 0, []
    for seconds, bad in looks:
        now += seconds
        turn = level.look(now, bad=bad)
        told += [turn] if turn else []
        assert not bad or told[-1] == "worse"
    assert told == ["worse", "better"] * (len(told) // 2) + ["worse"] * (len(told) % 2)
    if told:
        assert (level.look(now, bad=False), level.look(now + CALM, bad=False)).count("better") == len(told) % 2
