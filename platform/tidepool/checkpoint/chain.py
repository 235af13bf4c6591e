"""Which commits of a run count: a pure function of what stands in the store.

Each start or resumption of a run claims the next *incarnation*, which names the commit it starts from (its base). The
newest incarnation, its base, the incarnation of that base, and so on form the run's one history.

Invariants:
- A commit of incarnation i counts only if i is on that history, and only up to the base of the incarnation that left i.
- So two drivers never both advance a run: what the older one commits after the newer one's claim is seen by nobody.
- A commit that counted and lies at or below every later base counts for ever (until retention removes it).
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
        """What stands in object names and in incarnations."""
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


def visible_commits(incarnations: Iterable[Incarnation], commits: Iterable[Commit]) -> list[Commit]:
    """The commits that count, newest first. See the module's docstring."""
    by_number = {incarnation.number: incarnation for incarnation in incarnations}
    by_incarnation: dict[int, list[Commit]] = {}
    for commit in commits:
        by_incarnation.setdefault(commit.incarnation, []).append(commit)
    visible: list[Commit] = []
    number, last_step = max(by_number, default=0), None
    while number in by_number:
        own = by_incarnation.get(number, [])
        visible += sorted((c for c in own if last_step is None or c.step <= last_step), key=lambda c: (c.step, c.attempt), reverse=True)
        base = by_number[number].base
        if base is None:
            break
        assert base.incarnation < number, "an incarnation starts from an earlier one"
        number, last_step = base.incarnation, base.step
    return visible
