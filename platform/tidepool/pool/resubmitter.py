"""Goes on with the runs of one store whose drivers died: reads the list (`run_queue`), decides (`resubmission`), submits. Knows no Ray.

Invariants:
- What is done is written in the store before it is done, at the place after what was read: of two resubmitters one does it.
- Nothing is remembered that the store does not have, but since when a run is missing: a new one waits that pause again, no more.
- Only Ray jobs are followed: who starts a driver by hand starts it again by hand.
- A store or a job service that does not answer costs time, never a decision: nothing is decided without both.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tidepool.errors import ClusterError, StoreError, StoreUnreachableError
from tidepool.job_folder import new_job_id
from tidepool.pool.resubmission import CallOff, GiveUp, JobState, Patience, Resubmit, Wait, decide, num_short_lives
from tidepool.run_queue import (
    QueuedRun,
    call_off,
    has_result,
    note_given_up,
    note_resubmitted,
    pool_name,
    read_queued,
    sweep,
)
from tidepool.storage import ObjectStore

_logger = logging.getLogger(__name__)
_LIST_EVERY_S = 60.0


class Jobs(Protocol):
    """The cluster's job service. Both raise `ClusterError` where it does not answer."""

    def state(self, job: str) -> JobState:
        """How a job is."""
        ...

    def submit(self, job: str, spec: Mapping[str, Any]) -> None:
        """Submit a job, by that id, that trains by a spec (JSON)."""
        ...


@dataclass
class _Missing:
    """A run without a driver, since when, and what is thought of it."""

    run: QueuedRun
    since_s: float
    thought: Wait


class Resubmitter:
    """See the module's docstring. `step` is called again and again, by one thread at a time; it may take as long as the store does."""

    def __init__(self, store: ObjectStore, jobs: Jobs, patience: Patience | None = None) -> None:
        self._store, self._jobs, self._patience = store, jobs, patience or Patience()
        self._pool = pool_name()
        self._listed_s: float | None = None
        self._lived: frozenset[str] = frozenset()
        self._known: dict[str, QueuedRun] = {}
        """The runs of this pool that are not done, as last read."""
        self._missing: dict[str, _Missing] = {}
        self._problems: set[str] = set()
        """What has been said of what goes wrong since the list was read: once, not every second."""

    def step(self, living_runs: frozenset[str], now_s: float) -> None:
        """Do what is to be done now; `living_runs` have a driver in the cluster."""
        try:
            self._list(living_runs, now_s)
            for run in list(self._known.values()):
                if run.run in living_runs or run.state != "wanted":
                    self._missing.pop(run.run, None)
                else:
                    self._look_after(run.run, now_s)
        except (StoreError, ClusterError) as error:
            self._say(f"Runs whose drivers died are not submitted for now: {error}")

    def state(self) -> list[dict[str, Any]]:
        """The runs that wait for another driver, and those that were given up, as JSON."""
        waiting = [
            _told(one.run, num_short_lives(one.run, one.since_s, self._patience), one.thought.reason, one.thought.until_s)
            for one in list(self._missing.values())
        ]
        given_up = [_told(run, len(run.lives_s) + 1, run.reason) for run in list(self._known.values()) if run.state == "given up"]
        return sorted(waiting + given_up, key=lambda one: str(one["run"]))

    def _list(self, living_runs: frozenset[str], now_s: float) -> None:
        """Read the whole list from time to time, and at once those that came and went since."""
        if self._listed_s is None or now_s - self._listed_s >= _LIST_EVERY_S:
            self._problems.clear()
            newest = sweep(self._store)
            for name, number in newest.items():
                known = self._known.get(name)
                if known is None or known.number != number:
                    self._read(name)
            for name in self._known.keys() - newest.keys():
                self._forget(name)
            self._listed_s = now_s
        for name in self._lived - living_runs - self._known.keys():
            self._read(name)
        self._lived = living_runs

    def _look_after(self, name: str, now_s: float) -> None:
        before = self._missing.get(name)
        if before is not None and before.thought.until_s is not None and now_s < before.thought.until_s:
            return
        run = self._read(name)
        if run is None or run.state != "wanted":
            return
        assert run.job is not None
        job: JobState = "ended" if has_result(self._store, name) else self._jobs.state(run.job)
        is_same = before is not None and (before.run.job, before.run.begun_s) == (run.job, run.begun_s)
        since_s = before.since_s if before is not None and is_same and job != "active" else now_s
        match decide(run, job, since_s, now_s, self._patience):
            case Wait() as thought:
                self._missing[name] = _Missing(run, since_s, thought)
            case Resubmit(reason):
                self._resubmit(run, reason, since_s, now_s)
            case GiveUp(reason):
                if (given_up := note_given_up(self._store, run, reason)) is not None:
                    _logger.error("Run %s is given up: %s", name, reason)
                    self._known[name] = given_up
                    self._missing.pop(name, None)
            case CallOff(how):
                call_off(self._store, name, how)
                self._forget(name)

    def _resubmit(self, run: QueuedRun, reason: str, ended_s: float, now_s: float) -> None:
        job = new_job_id(run.run)
        noted = note_resubmitted(self._store, run, job, ended_s)
        if noted is None:
            return  # somebody else said something: it is read in the next step
        self._known[run.run] = noted
        self._missing[run.run] = _Missing(noted, now_s, Wait(f"job {job} is starting"))
        self._jobs.submit(job, {**run.spec, "store": self._store.url})
        _logger.warning("Run %s goes on as job %s: %s", run.run, job, reason)

    def _read(self, name: str) -> QueuedRun | None:
        """A run as the store has it now, if it is a job of this pool's and not done."""
        try:
            run = read_queued(self._store, name)
        except StoreUnreachableError:
            raise
        except StoreError as error:  # one that is damaged must not hold up the others
            self._say(f"Run {name} is not submitted again: {error}")
            run = None
        if run is None or run.pool != self._pool or run.state == "done" or run.job is None:
            self._forget(name)
            return None
        self._known[name] = run
        if run.state != "wanted":
            self._missing.pop(name, None)
        return run

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._missing.pop(name, None)

    def _say(self, problem: str) -> None:
        if problem not in self._problems:
            _logger.warning("%s", problem)
        self._problems.add(problem)


def _told(run: QueuedRun, deaths: int, reason: str, next_s: float | None = None) -> dict[str, Any]:
    return {
        "run": run.run,
        "project": run.spec.get("pool", {}).get("project", "default"),
        "deaths": deaths,
        "is_given_up": run.state == "given up",
        "next_s": next_s,
        "job": run.job,
        "reason": reason,
    }
