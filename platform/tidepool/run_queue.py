"""Which runs are wanted, in the store: whoever finds a driver dead, or brings a lost cluster back, goes on with them.

    queue/<run>/<n>.json               a log: a driver began, one was submitted in its place, that was given up, the run is done
    runs/<run>/priorities/<n>.json     a log of priorities that people gave the run; the newest counts, before its spec's

Invariants:
- A run is wanted from when a driver has claimed it until it is done: finished, paused or stopped by a person, or failed with an
  error that would come again. A driver that dies says nothing, and that is how its death is known.
- Only the newest driver can say that a run is done: a word of an earlier incarnation does not count.
- Its submission keeps its time until it is done, whoever submits it again: that time is its place in the queue.
- It is wanted in one pool (`TIDEPOOL_POOL`, on all nodes of a cluster): clusters that share a store start no run of one another.
- What is done stays in the list for a day, so that nobody who read it before misses it. Then it is removed, oldest entry first.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from tidepool.errors import (
    ClusterError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
    StoreUnreachableError,
    SupersededError,
    TidepoolError,
)
from tidepool.specs import RunSpec
from tidepool.storage import LogEntry, ObjectStore, append, read_entry, read_last, read_log

POOL_VARIABLE = "TIDEPOOL_POOL"
"""Names the cluster among those that share a store; the same on all of its nodes, and the same when it comes back."""
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells a job's entrypoint what job it is."""
_FOLDER = "queue/"
_KEPT = timedelta(days=1)
_PASSING = (StoreUnreachableError, ClusterError, SupersededError)
"""Errors that another driver need not meet, or (the last) that only say that there is another one."""

Ending = Literal["finished", "paused", "stopped", "failed"]


@dataclass(frozen=True)
class QueuedRun:
    """A run as the list has it; times in seconds since 1970."""

    run: str
    pool: str
    spec: Mapping[str, Any]
    """As it was resolved, JSON."""
    incarnation: int
    submitted_s: float
    job: str | None
    """The Ray job of its newest driver, if it has one."""
    begun_s: float | None
    """When that driver began; None while one that was submitted in another's place has not."""
    lives_s: tuple[float, ...] = ()
    """How long the drivers lived in whose place others were submitted, since a person last submitted the run; 0 of one that never began."""
    state: Literal["wanted", "given up", "done"] = "wanted"
    reason: str = ""
    """Why it is no longer wanted."""
    number: int = 0
    """That of its newest entry."""


# --- By the driver ---------------------------------------------------------------------------------------------------


def note_wanted(store: ObjectStore, spec: RunSpec, incarnation: int) -> QueuedRun:
    """A driver has claimed a run, and trains it from now on. Raises `StoreError`."""
    before, now_s = read_queued(store, spec.run), time.time()
    submitted_s = before.submitted_s if before is not None and before.state != "done" else now_s
    value = {
        "event": "wanted",
        "pool": pool_name(),
        "spec": spec.model_dump(mode="json"),
        "incarnation": incarnation,
        "submitted_s": submitted_s,
        "begun_s": now_s,
        "job": submission_id(),
    }
    entry = append(store, _prefix(spec.run), value)
    return _fold_one(before, entry, spec.run)


def note_done(store: ObjectStore, run: str, incarnation: int, how: Ending, reason: str = "") -> None:
    """Nobody is to go on with a run; said by a driver of that incarnation. Raises `StoreError`."""
    append(store, _prefix(run), {"event": "done", "incarnation": incarnation, "how": how, "reason": reason, "at_s": time.time()})


def is_final(error: BaseException) -> bool:
    """Whether an error that ends a driver ends the run: another driver would meet it again, or a person wanted it so."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, TidepoolError) and not isinstance(error, _PASSING))


def submission_id() -> str | None:
    """The Ray job that this process is the entrypoint of, None if it is none."""
    config = json.loads(os.environ.get(_JOB_VARIABLE) or "{}")
    found = config.get("metadata", {}).get("job_submission_id")
    return str(found) if found is not None else None


def pool_name() -> str:
    """The name of the pool that this process is in."""
    return os.environ.get(POOL_VARIABLE) or "default"


# --- By the arbiter --------------------------------------------------------------------------------------------------


def note_resubmitted(store: ObjectStore, run: QueuedRun, job: str, ended_s: float) -> QueuedRun | None:
    """Say that another driver is about to be submitted in the place of one that died at `ended_s`.

    None if anything was said of the run since it was read: then none may be.
    """
    return _append_after(store, run, {"event": "resubmitted", "job": job, "ended_s": ended_s, "at_s": time.time()})


def note_given_up(store: ObjectStore, run: QueuedRun, reason: str) -> QueuedRun | None:
    """Say that no other driver is submitted; None as above."""
    return _append_after(store, run, {"event": "given up", "reason": reason, "at_s": time.time()})


def sweep(store: ObjectStore) -> dict[str, int]:
    """The newest number of each run in the list; removes those that have been done for a day."""
    numbers: dict[str, dict[int, datetime]] = {}
    for info in store.list(_FOLDER):
        run, _, name = info.key.removeprefix(_FOLDER).partition("/")
        if name.removesuffix(".json").isdigit():
            numbers.setdefault(run, {})[int(name.removesuffix(".json"))] = info.modified_at
    for run, at in list(numbers.items()):
        last = max(at)
        if datetime.now(UTC) - at[last] > _KEPT and _is_end(store, run, last):
            for number in sorted(at):
                store.delete(f"{_prefix(run)}{number}.json")
            del numbers[run]
    return {run: max(at) for run, at in numbers.items()}


def _is_end(store: ObjectStore, run: str, number: int) -> bool:
    try:
        return read_entry(store, _prefix(run), number).value.get("event") == "done"
    except StoreUnreachableError:
        raise
    except StoreError:  # whoever reads the run is told that it is damaged
        return False


# --- By people -------------------------------------------------------------------------------------------------------


def call_off(store: ObjectStore, run: str, how: Ending) -> bool:
    """Take a run off the list that no driver trains; returns whether it was on it. Raises `StoreError`."""
    queued = read_queued(store, run)
    if queued is None or queued.state == "done":
        return False
    note_done(store, run, queued.incarnation, how)
    return True


def has_result(store: ObjectStore, run: str) -> bool:
    """Whether a run is finished, also if its driver died before it said so here."""
    try:
        store.size(f"runs/{run}/result.json")
    except ObjectNotFoundError:
        return False
    return True


def note_priority(store: ObjectStore, run: str, priority: int) -> None:
    """A person gives a run a priority. Raises `StoreError`."""
    append(store, _priorities(run), {"priority": priority, "at": datetime.now(UTC).isoformat("T", "seconds")})


def read_priority(store: ObjectStore, run: str) -> int | None:
    """The priority that a person gave a run last, None if nobody did: then its spec's counts."""
    last = read_last(store, _priorities(run))
    return int(last.value["priority"]) if last is not None else None


# --- The log ---------------------------------------------------------------------------------------------------------


def read_queued(store: ObjectStore, run: str) -> QueuedRun | None:
    """A run as the list has it, done or not; None if it is not there. Raises `StoreError`."""
    return fold(read_log(store, _prefix(run)), run)


def fold(entries: Iterable[LogEntry], run: str) -> QueuedRun | None:
    """What a run's entries come to. Raises `StoreError` for one that cannot be understood."""
    queued: QueuedRun | None = None
    for entry in entries:
        queued = _fold_one(queued, entry, run) if queued is not None or entry.value.get("event") == "wanted" else None
    return queued


def _fold_one(queued: QueuedRun | None, entry: LogEntry, run: str) -> QueuedRun:
    value = entry.value
    try:
        if value["event"] == "wanted":
            return _begun(queued, entry, run)
        assert queued is not None
        after = replace(queued, number=entry.number)
        match value["event"]:
            case "resubmitted":
                life_s = value["ended_s"] - queued.begun_s if queued.begun_s is not None else 0.0
                return replace(after, job=value["job"], begun_s=None, lives_s=(*queued.lives_s, life_s))
            case "given up":
                return replace(after, state="given up", reason=value["reason"])
            case "done":
                is_newest = value["incarnation"] >= queued.incarnation
                return replace(after, state="done", reason=value["reason"] or value["how"]) if is_newest else after
            case other:
                raise ValueError(f"an event {other!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{_prefix(run)}{entry.number}.json cannot be understood ({type(error).__name__}: {error}): use the version of Tidepool that "
            "wrote it, or restore it from a backup of the store."
        ) from error


def _begun(queued: QueuedRun | None, entry: LogEntry, run: str) -> QueuedRun:
    """A driver began: one that was submitted in another's place, or a person's."""
    value = entry.value
    was_resubmitted = queued is not None and queued.begun_s is None and value["job"] == queued.job
    return QueuedRun(
        run=run,
        pool=value["pool"],
        spec=value["spec"],
        incarnation=value["incarnation"],
        submitted_s=value["submitted_s"],
        job=value["job"],
        begun_s=value["begun_s"],
        lives_s=queued.lives_s if queued is not None and was_resubmitted else (),
        number=entry.number,
    )


def _append_after(store: ObjectStore, run: QueuedRun, value: Mapping[str, Any]) -> QueuedRun | None:
    try:
        entry = append(store, _prefix(run.run), value, expected_number=run.number + 1)
    except ObjectExistsError:
        return None
    return _fold_one(run, entry, run.run)


def _prefix(run: str) -> str:
    return f"{_FOLDER}{run}/"


def _priorities(run: str) -> str:
    return f"runs/{run}/priorities/"
