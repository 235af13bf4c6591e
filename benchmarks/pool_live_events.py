"""Who held the slots of a pool while serving came and went, and what is read off that: how fast slots changed hands. Pure.

A list of samples, several a second, is all that there is; times are seconds since it began. A slot is one of Ray's, in Ray's own accounts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Sample:
    """The pool at one time. `free`: slots that nobody holds; what is neither free nor a replica's is training's."""

    at_s: float
    wanted: int
    """Replicas that serving wants."""
    placed: int
    """Slots that replicas hold."""
    ready: int
    """Those of them that have started."""
    groups: int
    """Workers that take the run's steps together."""
    step: int
    """The newest step that is completed."""
    free: float


@dataclass(frozen=True)
class Change:
    """A slot that changes hands: from when it was wanted (or free), for how long until it had. `is_met`: it did."""

    from_s: float
    seconds: float
    is_met: bool


def reclaims(samples: Sequence[Sample]) -> list[Change]:
    """For each replica that was wanted and had no room: until there was a free slot for it, or until it was wanted no longer."""
    return _changes(samples, lambda one: one.placed + math.floor(one.free))


def placements(samples: Sequence[Sample]) -> list[Change]:
    """The same until it held the slot."""
    return _changes(samples, lambda one: one.placed)


def _changes(samples: Sequence[Sample], slots: Callable[[Sample], int]) -> list[Change]:
    """For each count of replicas that was wanted while there were fewer `slots` for them."""
    counts = range(1, max((one.wanted for one in samples), default=0) + 1)
    return [change for count in counts for change in _changes_to(samples, slots, count)]


def _changes_to(samples: Sequence[Sample], slots: Callable[[Sample], int], count: int) -> Iterator[Change]:
    """Those that brought the slots from fewer than `count` to so many."""
    since_s: float | None = None
    for one in samples:
        if one.wanted >= count > slots(one):
            since_s = one.at_s if since_s is None else since_s
        elif since_s is not None:
            yield Change(since_s, one.at_s - since_s, slots(one) >= count)
            since_s = None
    if since_s is not None:
        yield Change(since_s, samples[-1].at_s - since_s, is_met=False)


def returns(samples: Sequence[Sample]) -> list[Change]:
    """For each slot that a replica gave up and no other took: until the run takes steps with one worker more, or until the end."""
    found: list[Change] = []
    freed: list[float] = []
    for index, (before, now) in enumerate(pairwise(samples), 1):
        freed += [now.at_s] * (before.placed - now.placed)
        for _ in range(now.placed - before.placed):
            freed = freed[:-1]
        for _ in range(min(now.groups - before.groups, len(freed))):
            stepped_s = next((one.at_s for one in samples[index:] if one.step > now.step), None)
            end_s = samples[-1].at_s if stepped_s is None else stepped_s
            found.append(Change(freed[0], end_s - freed[0], stepped_s is not None))
            freed = freed[1:]
    return found + [Change(from_s, samples[-1].at_s - from_s, is_met=False) for from_s in freed]


@dataclass(frozen=True)
class Shares:
    """Parts of all slots and all the time."""

    idle: float
    """Nobody holds them."""
    starting: float
    """Somebody does, who does not work yet (or no more): a replica, or training beside its steps."""


def shares(samples: Sequence[Sample], num_slots: int) -> Shares:
    """How the slots were used; each sample counts until the next."""
    idle = starting = 0.0
    for before, after in pairwise(samples):
        seconds = after.at_s - before.at_s
        training = max(0.0, num_slots - before.free - before.placed)
        idle += seconds * before.free
        starting += seconds * (before.placed - before.ready + max(0.0, training - before.groups))
    total = num_slots * (samples[-1].at_s - samples[0].at_s)
    return Shares(idle / total, starting / total)
