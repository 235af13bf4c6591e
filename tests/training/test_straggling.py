"""Who is slower than its peers, and for how long one must be to be a straggler."""

import time
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidepool.training.membership import Report, WorkerId
from tidepool.training.shard_clock import ShardClock
from tidepool.training.straggling import WINDOW, Rules, Straggling

RULES = Rules(lasting_s=10.0)


def reports(shard_s: list[float], num_steps: int) -> list[Report]:
    return [Report(WorkerId(group, 0), 1, 1, "", shard_s=one, num_steps=num_steps) for group, one in enumerate(shard_s)]


def after(straggling: Straggling, shard_s: list[float], seconds: float, start: float = 0.0, steps_per_s: float = 10.0) -> list[int]:
    """The groups that are stragglers when these times have been reported each second."""
    for second in range(int(seconds) + 1):
        straggling.note(reports(shard_s, int((start + second) * steps_per_s)), start + second)
    return sorted(worker.group for worker in straggling.stragglers)


def test_scores_compare_with_the_median_of_the_peers() -> None:
    straggling = Straggling(RULES)
    straggling.note(reports([1.0, 1.2, 2.0, 0.5], 0), 0.0)
    scores = [straggling.scores[WorkerId(group, 0)] for group in range(4)]
    assert scores == pytest.approx([1.2, 1.0 / 1.2, 1.0 / 2, 1.2 / 0.5])


@given(st.lists(st.floats(0.001, 100), min_size=2, max_size=9))
def test_scores_are_what_they_say(shard_s: list[float]) -> None:
    import statistics

    straggling = Straggling(RULES)
    straggling.note(reports(shard_s, 0), 0.0)
    for number, own in enumerate(shard_s):
        peers = shard_s[:number] + shard_s[number + 1 :]
        assert straggling.scores[WorkerId(number, 0)] == pytest.approx(statistics.median(peers) / own)


def test_who_is_alone_or_has_not_taken_enough_steps_has_no_score() -> None:
    straggling = Straggling(RULES)
    straggling.note(reports([1.0], 0), 0.0)
    assert straggling.scores == {}
    straggling.note(reports([1.0, 0.0], 0), 0.0)
    assert straggling.scores == {}


def test_a_straggler_has_been_slow_for_long() -> None:
    assert after(Straggling(RULES), [1.0, 1.0, 2.0], 9) == []
    assert after(Straggling(RULES), [1.0, 1.0, 2.0], 10) == [2]
    assert after(Straggling(RULES), [1.0, 1.0, 1.4], 100) == [], "0.71 of its peers' speed"


def test_and_over_many_steps() -> None:
    assert after(Straggling(RULES), [1.0, 1.0, 2.0], 30, steps_per_s=(WINDOW - 1) / 30) == []
    assert after(Straggling(RULES), [1.0, 1.0, 2.0], 30, steps_per_s=WINDOW / 30) == [2]


def test_a_moment_of_speed_begins_the_time_anew_and_only_real_speed_ends_it() -> None:
    straggling = Straggling(RULES)
    assert after(straggling, [1.0, 1.0, 2.0], 8) == []
    assert after(straggling, [1.0, 1.0, 1.3], 0, start=9) == []
    assert after(straggling, [1.0, 1.0, 2.0], 9, start=10) == []
    assert after(straggling, [1.0, 1.0, 2.0], 1, start=20) == [2]
    assert after(straggling, [1.0, 1.0, 1.35], 5, start=22) == [2], "0.74: neither slow nor fast"
    assert after(straggling, [1.0, 1.0, 1.2], 0, start=30) == []


def test_who_leaves_is_no_straggler_any_more() -> None:
    straggling = Straggling(RULES)
    assert after(straggling, [1.0, 1.0, 2.0], 20) == [2]
    assert after(straggling, [1.0, 1.0], 0, start=21) == []


def test_the_clock_counts_shards_and_nothing_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    clock = ShardClock(torch.device("cpu"))
    for _ in range(4):
        with clock.measure():
            pass
        next(seconds)
    assert clock.take() == 1.0
    assert clock.take() == 0.0
    with pytest.raises(ValueError, match="fails"), clock.measure():
        raise ValueError("fails")
    assert clock.take() == 0.0
