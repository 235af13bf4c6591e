"""A model of the commit protocol, small enough to visit every state: drivers that claim a run and commit steps.

One action of a driver is one call to the store, and a driver may die, or lose the answer to a put, at each one; all
interleavings are visited. The rules of which commits count are the real ones (`visible_commits`), so that the model checks
them and not a copy of them.

A driver's life: list the log, put a claim at the next number from the newest commit that counts; then for each step put the
data, list the log, stop if a newer claim is there, put the commit at the next number, and report it; after the last step say
in the log which older commits are removed, and remove them and their data. A put that finds its number taken reads what is
there: its own entry means that only the answer was lost, another one that it must look again. After a put the driver lists the
log once more: if a removal names its number, it came too late, and must look again.

Invariants, in every state:
- `torn`: the data of every commit that counts is there.
- `lost`: what was reported as committed counts until it is removed, and something as new as it counts (no step goes back).
- `both`: once a claim stands, no commit of an older incarnation counts after it, and no two drivers advance one incarnation.

`Rules` can weaken the protocol in the ways that its design rules out; each must break an invariant.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tidepool.checkpoint.history import Commit, Entry, Incarnation, Removal, in_order, newest_incarnation, newest_removal, visible_commits

Log = tuple[tuple[int, Entry], ...]
"""Entries by number, ascending."""
Phase = Literal["look", "claim", "claimed", "data", "check", "commit", "committed", "tidy", "remove", "removed", "delete", "ended", "dead"]


@dataclass(frozen=True)
class Rules:
    """The protocol as it is; a flag that is turned weakens it."""

    commit_checks_claims: bool = True
    commit_at_next_number: bool = True
    """Else a commit goes wherever it finds room: claims and commits are not ordered against one another."""
    data_before_commit: bool = True
    removals_are_logged: bool = True
    """Else an entry is deleted and nothing says so: its number can be taken again."""
    numbers_are_confirmed: bool = True
    """Else a driver believes its put even where a removal names the number."""
    put_is_conditional: bool = True


@dataclass(frozen=True)
class Driver:
    """One driver's own state. `seen` is the last number it has read; `left` the steps it still wants to commit."""

    phase: Phase = "look"
    incarnation: int = 0
    step: int = 0
    base: Commit | None = None
    seen: int = 0
    left: int = 2
    deaf: int = 1
    """How many answers to its puts may still be lost."""
    unsure: bool = False
    """Whether its last put had no answer: then an entry of its own at the number is known as its own."""
    doomed: tuple[tuple[int, Commit], ...] = ()
    """The commits that it removes, with their numbers."""


@dataclass(frozen=True)
class State:
    """The store and its drivers; `reported` are the commits that a driver was told are done."""

    log: Log = ()
    data: frozenset[Commit] = frozenset()
    drivers: tuple[Driver, ...] = ()
    reported: frozenset[Commit] = frozenset()
    removed: frozenset[Commit] = frozenset()


def ordered(state: State) -> dict[int, Entry]:
    """The log as a reader understands it."""
    return in_order(dict(state.log))


def visible(state: State) -> list[Commit]:
    """The commits that count, newest first."""
    return visible_commits(ordered(state).values())


def broken(state: State) -> str | None:
    """The name of an invariant that does not hold, None if all do."""
    counting = visible(state)
    if any(commit not in state.data for commit in counting):
        return "torn"
    newest = max((commit.step for commit in counting), default=0)
    if any(commit.step > newest or (commit not in counting and commit not in state.removed) for commit in state.reported):
        return "lost"
    claim = 0
    for entry in ordered(state).values():
        if isinstance(entry, Incarnation):
            claim = entry.number
        elif isinstance(entry, Commit) and entry.incarnation < claim and entry in counting:
            return "both"
    advancing = [driver.incarnation for driver in state.drivers if driver.phase in ("committed", "tidy", "remove", "removed", "delete")]
    return "both" if len(advancing) > len(set(advancing)) else None


def successors(state: State, rules: Rules) -> Iterator[State]:
    """Every state that one call of one driver, or its death, leads to."""
    for index, driver in enumerate(state.drivers):
        if driver.phase in ("ended", "dead"):
            continue
        yield _with(state, index, Driver("dead"))
        yield from _ACTIONS[driver.phase](state, index, driver, rules)


def _with(state: State, index: int, driver: Driver) -> State:
    # Drivers are alike, so that states which differ in their order only are one.
    drivers = sorted((*state.drivers[:index], driver, *state.drivers[index + 1 :]), key=_order)
    return replace(state, drivers=tuple(drivers))


def _order(driver: Driver) -> tuple[object, ...]:
    return (
        driver.phase,
        driver.incarnation,
        driver.step,
        driver.seen,
        driver.left,
        driver.deaf,
        driver.unsure,
        str(driver.base),
        driver.doomed,
    )


def _look(state: State, index: int, driver: Driver, _rules: Rules) -> Iterator[State]:
    counting, entries = visible(state), ordered(state)
    base = counting[0] if counting else None
    looked = replace(driver, phase="claim", incarnation=newest_incarnation(entries.values()) + 1, base=base, seen=max(entries, default=0))
    yield _with(state, index, looked)


def _claim(state: State, index: int, driver: Driver, rules: Rules) -> Iterator[State]:
    yield from _put(state, index, driver, Incarnation(driver.incarnation, driver.base), rules, "claimed", "look")


def _claimed(state: State, index: int, driver: Driver, rules: Rules) -> Iterator[State]:
    begun = replace(driver, phase="data", step=driver.base.step if driver.base else 0)
    yield _with(state, index, begun if _is_in_order(state, driver, rules) else replace(driver, phase="look"))


def _data(state: State, index: int, driver: Driver, rules: Rules) -> Iterator[State]:
    if driver.left == 0:
        yield _with(state, index, replace(driver, phase="tidy"))
        return
    done = replace(state, data=state.data | {_own(driver)}) if rules.data_before_commit else state
    yield _with(done, index, replace(driver, phase="check"))


def _check(state: State, index: int, driver: Driver, rules: Rules) -> Iterator[State]:
    if _may_go_on(state, driver, rules):
        yield _with(state, index, replace(driver, phase="commit", seen=max(ordered(state))))
    else:
        yield _with(state, index, Driver("ended"))  # SupersededError


def _commit(state: State, index: int, driver: Driver, rules: Rules) -> Iterator[State]:
    at = driver if rules.commit_at_next_number else replace(driver, seen=max(dict(state.log)))
    yield from _put(state, index, at, _own(driver), rules, "committed", "check")


def _committed(state: State, index: int, driver: Driver, rules: Rules) -> Iterator[State]:
    if not _is_in_order(state, driver, rules):
        yield _with(state, index, replace(driver, phase="check"))
        return
    own = _own(driver)
    told = replace(state, reported=state.reported | {own}, data=state.data | {own})
    yield _with(told, index, replace(driver, phase="data", step=own.step, left=driver.left - 1))


def _tidy(state: State, index: int, driver: Driver, rules: Rules) -> Iterator[State]:
    """Choose what to remove: all but the newest commit."""
    if not _may_go_on(state, driver, rules) or len(visible(state)) < 2:
        yield _with(state, index, Driver("ended"))
        return
    doomed = _doomed(state)
    chosen = replace(driver, phase="remove" if rules.removals_are_logged else "delete", seen=max(ordered(state)), doomed=doomed)
    yield _with(replace(state, removed=state.removed | {commit for _, commit in doomed}), index, chosen)


def _remove(state: State, index: int, driver: Driver, rules: Rules) -> Iterator[State]:
    entries = dict(state.log)
    older = {number for number, entry in entries.items() if isinstance(entry, Removal)}
    removal = Removal.of(newest_removal(entries).numbers | older | {number for number, _ in driver.doomed})
    yield from _put(state, index, driver, removal, rules, "removed", "tidy")


def _removed(state: State, index: int, driver: Driver, rules: Rules) -> Iterator[State]:
    yield _with(state, index, replace(driver, phase="delete" if _is_in_order(state, driver, rules) else "tidy"))


def _delete(state: State, index: int, driver: Driver, _rules: Rules) -> Iterator[State]:
    """Delete what was chosen: the entries, then the data."""
    gone = frozenset(commit for _, commit in driver.doomed)
    there = tuple((number, entry) for number, entry in state.log if (number, entry) not in driver.doomed)
    if there != state.log:
        yield _with(replace(state, log=there), index, driver)
    else:
        yield _with(replace(state, data=state.data - gone), index, Driver("ended"))


def _put(state: State, index: int, driver: Driver, entry: Entry, rules: Rules, done: Phase, again: Phase) -> Iterator[State]:
    """Put an entry at the number after `seen`: it stands, or the number is taken; the answer comes, or is lost."""
    number = driver.seen + 1
    taken = dict(state.log).get(number)
    if taken is not None and rules.put_is_conditional:
        is_own = taken == entry and driver.unsure
        yield _with(state, index, replace(driver, phase=done if is_own else again, unsure=False))
        return
    stands = replace(state, log=tuple(sorted({**dict(state.log), number: entry}.items())))
    yield _with(stands, index, replace(driver, phase=done, unsure=False))
    if driver.deaf:  # it stands, and the driver does not know: it puts again
        yield _with(stands, index, replace(driver, deaf=driver.deaf - 1, unsure=True))


def _may_go_on(state: State, driver: Driver, rules: Rules) -> bool:
    return newest_incarnation(ordered(state).values()) == driver.incarnation or not rules.commit_checks_claims


def _is_in_order(state: State, driver: Driver, rules: Rules) -> bool:
    return driver.seen + 1 in ordered(state) or not rules.numbers_are_confirmed


def _doomed(state: State) -> tuple[tuple[int, Commit], ...]:
    kept = visible(state)[:1]
    return tuple((number, entry) for number, entry in ordered(state).items() if isinstance(entry, Commit) and entry not in kept)


def _own(driver: Driver) -> Commit:
    return Commit(driver.incarnation, driver.step + 1, "a")


_ACTIONS = {
    "look": _look,
    "claim": _claim,
    "claimed": _claimed,
    "data": _data,
    "check": _check,
    "commit": _commit,
    "committed": _committed,
    "tidy": _tidy,
    "remove": _remove,
    "removed": _removed,
    "delete": _delete,
}


@dataclass(frozen=True)
class Search:
    """What a search found: how many states there are, and the shortest way to one that breaks an invariant, if any."""

    num_states: int
    broken: str | None
    trace: list[State]


def search(rules: Rules, num_drivers: int, num_steps: int, num_deaf: int = 1) -> Search:
    """Visit every state that so many drivers, each wanting so many commits, can reach; stop at the first that is wrong."""
    start = State(drivers=(Driver(left=num_steps, deaf=num_deaf),) * num_drivers)
    parents: dict[State, State | None] = {start: None}
    frontier = [start]
    while frontier:
        following: list[State] = []
        for state in frontier:
            for successor in successors(state, rules):
                if successor in parents:
                    continue
                parents[successor] = state
                if (name := broken(successor)) is not None:
                    return Search(len(parents), name, _way(parents, successor))
                following.append(successor)
        frontier = following
    return Search(len(parents), None, [])


def _way(parents: dict[State, State | None], state: State | None) -> list[State]:
    way: list[State] = []
    while state is not None:
        way.append(state)
        state = parents[state]
    return way[::-1]
