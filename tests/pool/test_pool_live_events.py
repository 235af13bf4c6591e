"""What `benchmarks/pool_live.py` reads off who held the slots."""

import pytest

from benchmarks.pool_live_events import Change, Sample, placements, reclaims, returns, shares


def sample(at_s: float, wanted: int = 1, placed: int = 1, groups: int = 3, step: int = 0, free: float = 0) -> Sample:
    return Sample(at_s, wanted, placed, placed, groups, step, free)


UP = [sample(0), sample(1, wanted=3), sample(2, wanted=3, placed=2, groups=1), sample(4, wanted=3, placed=3, groups=1)]
DOWN = [
    sample(5, placed=3, groups=1, step=7),
    sample(6, groups=1, step=8, free=2),
    sample(9, groups=2, step=9),
    sample(10, step=9),
    sample(11, step=10),
]


def test_each_replica_is_waited_for_from_when_it_is_wanted_to_when_it_has_a_slot() -> None:
    assert placements(UP) == reclaims(UP) == [Change(1, 1, is_met=True), Change(1, 3, is_met=True)]
    assert reclaims([sample(0)]) == reclaims([]) == []


def test_a_slot_that_is_free_is_reclaimed_and_not_placed_yet() -> None:
    freed = [*UP[:2], sample(1.5, wanted=3, groups=1, free=1.999), *UP[2:]]
    assert reclaims(freed) == [Change(1, 0.5, is_met=True), Change(1, 3, is_met=True)]
    assert placements(freed) == placements(UP)


def test_a_replica_that_never_came_is_waited_for_until_it_is_wanted_no_longer_or_the_end() -> None:
    assert reclaims([*UP[:2], sample(9)]) == [Change(1, 8, is_met=False)] * 2
    assert reclaims(UP[:3]) == [Change(1, 1, is_met=True), Change(1, 1, is_met=False)]


def test_a_slot_is_back_when_a_step_was_taken_with_one_worker_more() -> None:
    assert returns(DOWN) == [Change(6, 5, is_met=True), Change(6, 5, is_met=True)]


def test_a_slot_that_another_replica_took_is_not_waited_for_and_one_that_nobody_took_is() -> None:
    assert returns([*DOWN[:2], sample(7, placed=2, groups=1, free=1), sample(8, placed=2, groups=1, free=1)]) == [
        Change(6, 2, is_met=False)
    ]
    assert returns(UP) == []


def test_the_time_of_slots_is_shared_out() -> None:
    half = shares([sample(0, free=2, groups=1), sample(1), sample(2)], num_slots=4)
    assert half.idle == pytest.approx(2 / 8)
    assert half.starting == 0
    assert shares([sample(0, groups=1), sample(4, groups=3)], num_slots=4).starting == pytest.approx(2 / 4)
