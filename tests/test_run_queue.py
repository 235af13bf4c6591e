"""The list of runs that are wanted, on a real store: who is on it, since when, and who is not any more."""

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tidepool import run_queue
from tidepool.errors import ClusterError, RunError, SpecChangedError, StoreError, StoreUnreachableError, SupersededError
from tidepool.run_queue import (
    QueuedRun,
    call_off,
    is_final,
    note_done,
    note_given_up,
    note_priority,
    note_resubmitted,
    note_wanted,
    read_priority,
    read_queued,
    sweep,
)
from tidepool.specs import RunSpec, parse_spec
from tidepool.storage import ObjectStore, append, open_store


def spec(store: ObjectStore, run: str = "tides", **changes: Any) -> RunSpec:
    values = {"run": run, "store": store.url, "dataset": "d", "model": {"base": "b"}, "training": {"steps": 4}}
    return parse_spec(values | changes, RunSpec)


@pytest.fixture
def store(store_url: str) -> ObjectStore:
    return open_store(store_url)


@pytest.fixture(autouse=True)
def _job(monkeypatch: pytest.MonkeyPatch) -> None:
    be_job(monkeypatch, "job-1")


def be_job(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    """Let this process be the entrypoint of a Ray job, as Ray tells it."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": job}}))


def wanted(store: ObjectStore, run: str = "tides") -> QueuedRun:
    found = read_queued(store, run)
    assert found is not None
    return found


def test_a_run_is_wanted_from_its_driver_s_claim_until_it_is_done(store: ObjectStore) -> None:
    assert read_queued(store, "tides") is None
    begun_s = time.time()
    said = note_wanted(store, spec(store), 1)
    found = wanted(store)
    assert said == found
    assert (found.state, found.job, found.incarnation, found.lives_s) == ("wanted", "job-1", 1, ())
    assert begun_s <= found.submitted_s == found.begun_s <= time.time()
    assert parse_spec(dict(found.spec), RunSpec) == spec(store)
    note_done(store, "tides", 1, "finished")
    assert (wanted(store).state, wanted(store).reason) == ("done", "finished")


def test_it_keeps_its_time_while_it_is_wanted_and_gets_another_when_it_is_submitted_after_its_end(store: ObjectStore) -> None:
    first = note_wanted(store, spec(store), 1)
    assert note_resubmitted(store, first, "job-2", time.time()) is not None
    again = note_wanted(store, spec(store), 2)
    assert again.submitted_s == first.submitted_s
    note_done(store, "tides", 2, "paused")
    assert note_wanted(store, spec(store), 3).submitted_s > first.submitted_s


def test_the_word_of_an_earlier_driver_does_not_count(store: ObjectStore) -> None:
    note_wanted(store, spec(store), 1)
    note_wanted(store, spec(store), 2)
    note_done(store, "tides", 1, "stopped")
    assert wanted(store).state == "wanted"
    note_done(store, "tides", 2, "stopped")
    assert wanted(store).state == "done"


def test_how_long_drivers_lived_is_counted_anew_when_a_person_submits_the_run(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.time()
    monkeypatch.setattr(run_queue.time, "time", lambda: now_s)
    first = note_wanted(store, spec(store), 1)
    now_s += 160
    second = note_resubmitted(store, first, "job-2", now_s - 60)
    assert second is not None
    assert (second.job, second.begun_s, second.lives_s) == ("job-2", None, (100.0,))
    now_s += 5
    third = note_resubmitted(store, second, "job-3", now_s)
    assert third is not None
    assert third.lives_s == (100.0, 0.0), "the second never began"
    be_job(monkeypatch, "job-3")
    note_wanted(store, spec(store), 2)
    assert wanted(store).lives_s == (100.0, 0.0)
    be_job(monkeypatch, "job-of-a-person")
    note_wanted(store, spec(store), 3)
    assert wanted(store).lives_s == ()


def test_nobody_is_submitted_for_a_run_of_which_something_was_said_meanwhile(store: ObjectStore) -> None:
    read = note_wanted(store, spec(store), 1)
    note_done(store, "tides", 1, "stopped")
    assert note_resubmitted(store, read, "job-2", time.time()) is None
    assert note_given_up(store, read, "why") is None
    assert wanted(store).state == "done"


def test_what_was_given_up_is_told_why_and_keeps_its_time_when_it_is_submitted_again(store: ObjectStore) -> None:
    first = note_wanted(store, spec(store), 1)
    note_given_up(store, first, "its driver died 7 times")
    assert (wanted(store).state, wanted(store).reason) == ("given up", "its driver died 7 times")
    assert note_wanted(store, spec(store), 2).submitted_s == first.submitted_s


def test_a_run_is_called_off_once(store: ObjectStore) -> None:
    assert not call_off(store, "tides", "stopped")
    note_wanted(store, spec(store), 4)
    assert call_off(store, "tides", "stopped")
    assert not call_off(store, "tides", "stopped")


def test_a_driver_that_is_no_job_has_none(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert note_wanted(store, spec(store), 1).job is None


def test_the_pool_is_the_node_s(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDEPOOL_POOL", raising=False)
    assert note_wanted(store, spec(store), 1).pool == "default"
    monkeypatch.setenv("TIDEPOOL_POOL", "east")
    assert note_wanted(store, spec(store), 2).pool == "east"


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (SpecChangedError("x"), True),
        (RunError("x"), True),
        (KeyboardInterrupt(), True),
        (SupersededError("x"), False),
        (StoreUnreachableError("x"), False),
        (ClusterError("x"), False),
        (MemoryError(), False),
    ],
)
def test_which_errors_end_a_run(error: BaseException, is_it: bool) -> None:
    assert is_final(error) is is_it


def test_the_newest_priority_of_a_person_counts(store: ObjectStore) -> None:
    assert read_priority(store, "tides") is None
    note_priority(store, "tides", 5)
    note_priority(store, "tides", -2)
    assert read_priority(store, "tides") == -2


def test_what_is_done_leaves_the_list_after_a_day(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in ("going", "over"):
        note_wanted(store, spec(store, run), 1)
    note_done(store, "over", 1, "finished")
    assert sweep(store) == {"going": 1, "over": 2}

    class Tomorrow(datetime):
        @classmethod
        def now(cls, _zone: Any = None) -> datetime:
            return datetime.now(UTC) + timedelta(days=1, minutes=1)

    monkeypatch.setattr(run_queue, "datetime", Tomorrow)
    assert sweep(store) == {"going": 1}
    assert [info.key for info in store.list("queue/")] == ["queue/going/1.json"]


def test_an_entry_that_cannot_be_understood_is_told_by_its_key(store: ObjectStore) -> None:
    note_wanted(store, spec(store), 1)
    append(store, "queue/tides/", {"event": "sublimated"})
    with pytest.raises(StoreError, match=r"queue/tides/2.json cannot be understood .*'sublimated'.* restore it from a backup"):
        read_queued(store, "tides")
