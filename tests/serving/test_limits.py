"""Token buckets and meters, by a clock of the test's own."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.serving.limits import Bucket, LimitReached, Limits, Meter


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_is_full_at_first_and_fills_evenly() -> None:
    bucket = Bucket(60, now_s=0)
    bucket.take(60, 0)
    assert bucket.wait_s(1, 0) == 1
    assert bucket.wait_s(1, 0.5) == 0.5
    assert bucket.wait_s(30, 30) == 0
    bucket.take(90, 30)
    assert bucket.wait_s(1, 30) == 61, "a debt is paid first"
    assert bucket.wait_s(60, 1000) == 0
    assert bucket.wait_s(61, 1000) == 1, "it holds no more than a minute brings"


def test_a_clock_that_goes_back_brings_nothing() -> None:
    bucket = Bucket(60, now_s=10)
    bucket.take(60, 10)
    assert bucket.wait_s(1, 5) == 1
    assert bucket.wait_s(1, 10) == 1


@given(
    per_minute=st.integers(1, 500),
    steps=st.lists(st.tuples(st.floats(0, 90), st.integers(1, 5)), max_size=60),
)
def test_no_key_begins_more_requests_than_its_limit_allows(per_minute: int, steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    meter, num_let_in = Meter(Limits(requests_per_minute=per_minute), clock), 0
    for step_s, num_tries in steps:
        clock.now_s += step_s
        num_let_in += sum(meter.enter() is None for _ in range(num_tries))
    assert num_let_in <= per_minute * (1 + (clock.now_s - 100) / 60) + 1e-6


@given(per_minute=st.integers(1, 50), num_tries=st.integers(1, 60))
def test_who_comes_again_after_the_time_that_was_named_is_let_in(per_minute: int, num_tries: int) -> None:
    clock = Clock()
    meter = Meter(Limits(requests_per_minute=per_minute), clock)
    reached = [found for _ in range(num_tries) if (found := meter.enter())]
    assert len(reached) == max(0, num_tries - per_minute)
    if reached:
        clock.now_s += reached[-1].retry_after_s + 1e-6
        assert meter.enter() is None


def test_tokens_leave_a_debt_that_is_paid_before_the_next_request() -> None:
    clock = Clock()
    meter = Meter(Limits(tokens_per_minute=600), clock)
    assert meter.enter() is None
    meter.spend(500)
    assert meter.enter() is None, "there are some left"
    meter.spend(300)
    assert meter.enter() == LimitReached("tokens_per_minute", 600, pytest.approx(20.1))
    clock.now_s += 20.2
    assert meter.enter() is None


def test_requests_at_one_time() -> None:
    meter = Meter(Limits(concurrent_requests=2), Clock())
    assert [meter.enter(), meter.enter()] == [None, None]
    assert meter.enter() == LimitReached("concurrent_requests", 2, 1.0)
    meter.leave()
    assert meter.enter() is None
    assert meter.num_running == 2


def test_what_is_refused_costs_nothing() -> None:
    meter = Meter(Limits(requests_per_minute=2, concurrent_requests=1), Clock())
    assert meter.enter() is None
    assert [found.limit for _ in range(5) if (found := meter.enter())] == ["concurrent_requests"] * 5
    meter.leave()
    assert meter.enter() is None, "the second of this minute"


@pytest.mark.parametrize("limits", [{"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"concurrent_requests": 0}])
def test_a_limit_of_nothing_is_an_error_and_not_no_limit(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Limits(**limits)
