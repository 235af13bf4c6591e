"""Which commits of a run count: a pure function of the run's log, read in order.

The log holds *claims* (each start or resumption of a run claims the next incarnation, and names the commit that it starts
from, its base), *commits* and *removals*. An entry takes the number after the last one or fails, so all of them are in one
order. A removal says at which numbers nothing counts any more; those objects are deleted after it stands. A driver that
stalled may then find the number free that it had chosen long ago: what it puts there is out of order, and counts for nobody.

Invariants:
- A commit counts only if the newest claim before it is its own incarnation's, and only until a claim goes back past it.
- So two drivers never both advance a run: what the older one commits after the newer one's claim is seen by nobody.
- What counted when a claim was made and lies at or below its base counts on (until retention removes it).
- What stands at a number that a removal names counts no more, whatever it is.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

_NAME = re.compile(r"(\d+)-(\d+)-([0-9a-f]+)")


@dataclass(frozen=True, order=True)
class Commit:
    """The commit of the state after `step` optimizer steps; `attempt` makes its objects' prefix unique."""

    incarnation: int
    step: int
    attempt: str

    @property
    def name(self) -> str:
        """What stands in the log."""
        return f"{self.incarnation}-{self.step}-{self.attempt}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The inverse of `name`; None for anything else."""
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), int(match[2]), match[3]) if match else None


@dataclass(frozen=True)
class Incarnation:
    """One start or resumption of a run; `base` is None where it started from scratch."""

    number: int
    base: Commit | None


@dataclass(frozen=True)
class Removal:
    """Nothing counts at numbers `[first, last]` of each range: all that was removed so far, and older removals themselves."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Self:
        """The removal of these numbers."""
        ranges: list[tuple[int, int]] = []
        for number in sorted(numbers):
            if ranges and ranges[-1][1] == number - 1:
                ranges[-1] = ranges[-1][0], number
            else:
                ranges.append((number, number))
        return cls(tuple(ranges))

    @property
    def numbers(self) -> frozenset[int]:
        """The numbers that it names."""
        return frozenset(number for first, last in self.ranges for number in range(first, last + 1))


Entry = Incarnation | Commit | Removal


def newest_removal(entries: Mapping[int, Entry]) -> Removal:
    """The one that counts: each holds all before it, and the one at the highest number is never removed."""
    number = max((number for number, entry in entries.items() if isinstance(entry, Removal)), default=None)
    found = entries.get(number) if number is not None else None
    return found if isinstance(found, Removal) else Removal(())


def in_order(entries: Mapping[int, Entry]) -> dict[int, Entry]:
    """The entries of a log by number, without those at removed numbers."""
    removed = newest_removal(entries).numbers
    return {number: entry for number, entry in sorted(entries.items()) if number not in removed}


def newest_incarnation(entries: Iterable[Entry]) -> int:
    """The number of the incarnation that may commit, 0 if there is none."""
    return max((entry.number for entry in entries if isinstance(entry, Incarnation)), default=0)


def visible_commits(entries: Iterable[Entry]) -> list[Commit]:
    """The commits that count, the highest step first, from the entries of a log `in_order`. See the module's docstring.

    By step and not by place: a writer that was stopped and put out of its quorum may commit an older step of the same
    incarnation when it wakes up.
    """
    visible: list[Commit] = []
    newest = 0
    for entry in entries:
        if isinstance(entry, Incarnation):
            newest = entry.number
            # By step, not by place: retention may have removed the base itself from the log.
            visible = [commit for commit in visible if entry.base is not None and commit.step <= entry.base.step]
        elif isinstance(entry, Commit) and entry.incarnation == newest:
            visible.append(entry)
    return sorted(visible, key=lambda commit: commit.step)[::-1]
