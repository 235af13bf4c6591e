"""Whether another driver is submitted for a run whose driver is gone. Pure: from what the store and Ray say to one decision.

Invariants:
- A driver that may still come, or that Ray still counts as running, is waited for: a run never gets two.
- What a person ended stays ended, also if it is Ray alone that knows of it (`ray job stop`).
- A driver is submitted after a pause that doubles from one to the next, and no more than `max_short_lives` die young in a row. The
  count is the store's, so it outlives whoever counts. A driver that lived for `lived_s` has shown that the run can go on.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from tidepool.run_queue import QueuedRun

JobState = Literal["active", "stopped", "ended", "failed", "unknown"]
"""What Ray says of a job: it waits or runs; a person stopped it; its entrypoint ended well, or did not; there is none in this cluster."""


@dataclass(frozen=True)
class Patience:
    """How long is waited, and how often."""

    first_s: float = 5.0
    longest_s: float = 300.0
    lived_s: float = 600.0
    max_short_lives: int = 6


@dataclass(frozen=True)
class Wait:
    """Nothing is to be done yet; `until_s` is when it may be."""

    reason: str
    until_s: float | None = None


@dataclass(frozen=True)
class Resubmit:
    """Submit another driver now."""

    reason: str


@dataclass(frozen=True)
class GiveUp:
    """Submit no other one until a person does."""

    reason: str


@dataclass(frozen=True)
class CallOff:
    """It was ended on purpose."""

    how: Literal["finished", "stopped"]


def decide(run: QueuedRun, job: JobState, missing_since_s: float, now_s: float, patience: Patience) -> Wait | Resubmit | GiveUp | CallOff:
    """What is to be done for a wanted run that has had no driver in the cluster since `missing_since_s`."""
    if job == "active":
        return Wait(f"job {run.job} is starting or ending")
    if job == "stopped":
        return CallOff("stopped")
    if job == "ended":
        return CallOff("finished")
    num_short = num_short_lives(run, missing_since_s, patience)
    died = f"its driver died{'' if num_short < 2 else f' {num_short} times in a row'}"
    if num_short > patience.max_short_lives:
        return GiveUp(f"{died}, each time within {patience.lived_s:.0f} s{_where(run)}; `tidepool runs resume {run.run}` tries again")
    wait_s = min(patience.first_s * 2.0 ** max(0, num_short - 1), patience.longest_s)
    if now_s < missing_since_s + wait_s:
        return Wait(f"{died}{_where(run)}; another one is submitted in a moment", missing_since_s + wait_s)
    return Resubmit(f"{died}{_where(run)}")


def num_short_lives(run: QueuedRun, ended_s: float, patience: Patience) -> int:
    """How many of the newest drivers, one after the other, died young; the newest died at `ended_s`."""
    newest_s = ended_s - run.begun_s if run.begun_s is not None else 0.0
    lives_s = (*run.lives_s, newest_s)
    return sum(1 for _ in takewhile(lambda life_s: life_s < patience.lived_s, reversed(lives_s)))


def _where(run: QueuedRun) -> str:
    return f" (`ray job logs {run.job}` shows the last)"
