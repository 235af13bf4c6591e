"""Which commits of a run count: a pure function of the run's log, read in order.

The log holds *claims* (each start or resumption of a run claims the next incarnation, and names the commit that it starts
from, its base) and *commits*. An entry takes the number after the last one or fails, so all of them are in one order.

Invariants:
- A commit counts only if the newest claim before it is its own incarnation's, and only until a claim goes back past it.
- So two drivers never both advance a run: what the older one commits after the newer one's claim is seen by nobody.
- What counted when a claim was made and lies at or below its base counts on (until retention removes it).
"""

import re
from collections.abc import Iterable
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


Entry = Incarnation | Commit


def newest_incarnation(entries: Iterable[Entry]) -> int:
    """The number of the incarnation that may commit, 0 if there is none."""
    return max((entry.number for entry in entries if isinstance(entry, Incarnation)), default=0)


def visible_commits(entries: Iterable[Entry]) -> list[Commit]:
    """The commits that count, newest first, from the entries of a log in their order. See the module's docstring."""
    visible: list[Commit] = []
    newest = 0
    for entry in entries:
        if isinstance(entry, Incarnation):
            newest = entry.number
            # By step, not by place: retention may have removed the base itself from the log.
            visible = [commit for commit in visible if entry.base is not None and commit.step <= entry.base.step]
        elif entry.incarnation == newest:
            visible.append(entry)
    return visible[::-1]
