"""Drivers that died: when another one is submitted, how often, and when it is not."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool import run_queue
from tidepool.errors import ClusterError, StoreUnreachableError
from tidepool.pool import resubmitter
from tidepool.pool.resubmission import CallOff, GiveUp, JobState, Patience, Resubmit, Wait, decide
from tidepool.pool.resubmitter import Resubmitter
from tidepool.run_queue import QueuedRun, note_done, note_wanted, read_queued
from tidepool.specs import RunSpec, parse_spec
from tidepool.storage import ObjectStore, append, open_store, put_json

PATIENCE = Patience()
RUN = QueuedRun("tides", "default", {}, 1, 0.0, "job-1", begun_s=0.0)
_NOBODY = frozenset[str]()


# --- The rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "expected"), [("active", Wait), ("stopped", CallOff), ("ended", CallOff), ("failed", Resubmit), ("unknown", Resubmit)]
)
def test_what_ray_says_of_the_job_decides(job: JobState, expected: type) -> None:
    assert isinstance(decide(RUN, job, 1000.0, 1_000_000.0, PATIENCE), expected)


def test_the_pause_doubles_up_to_its_longest_and_begins_anew_after_a_long_life() -> None:
    for lives_s, pause_s in [
        ((), 5.0),
        ((1.0,), 10.0),
        ((1.0, 1.0), 20.0),
        ((1.0,) * 5, 160.0),
        ((1.0, 1.0, 700.0), 5.0),
        ((1.0, 700.0, 1.0), 10.0),
    ]:
        run = replace(RUN, lives_s=lives_s)
        waits = decide(run, "failed", 10.0, 10.0 + pause_s - 0.1, PATIENCE)
        assert isinstance(waits, Wait)
        assert waits.until_s == 10.0 + pause_s
        assert isinstance(decide(run, "failed", 10.0, 10.0 + pause_s, PATIENCE), Resubmit)
    patient = replace(PATIENCE, max_short_lives=100)
    waits = decide(replace(RUN, lives_s=(1.0,) * 50), "failed", 10.0, 11.0, patient)
    assert isinstance(waits, Wait)
    assert waits.until_s == 310.0


def test_it_is_given_up_with_its_reason_when_too_many_die_young_in_a_row() -> None:
    given_up = decide(replace(RUN, lives_s=(1.0,) * 6), "failed", 10.0, 1e6, PATIENCE)
    assert given_up == GiveUp(
        "its driver died 7 times in a row, each time within 600 s (`ray job logs job-1` shows the last); "
        "`tidepool runs resume tides` tries again"
    )
    assert isinstance(decide(replace(RUN, lives_s=(1.0,) * 6), "failed", 600.0, 1e6, PATIENCE), Resubmit), "the last one lived long"


def test_one_that_was_submitted_and_never_began_died_young() -> None:
    assert isinstance(decide(replace(RUN, begun_s=None, lives_s=(1.0,) * 6), "unknown", 1e9, 1e9, PATIENCE), GiveUp)


@given(st.lists(st.floats(0, 2000), max_size=30), st.floats(0, 2000), st.floats(0, 1000))
def test_nobody_waits_longer_than_the_longest_pause_or_is_submitted_without_one(
    lives_s: list[float], life_s: float, since_s: float
) -> None:
    run = replace(RUN, lives_s=tuple(lives_s))
    match decide(run, "failed", life_s, life_s + since_s, PATIENCE):
        case Wait(_, until_s):
            assert until_s is not None
            assert life_s + since_s < until_s <= life_s + PATIENCE.longest_s
        case Resubmit():
            assert since_s >= PATIENCE.first_s - 1e-6
        case GiveUp():
            assert all(one < PATIENCE.lived_s for one in lives_s[-PATIENCE.max_short_lives :])


# --- With a store ----------------------------------------------------------------------------------------------------


class MemoryJobs:
    """A job service in memory. A job that is submitted is active."""

    def __init__(self) -> None:
        self.states: dict[str, JobState] = {}
        self.specs: dict[str, Mapping[str, Any]] = {}
        self.is_away = False

    def state(self, job: str) -> JobState:
        self._answer()
        return self.states.get(job, "unknown")

    def submit(self, job: str, spec: Mapping[str, Any]) -> None:
        self._answer()
        self.states[job], self.specs[job] = "active", spec

    def _answer(self) -> None:
        if self.is_away:
            raise ClusterError("the job service is away")


class World:
    """A store, a job service and a clock; drivers begin and die by word."""

    def __init__(self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.jobs, self.now_s, self._monkeypatch = store, MemoryJobs(), 1_000_000.0, monkeypatch
        self.living = _NOBODY
        monkeypatch.setattr(run_queue.time, "time", lambda: self.now_s)

    def begin(self, run: str, incarnation: int, job: str) -> None:
        """A driver, the entrypoint of a job, claims a run."""
        self._monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": job}}))
        note_wanted(self.store, spec(self.store, run), incarnation)
        self.jobs.states[job] = "active"
        self.living |= {run}

    def die(self, run: str, state: JobState = "failed") -> None:
        queued = read_queued(self.store, run)
        assert queued is not None
        assert queued.job is not None
        self.jobs.states[queued.job] = state
        self.living -= {run}

    def step(self, one: Resubmitter, seconds: float = 0.0) -> list[str]:
        """Steps of a second each, one at least; returns the jobs that were submitted."""
        before = self.jobs.specs.keys() | set()
        one.step(self.living, self.now_s)
        for _ in range(int(seconds)):
            self.now_s += 1.0
            one.step(self.living, self.now_s)
        return [job for job in self.jobs.specs if job not in before]


def spec(store: ObjectStore, run: str) -> RunSpec:
    values = {"run": run, "store": store.url, "dataset": "d", "model": {"base": "b"}, "training": {"steps": 4}, "pool": {"project": "sea"}}
    return parse_spec(values, RunSpec)


@pytest.fixture
def world(store_url: str, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.delenv("TIDEPOOL_POOL", raising=False)
    return World(open_store(store_url), monkeypatch)


def test_a_run_whose_driver_died_is_submitted_by_its_spec_and_then_left_alone(world: World) -> None:
    one = Resubmitter(world.store, world.jobs)
    world.begin("tides", 1, "job-1")
    assert world.step(one, 100) == []
    world.die("tides")
    assert world.step(one, 4) == [], "not at once"
    [told] = one.state()
    assert (told["run"], told["project"], told["deaths"], told["is_given_up"]) == ("tides", "sea", 1, False)
    assert told["next_s"] == world.now_s + 1
    assert told["reason"].startswith("its driver died (`ray job logs job-1` shows the last)")
    [job] = world.step(one, 1)
    assert parse_spec(dict(world.jobs.specs[job]), RunSpec) == spec(world.store, "tides")
    assert world.step(one, 500) == [], "it is starting"
    assert [told["reason"] for told in one.state()] == [f"job {job} is starting or ending"]
    world.begin("tides", 2, job)
    assert world.step(one, 500) == []
    assert one.state() == []


@pytest.mark.parametrize("state", ["stopped", "ended"])
def test_a_run_that_a_person_stopped_is_done(world: World, state: JobState) -> None:
    one = Resubmitter(world.store, world.jobs)
    world.begin("tides", 1, "job-1")
    world.step(one)
    world.die("tides", state)
    assert world.step(one, 500) == []
    queued = read_queued(world.store, "tides")
    assert queued is not None
    assert queued.state == "done"
    assert one.state() == []


def test_a_run_that_finished_and_died_before_it_said_so_is_done(world: World) -> None:
    world.begin("tides", 1, "job-1")
    put_json(world.store, "runs/tides/result.json", {"steps": 4})
    world.die("tides", "unknown")
    assert world.step(Resubmitter(world.store, world.jobs), 500) == []
    queued = read_queued(world.store, "tides")
    assert queued is not None
    assert (queued.state, queued.reason) == ("done", "finished")


def test_a_run_that_says_that_it_is_done_is_left_alone_also_if_its_job_failed(world: World) -> None:
    one = Resubmitter(world.store, world.jobs)
    world.begin("tides", 1, "job-1")
    world.step(one)
    note_done(world.store, "tides", 1, "failed", "Lower the learning rate")
    world.die("tides")
    assert world.step(one, 500) == []


def test_one_that_came_and_went_between_two_readings_of_the_list_is_found(world: World) -> None:
    one = Resubmitter(world.store, world.jobs)
    world.step(one)
    world.begin("tides", 1, "job-1")
    world.now_s += 1
    one.step(world.living, world.now_s)
    world.die("tides")
    assert len(world.step(one, 7)) == 1, "sooner than the list is read again"


def test_a_driver_that_dies_again_and_again_is_given_up_and_another_arbiter_does_not_begin_anew(world: World) -> None:
    world.begin("tides", 1, "job-1")
    submitted, incarnation = 0, 1
    for _ in range(50):
        world.die("tides")
        jobs = world.step(Resubmitter(world.store, world.jobs), 330)  # each time another one, which knows only the store
        if not jobs:
            break
        submitted, incarnation = submitted + len(jobs), incarnation + 1
        world.begin("tides", incarnation, jobs[0])
    assert submitted == PATIENCE.max_short_lives
    one = Resubmitter(world.store, world.jobs)
    assert world.step(one, 1000) == []
    [told] = one.state()
    assert told["is_given_up"]
    assert told["deaths"] == PATIENCE.max_short_lives + 1
    assert "died 7 times in a row" in told["reason"]
    world.begin("tides", 99, "job-of-a-person")
    world.step(one, 61)
    assert one.state() == []
    world.die("tides")
    assert len(world.step(one, 6)) == 1, "a person's submission begins anew"


def test_of_two_resubmitters_one_submits(world: World) -> None:
    one, other = Resubmitter(world.store, world.jobs), Resubmitter(world.store, world.jobs)
    world.begin("tides", 1, "job-1")
    world.die("tides")
    for _ in range(20):
        world.now_s += 1.0
        one.step(world.living, world.now_s)
        other.step(world.living, world.now_s)
    assert len(world.jobs.specs) == 1


def test_the_loser_of_a_race_for_the_entry_submits_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Resubmitter(world.store, world.jobs), Resubmitter(world.store, world.jobs)
    world.begin("tides", 1, "job-1")
    world.die("tides")
    world.step(one)
    world.step(other, 4)
    note = resubmitter.note_resubmitted

    def while_the_other_does_it(*arguments: Any) -> Any:
        monkeypatch.setattr(resubmitter, "note_resubmitted", note)
        other.step(world.living, world.now_s)
        return note(*arguments)

    world.now_s += 1.0
    monkeypatch.setattr(resubmitter, "note_resubmitted", while_the_other_does_it)
    one.step(world.living, world.now_s)
    assert len(world.jobs.specs) == 1


def test_runs_of_another_pool_and_drivers_that_are_no_jobs_are_nobody_s_business(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_POOL", "east")
    world.begin("east", 1, "job-1")
    monkeypatch.delenv("TIDEPOOL_POOL")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    note_wanted(world.store, spec(world.store, "by-hand"), 1)
    world.living = _NOBODY
    world.jobs.states.clear()
    assert world.step(Resubmitter(world.store, world.jobs), 500) == []


def test_after_the_loss_of_the_head_all_that_were_wanted_go_on(world: World) -> None:
    for run in ("a", "b", "c"):
        world.begin(run, 1, f"job-{run}")
    note_done(world.store, "c", 1, "finished")
    world.living, world.jobs = _NOBODY, MemoryJobs()
    world.now_s += 10_000
    jobs = world.step(Resubmitter(world.store, world.jobs), 10)
    assert sorted(job.rpartition("-")[0] for job in jobs) == ["a", "b"]


def test_nothing_is_decided_while_the_job_service_or_the_store_is_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Resubmitter(world.store, world.jobs)
    world.begin("tides", 1, "job-1")
    world.step(one)
    world.die("tides")
    world.jobs.is_away = True
    assert world.step(one, 500) == []
    world.jobs.is_away = False

    def away(*_: Any) -> None:
        raise StoreUnreachableError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(resubmitter, "read_queued", away)
        assert world.step(one, 500) == []
    assert len(world.step(one, 10)) == 1


def test_a_damaged_entry_holds_up_nobody_else(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.begin("broken", 1, "job-0")
    append(world.store, "queue/broken/", {"event": "sublimated"})
    world.begin("tides", 1, "job-1")
    world.living = _NOBODY
    world.jobs.states.clear()
    [job] = world.step(Resubmitter(world.store, world.jobs), 10)
    assert job.startswith("tides-")
    [said] = [record.message for record in caplog.records if "broken" in record.message]
    assert said.startswith("Run broken is not submitted again: queue/broken/2.json cannot be understood")


def test_a_submission_that_fails_counts_and_is_tried_again_after_a_longer_pause(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Resubmitter(world.store, world.jobs)
    world.begin("tides", 1, "job-1")
    world.die("tides")

    def refuse(*_: Any) -> None:
        raise ClusterError("the job service refuses")

    with monkeypatch.context() as patched:
        patched.setattr(world.jobs, "submit", refuse)
        world.step(one, 5)
    queued = read_queued(world.store, "tides")
    assert queued is not None
    assert len(queued.lives_s) == 1
    assert world.step(one, 9) == []
    assert len(world.step(one, 3)) == 1
