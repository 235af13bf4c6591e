"""What projects used: every second is counted once, whoever dies, and the store holds an object or two a day."""

from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pool.pools import deployment, run
from tidepool.errors import StoreError, StoreUnreachableError
from tidepool.messages import Resources
from tidepool.pool import usage_log
from tidepool.pool.usage_log import MAX_GAP_S, Day, Holding, UsageLog, Used, advance, holdings, read_usage, total_of
from tidepool.storage import ObjectStore, append, open_store

NOON_S = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
MIDNIGHT_S = NOON_S + 12 * 3600
SEA = (Holding("sea", "training", gpus=3),)
BOTH = (Holding("lake", "serving", gpus=1), Holding("sea", "training", gpus=2, cpus=5))


@pytest.fixture
def store(store_url: str) -> ObjectStore:
    return open_store(store_url)


def gpu_s(store: ObjectStore, project: str | None = None) -> float:
    return sum(used.gpu_s for used in total_of(read_usage(store), project))


def keep(log: UsageLog, held: tuple[Holding, ...], first_s: int, last_s: int) -> None:
    """A step each second, as the arbiter does it."""
    for second in range(first_s, last_s + 1):
        log.step(held, NOON_S + second)


# --- What is held ----------------------------------------------------------------------------------------------------


def test_gpus_are_counted_and_cpus_where_there_is_no_gpu() -> None:
    runs = [
        run("a", 1, 4, {"n0": 0.0, "n1": 0.0}, project="sea", worker=Resources(2, 8)),
        run("b", 1, 4, {"n2": 0.0}, project="sea", worker=Resources(0, 3)),
        run("c", project="lake"),
    ]
    served = [replace(deployment("chat", 2, ("n3", "n4")), project="lake"), deployment("small", 1)]
    assert holdings(runs, served) == (Holding("lake", "serving", 2, 0), Holding("sea", "training", 4, 3))


# --- Adding up -------------------------------------------------------------------------------------------------------


def test_what_is_held_is_added_up_over_time() -> None:
    [day] = advance(Day("2026-11-26", NOON_S, BOTH), NOON_S + 10)
    assert day.used == (Used("lake", "serving", 10.0, 0.0), Used("sea", "training", 20.0, 50.0))
    assert advance(day, NOON_S) == (day,), "a clock that goes back takes nothing away"


def test_midnight_divides_what_is_held_between_the_days() -> None:
    first, second = advance(Day("2026-11-26", MIDNIGHT_S - 60, SEA), MIDNIGHT_S + 30)
    assert (first.name, first.until_s, total_of([first])) == ("2026-11-26", MIDNIGHT_S, (Used("sea", "training", 180.0),))
    assert (second.name, second.until_s, total_of([second])) == ("2026-11-27", MIDNIGHT_S + 30, (Used("sea", "training", 90.0),))
    assert second.held == SEA


def test_a_gap_in_which_there_was_no_cluster_is_not_counted() -> None:
    [day] = advance(Day("2026-11-26", NOON_S, SEA), NOON_S + MAX_GAP_S + 1)
    assert (day.used, day.until_s) == ((), NOON_S + MAX_GAP_S + 1)
    old, new = advance(Day("2026-11-26", NOON_S, SEA), MIDNIGHT_S + 5)
    assert (old.used, old.until_s) == ((), NOON_S)
    assert (new.name, new.used, new.until_s) == ("2026-11-27", (), MIDNIGHT_S + 5)


@given(st.lists(st.integers(0, int(MAX_GAP_S)), max_size=60), st.integers(-7200, 0))
def test_however_time_is_cut_the_sum_is_the_same(cuts: list[int], before_midnight_s: int) -> None:
    start_s = MIDNIGHT_S + before_midnight_s
    days, now_s = [Day(usage_log._name_of(start_s), start_s, SEA)], start_s
    for cut in cuts:
        now_s += cut
        days = [*days[:-1], *advance(days[-1], now_s)]
    assert sum(used.gpu_s for used in total_of(days)) == 3 * sum(cuts)
    assert all(day.until_s == usage_log._ends_s(day.name) for day in days[:-1])


# --- In the store ----------------------------------------------------------------------------------------------------


def test_a_day_is_one_object_however_often_it_is_written(store: ObjectStore) -> None:
    keep(UsageLog(store), SEA, 0, 600)
    [day] = read_usage(store)
    assert (day.name, total_of([day])) == ("2026-11-26", (Used("sea", "training", 1800.0),))
    assert [info.key for info in store.list("pool/usage/")] == [f"pool/usage/2026-11-26/{day.number}.json"]
    assert day.number == 11, "once a minute"


def test_one_that_is_killed_and_starts_again_counts_every_second_once(store: ObjectStore) -> None:
    keep(UsageLog(store), SEA, 0, 90)  # what it has counted since its last entry, at 60, dies with it
    keep(UsageLog(store), SEA, 97, 157)
    assert gpu_s(store) == 3 * 157
    keep(UsageLog(store), (), 160, 220)
    assert gpu_s(store) == 3 * 160, "what was held at the beginning of a gap was held to its end"


def test_two_that_count_at_once_count_nothing_twice(store: ObjectStore) -> None:
    one, other = UsageLog(store), UsageLog(store)
    for second in range(0, 1201):
        one.step(SEA, NOON_S + second)
        if second >= 100:
            other.step(SEA, NOON_S + second + 0.5)
    [day] = read_usage(store)
    assert gpu_s(store) == 3 * (day.until_s - NOON_S)
    assert NOON_S + 1100 < day.until_s <= NOON_S + 1201


def test_one_that_was_stopped_and_wakes_takes_nothing_from_what_another_counted(store: ObjectStore) -> None:
    stopped = UsageLog(store)
    keep(stopped, SEA, 0, 60)
    keep(UsageLog(store), SEA, 61, 1000)
    keep(stopped, SEA, 1001, 1062)
    [day] = read_usage(store)
    assert (day.until_s, gpu_s(store)) == (NOON_S + 1062, 3 * 1062)


def test_a_night_is_written_to_the_end_of_its_day(store: ObjectStore) -> None:
    log = UsageLog(store)
    for second in range(-90, 91):
        log.step(SEA, MIDNIGHT_S + second)
    first, second_day = read_usage(store)
    assert (first.name, first.until_s, first.used[0].gpu_s) == ("2026-11-26", MIDNIGHT_S, 270.0)
    assert (second_day.name, second_day.used[0].gpu_s) == ("2026-11-27", 180.0)
    assert read_usage(store, date(2026, 11, 27)) == [second_day]
    assert len(list(store.list("pool/usage/"))) == 2


def test_what_could_not_be_written_is_written_later(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    log = UsageLog(store)
    keep(log, SEA, 0, 60)

    def away(*_: Any, **__: Any) -> None:
        raise StoreUnreachableError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(usage_log, "append", away)
        for second in range(61, 1000, 7):
            log.step(SEA, NOON_S + second)
    assert gpu_s(store) == 180.0
    log.step(SEA, NOON_S + 1000)
    assert gpu_s(store) == 3000.0


def test_projects_and_days_are_told_apart(store: ObjectStore) -> None:
    keep(UsageLog(store), BOTH, 0, 60)
    assert total_of(read_usage(store), "lake") == (Used("lake", "serving", 60.0, 0.0),)
    assert total_of(read_usage(store), "pond") == ()


def test_an_entry_that_cannot_be_understood_is_told_by_its_key(store: ObjectStore) -> None:
    append(store, "pool/usage/2026-11-26/", {"until_s": 1.0, "held": [], "used": [{"gpus": 3}]})
    with pytest.raises(StoreError, match=r"pool/usage/2026-11-26/1.json cannot be understood"):
        read_usage(store)
