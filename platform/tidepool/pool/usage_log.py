"""What each project's runs and deployments held, added up over time, in the store.

    pool/usage/<day>/<n>.json      the whole of that day (UTC) so far, and until when; the newest counts, the others are removed

Invariants:
- A moment is counted once: an entry goes on from the time up to which the one before it counts, whoever wrote that. A writer that
  finds a newer entry than it knew of drops what it has counted since, as the other one has.
- So one that dies and starts again counts on as if it had not: the gap is filled with what was held at its beginning, as the last
  entry says. A longer gap than `MAX_GAP_S` is not counted: there was no cluster.
- There are one or two objects a day, whatever happens.

GPU-seconds are counted; of workers and replicas without GPUs, CPU-seconds.
"""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from typing import Literal

from tidepool.errors import ObjectExistsError, ObjectNotFoundError, StoreError
from tidepool.messages import Deployment, Resources, Run
from tidepool.storage import ObjectStore, append, log_numbers, read_entry

_logger = logging.getLogger(__name__)
_PREFIX = "pool/usage/"
_DAY_S = 86_400.0
WRITE_EVERY_S = 60.0
MAX_GAP_S = 180.0

Purpose = Literal["training", "serving"]


@dataclass(frozen=True, order=True)
class Holding:
    """What a project holds for a purpose now; `cpus` are those of workers and replicas without GPUs."""

    project: str
    purpose: Purpose
    gpus: int = 0
    cpus: int = 0


@dataclass(frozen=True, order=True)
class Used:
    """What a project held for a purpose, added up over time."""

    project: str
    purpose: Purpose
    gpu_s: float = 0.0
    cpu_s: float = 0.0


Holdings = tuple[Holding, ...]


@dataclass(frozen=True)
class Day:
    """What is known of a day (`name`, as `2026-11-26`): the sums up to `until_s` (seconds since 1970), and what was held then."""

    name: str
    until_s: float
    held: Holdings = ()
    used: tuple[Used, ...] = ()
    number: int = 0
    """That of its entry, 0 if it has none."""


# --- What is held ----------------------------------------------------------------------------------------------------


def holdings(runs: Iterable[Run], deployments: Iterable[Deployment]) -> Holdings:
    """What is held now, by project and purpose. Groups count until they are gone, replicas from when they have a place."""
    total: dict[tuple[str, Purpose], Resources] = {}
    for run in runs:
        workers = sum(count for group in run.groups for _, count in group.places)
        _add(total, (run.project, "training"), run.worker, workers)
    for deployment in deployments:
        _add(total, (deployment.project, "serving"), deployment.replica, len(deployment.replicas))
    return tuple(sorted(Holding(*who, held.gpus, held.cpus) for who, held in total.items() if held.gpus or held.cpus))


def _add(total: dict[tuple[str, Purpose], Resources], who: tuple[str, Purpose], each: Resources, count: int) -> None:
    before = total.get(who, Resources(0, 0))
    cpus = 0 if each.gpus else each.cpus
    total[who] = Resources(before.gpus + count * each.gpus, before.cpus + count * cpus)


# --- Adding up, pure -------------------------------------------------------------------------------------------------


def advance(day: Day, now_s: float) -> tuple[Day, ...]:
    """The day with what was held up to `now_s` added, and the days after it, if midnight is between. A gap too long adds nothing."""
    if now_s <= day.until_s:
        return (day,)
    if now_s - day.until_s > MAX_GAP_S:
        name = _name_of(now_s)
        return (replace(day, until_s=now_s),) if name == day.name else (day, Day(name, now_s, day.held))
    days = [day]
    while (midnight_s := _ends_s(days[-1].name)) <= now_s:
        days[-1] = _add_up(days[-1], midnight_s)
        days.append(Day(_name_of(midnight_s), midnight_s, day.held))
    days[-1] = _add_up(days[-1], now_s)
    return tuple(days)


def total_of(days: Iterable[Day], project: str | None = None) -> tuple[Used, ...]:
    """The sums over days, by project and purpose; of one project, if it is given."""
    total: dict[tuple[str, Purpose], Used] = {}
    for used in (used for day in days for used in day.used if project in (None, used.project)):
        before = total.get((used.project, used.purpose), Used(used.project, used.purpose))
        total[used.project, used.purpose] = replace(before, gpu_s=before.gpu_s + used.gpu_s, cpu_s=before.cpu_s + used.cpu_s)
    return tuple(sorted(total.values()))


def _add_up(day: Day, until_s: float) -> Day:
    span_s = until_s - day.until_s
    more = tuple(Used(held.project, held.purpose, held.gpus * span_s, held.cpus * span_s) for held in day.held)
    return replace(day, until_s=until_s, used=total_of([day, replace(day, used=more)]))


def _name_of(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).date().isoformat()


def _ends_s(name: str) -> float:
    return datetime.fromisoformat(name).replace(tzinfo=UTC).timestamp() + _DAY_S


# --- The log ---------------------------------------------------------------------------------------------------------


class UsageLog:
    """Writes the log of one store. `step` is called again and again, by one thread at a time."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._days: tuple[Day, ...] = ()
        """The newest, and before it those that are not written to their end."""
        self._written_s = float("-inf")
        self._problem = ""

    def step(self, held: Holdings, now_s: float) -> None:
        """From now on this is held. What could not be written is kept and written with the next."""
        try:
            if not self._days:
                self._days = (_newest(self._store) or Day(_name_of(now_s), now_s),)
            *before, last = (*self._days[:-1], *advance(self._days[-1], now_s))
            self._days = (*before, replace(last, held=held))
            if before or now_s - self._written_s >= WRITE_EVERY_S:
                self._written_s = now_s if self._write() else float("-inf")
            self._problem = ""
        except StoreError as error:
            if str(error) != self._problem:  # once, not every second
                _logger.warning("What projects use cannot be written for now: %s", error)
            self._problem = str(error)

    def _write(self) -> bool:
        """Write what is not written; False if another one counts, too: then go on from what it has counted."""
        while True:
            day, *after = self._days
            try:
                written = _append(self._store, day)
            except ObjectExistsError:
                self._days = ()
                return False
            self._days = tuple(after) or (written,)
            if not after:
                return True


def read_usage(store: ObjectStore, since: date | None = None) -> list[Day]:
    """The days from `since` on, in order. Raises `StoreError`."""
    return [_read(store, name) for name in _names(store) if since is None or date.fromisoformat(name) >= since]


def _newest(store: ObjectStore) -> Day | None:
    names = _names(store)
    return _read(store, names[-1]) if names else None


def _names(store: ObjectStore) -> list[str]:
    return sorted({info.key.removeprefix(_PREFIX).partition("/")[0] for info in store.list(_PREFIX)})


def _read(store: ObjectStore, name: str) -> Day:
    while True:
        number = log_numbers(store, _prefix(name))[-1]
        try:
            value = read_entry(store, _prefix(name), number).value
        except ObjectNotFoundError:  # a newer one has taken its place since
            continue
        try:
            held = tuple(Holding(**one) for one in value["held"])
            return Day(name, float(value["until_s"]), held, tuple(Used(**one) for one in value["used"]), number)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{_prefix(name)}{number}.json cannot be understood ({error}): use the version of Tidepool that wrote it, or restore it "
                "from a backup of the store."
            ) from error


def _append(store: ObjectStore, day: Day) -> Day:
    """Write the day's next entry and remove those before it. Raises `ObjectExistsError` if somebody else wrote it first."""
    value = {"until_s": day.until_s, "held": [asdict(one) for one in day.held], "used": [asdict(one) for one in day.used]}
    prefix, number = _prefix(day.name), day.number + 1
    append(store, prefix, value, expected_number=number)
    numbers = log_numbers(store, prefix)
    for older in numbers:
        if older < number:
            store.delete(f"{prefix}{older}.json")
    if numbers[-1] > number:  # the number was free because somebody else had used it and was done with it
        raise ObjectExistsError(f"{prefix}{number}.json of {store.url} is not the newest: {numbers[-1]}.json is there.")
    return replace(day, number=number)


def _prefix(name: str) -> str:
    return f"{_PREFIX}{name}/"
