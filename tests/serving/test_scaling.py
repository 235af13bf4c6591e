"""How many replicas a model gets: enough for its traffic and its time to the first token, fewer when it is calm, none when nobody asks."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.errors import SpecError
from tidepool.serving.scaling import Autoscaler, ReplicaLoad, num_wanted
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


def test_serve_is_told_what_replicas_report() -> None:
    @dataclass
    class Value:
        value: float
        timestamp: float = 0.0

    metrics = {
        "occupancy": {"a": [Value(9.0), Value(0.5)], "b": [Value(2.0)], "c": []},
        "cache_use": {"a": [Value(0.1)], "b": [Value(0.2)]},
        "ttft_s": {"a": [Value(0.1)]},
        "running": {"a": [Value(99.0)]},
    }
    context = SimpleNamespace(raw_metrics=metrics, current_num_replicas=2, target_num_replicas=2)
    assert Autoscaler(ttft_s=1.0)(context) == (4, {})
    assert Autoscaler(ttft_s=1.0)(SimpleNamespace(raw_metrics=None, current_num_replicas=1, target_num_replicas=1)) == (1, {})


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
