from dataclasses import replace

import pytest

from tests.pool.pools import SHORT, run
from tidepool.messages import Run
from tidepool.pool.ranking import AGED, OWED, RESERVED, STRONGEST, USUAL, Power, band, may_pause, power, share


def waiting(name: str, **values: object) -> Run:
    return run(name, **({"held_s": 3600.0, "submitted_s": -7200.0, "waiting_since_s": 0.0, "as_of_s": 0.0} | values))


def test_tiers_come_before_priorities_and_priorities_before_what_was_used() -> None:
    runs = [
        waiting("a", tier="premium", priority=-5, used_gpu_s=1e9),
        waiting("b", tier="standard", priority=2, used_gpu_s=1e9),
        waiting("c", tier="standard", priority=1, used_gpu_s=0.0),
        waiting("d", tier="standard", priority=1, used_gpu_s=2000.0),
        waiting("e", tier="basic", priority=9, used_gpu_s=0.0),
    ]
    powers = [power(r, False, 1.0, SHORT) for r in runs]
    assert powers == sorted(powers)
    assert len(set(powers)) == 5


def test_a_broken_guarantee_comes_first_then_who_waited_too_long_unless_too_much_was_guaranteed() -> None:
    owed = power(waiting("a", tier="standard", held_s=0.0), False, 1.0, SHORT)
    aged = power(waiting("b", tier="basic"), False, SHORT.aging_s, SHORT)
    usual = power(waiting("c", tier="premium"), False, 1.0, SHORT)
    assert [owed.standing, aged.standing, usual.standing] == [OWED, AGED, USUAL]
    assert owed < aged < usual
    assert power(waiting("b", tier="basic"), False, SHORT.aging_s, SHORT, is_overpromised=lambda: True) < owed


def test_waiting_less_than_the_limit_is_not_too_long() -> None:
    assert power(waiting("a", tier="basic"), False, SHORT.aging_s - 1, SHORT).standing == USUAL


@pytest.mark.parametrize(("used", "expected"), [(0.0, 0), (1799.0, 0), (1800.0, 1), (14_400.0, 2), (1e9, 3)])
def test_bands(used: float, expected: int) -> None:
    assert band(run("r", used_gpu_s=used), 0.0, SHORT) == expected


def test_what_a_run_holds_counts_as_used_from_when_it_was_last_counted() -> None:
    holder = run("r", 1, 2, held={"n0": 0.0, "n1": 0.0}, used_gpu_s=1000.0, as_of_s=100.0)
    assert band(holder, 499.0, SHORT) == 0
    assert band(holder, 500.0, SHORT) == 1


def test_share_is_of_the_window_or_of_the_life_so_far() -> None:
    assert share(run("r", held={"n0": 0.0}, held_s=50.0, as_of_s=100.0, submitted_s=0.0), True, 200.0, SHORT) == pytest.approx(0.75)
    assert share(run("r", held_s=1800.0, as_of_s=9000.0, submitted_s=0.0), False, 9000.0, SHORT) == pytest.approx(0.5)
    assert share(run("r", submitted_s=0.0), False, 0.0, SHORT) == 1.0


@pytest.mark.parametrize(("spare_s", "standing"), [(SHORT.return_s, USUAL), (SHORT.return_s - 1, OWED)])
def test_a_place_is_claimed_while_a_tenure_and_the_vacating_after_it_can_still_be_waited_for(spare_s: float, standing: int) -> None:
    assert SHORT.return_s == SHORT.tenure_s + SHORT.vacate_s
    paused = waiting("r", tier="standard", held_s=SHORT.guarantees["standard"] * SHORT.window_s + spare_s)
    assert power(paused, False, 1.0, SHORT).standing == standing


def holder(**values: object) -> Run:
    return run("v", held={"n0": 0.0}, **({"submitted_s": -7200.0, "held_s": 3600.0, "tier": "premium", "started_s": -3600.0} | values))


def pauses(claimant: Power, victim: Run, **rest: bool) -> bool:
    return may_pause(claimant, power(victim, True, 0.0, SHORT), victim, 0.0, SHORT, **rest)


def test_the_stronger_pauses_the_weaker_and_never_an_equal() -> None:
    own = power(holder(), True, 0.0, SHORT)
    assert pauses(own._replace(unpriority=own.unpriority - 1), holder())
    assert not pauses(own, holder())
    assert not pauses(own._replace(unpriority=own.unpriority + 1), holder())


def test_a_tenure_is_kept_against_all_but_serving_and_reservations() -> None:
    fresh = holder(started_s=1.0 - SHORT.tenure_s)
    assert not pauses(Power(AGED, 0, 0, 0), fresh)
    assert pauses(STRONGEST, fresh)
    assert pauses(Power(RESERVED, 0, 0, 0), fresh)


def test_a_guarantee_is_not_broken_even_for_those_who_waited_too_long() -> None:
    spare = holder(held_s=3600.0 * 0.99)
    worn = holder(held_s=3600.0 * 0.96)
    assert pauses(Power(AGED, 0, 0, 0), spare)
    assert not pauses(Power(AGED, 0, 0, 0), worn)


def test_of_two_guarantees_that_cannot_both_be_kept_the_better_tier_is() -> None:
    worn = holder(tier="standard", held_s=3600.0 * 0.5)
    assert pauses(Power(OWED, 0, 0, 0), worn, is_overpromised=True)
    assert not pauses(Power(OWED, 2, 0, 0), worn, is_overpromised=True)
    assert not pauses(Power(OWED, 1, 0, 0), replace(worn, tier="premium"), is_overpromised=True)
    assert not pauses(Power(OWED, 0, 0, 0), worn)
