"""How many replicas a model gets: enough for its traffic and its time to the first token, fewer when it is calm, none when nobody asks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.errors import SpecError
from tidepool.serving.scaling import Demand, Limits, ReplicaLoad, num_needed, num_wanted
from tidepool.serving.waiting import LATEST_S, Waits
from tidepool.specs import ReplicasSpec, parse_spec


def wanted(*occupancies: float, ttft_s: float = 0.1, cache_use: float = 0.0, target: int | None = None) -> int:
    loads = [ReplicaLoad(one, cache_use, ttft_s) for one in occupancies]
    return num_wanted(loads, len(loads), len(loads) if target is None else target, ttft_s=1.0)


def test_replicas_come_for_a_queue_for_a_full_cache_and_for_a_late_first_token() -> None:
    assert wanted(3.0) == 5
    assert wanted(0.5) == 1
    assert wanted(0.5, cache_use=0.95) == 2
    assert wanted(0.5, ttft_s=1.5) == 2
    assert wanted(0.5, ttft_s=1.5, target=2) == 2, "one is starting"


def test_replicas_go_when_those_that_stay_are_far_from_busy_and_nobody_waits() -> None:
    assert wanted(0.1, 0.1) == 1
    assert wanted(0.3, 0.3) == 2
    assert wanted(0.1, 0.1, ttft_s=0.8) == 2
    assert wanted(0.2, 0.2, 0.2, 0.2) == 2
    assert wanted(0.0, 0.0, ttft_s=0.3) == 1, "there was traffic a moment ago"
    assert wanted(0.0, 0.0, ttft_s=0.0) == 0
    assert wanted() == 0
    assert num_wanted([], 1, 1, ttft_s=1.0) == 1, "it has just started, and has said nothing yet"
    assert num_wanted([ReplicaLoad(3.0, 0.0, 0.1)], 2, 2, ttft_s=1.0) == 5


@given(st.lists(st.floats(0, 5), min_size=1, max_size=20), st.floats(0, 3))
def test_what_was_decided_for_a_load_is_kept_for_it(occupancies: list[float], ttft_s: float) -> None:
    """Else replicas would come and go under steady traffic. (Of a late first token the next replica is the judge.)"""
    first = wanted(*occupancies, ttft_s=ttft_s)
    busy = sum(occupancies)
    if first and ttft_s <= 1:
        assert wanted(*[busy / first] * first, ttft_s=ttft_s) in (first, first - 1)
        again = wanted(*[busy / first] * first, ttft_s=0.1)
        assert again == wanted(*[busy / again] * again, ttft_s=0.1)


def limits(**given: float) -> Limits:
    return Limits(**({"min": 1, "max": 4, "ttft_s": 1.0, "up_after_s": 2.0, "down_after_s": 10.0, "zero_after_s": 30.0} | given))  # type: ignore[arg-type]


class Traffic:
    """A deployment whose replicas are all as busy, from second to second; as many run as are wanted."""

    def __init__(self, num: int, **given: float) -> None:
        self.demand, self.now, self.num_running = Demand(limits(**given), num), 100.0, num

    def go_on(self, seconds: float, busy: float, ttft_s: float = 0.1, has_rung: bool = False, starts: bool = True) -> tuple[int, int]:
        """What is wanted and needed at the end of so many seconds of traffic that keeps `busy` replicas busy."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            load = ReplicaLoad(busy / self.num_running, 0.0, ttft_s if busy else 0.0) if self.num_running else None
            self.demand.update([load] * self.num_running if load else [], self.num_running, self.now, has_rung)
            has_rung = False
            if starts:
                self.num_running = self.demand.num_wanted
        return self.demand.num_wanted, self.demand.num_needed


def test_a_blip_moves_nothing_and_what_lasts_does() -> None:
    traffic = Traffic(1)
    assert traffic.go_on(1.5, busy=2.0) == (1, 1)
    assert traffic.go_on(0.5, busy=0.3) == (1, 1)
    assert traffic.go_on(1.5, busy=2.0) == (1, 1), "that was another blip"
    assert traffic.go_on(1.0, busy=2.0) == (3, 3)
    assert traffic.go_on(9.5, busy=0.3) == (3, 1), "what traffic can do without is said at once"
    assert traffic.go_on(1.0, busy=0.3) == (1, 1)


def test_no_more_and_no_fewer_than_the_spec_says() -> None:
    assert Traffic(0).demand.num_wanted == 1, "the first one waits for nothing"
    assert Traffic(9).demand.num_wanted == 4
    assert Traffic(1).go_on(5, busy=50) == (4, 4)
    assert Traffic(2, min=2).go_on(100, busy=0.0) == (2, 2), "the spec's min is needed, whatever the traffic"


def test_the_last_one_goes_after_a_delay_of_its_own_and_who_rings_gets_one_at_once() -> None:
    traffic = Traffic(3, min=0)
    assert traffic.go_on(11, busy=0.0) == (1, 0)
    assert traffic.go_on(29, busy=0.0) == (1, 0)
    assert traffic.go_on(2, busy=0.0) == (0, 0)
    assert traffic.go_on(60, busy=0.0) == (0, 0)
    assert traffic.go_on(0.1, busy=0.0, has_rung=True) == (1, 1)


def test_a_first_replica_that_takes_long_to_start_is_wanted_as_long_as_somebody_waits() -> None:
    traffic = Traffic(0, min=0, zero_after_s=1.0)
    for _ in range(20):
        assert traffic.go_on(5, busy=0.0, has_rung=True, starts=False)[0] == 1
    assert traffic.go_on(14, busy=0.0, starts=False)[0] == 0, "who waited has left"


def test_what_is_needed_is_what_this_moment_cannot_do_without() -> None:
    assert num_needed([ReplicaLoad(0.1, 0.0, 0.1)] * 3, 3, ttft_s=1.0) == 1
    assert num_needed([ReplicaLoad(0.5, 0.0, 0.1)] * 3, 3, ttft_s=1.0) == 3
    assert num_needed([ReplicaLoad(0.1, 0.9, 0.1)] * 3, 3, ttft_s=1.0) == 3
    assert num_needed([ReplicaLoad(0.1, 0.0, 0.8)] * 3, 3, ttft_s=1.0) == 3, "somebody waits already"
    assert num_needed([ReplicaLoad(5.0, 0.0, 9.0)], 2, ttft_s=1.0) == 2, "never more than is wanted"
    assert num_needed([], 1, ttft_s=1.0) == 0


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 3), st.integers(1, 30), st.booleans()), max_size=30), st.integers(0, 3))
def test_what_is_wanted_stays_between_the_bounds_and_what_is_needed_below_it(
    traffic: list[tuple[float, float, int, bool]], least: int
) -> None:
    one = Traffic(1, min=least)
    for busy, ttft_s, tenths, has_rung in traffic:
        wanted, needed = one.go_on(tenths / 10, busy, ttft_s, has_rung)
        assert least <= wanted <= 4
        assert min(least, wanted) <= needed <= wanted


def test_the_time_to_the_first_token_is_that_of_nearly_all_and_of_who_waits_now() -> None:
    now = [0.0]
    waits = Waits(lambda: now[0])
    assert waits.ttft_s == 0
    for index in range(10):
        waits.begin(f"r{index}")
    for index in range(10):
        now[0] += 1
        waits.answer(f"r{index}")
        waits.answer(f"r{index}")
    assert waits.ttft_s == 10
    waits.begin("stuck")
    now[0] += 15
    assert waits.ttft_s == 15
    waits.leave("stuck")
    now[0] += LATEST_S
    assert waits.ttft_s == 0


def test_bounds_that_contradict_are_refused() -> None:
    assert ReplicasSpec.model_validate({"scale": {"min": 0, "max": 3}}).scale is not None
    with pytest.raises(SpecError, match=r"min \(4\) exceeds max \(3\)"):
        parse_spec({"scale": {"min": 4, "max": 3}}, ReplicasSpec)


def test_the_first_replica_is_needed_while_somebody_waits_for_it() -> None:
    demand = Demand(Limits(0, 2, 20.0, 0.5, 2.0, 4.0), 0)
    demand.update([], 0, 100.0, True)
    assert (demand.num_wanted, demand.num_needed) == (1, 1)
