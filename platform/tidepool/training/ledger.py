"""Where the wall time of a run went, and what part of it was worth it. Pure; light: the coordinator imports no torch for it.

`goodput` is the time that the run's steps take where nothing disturbs them (the median step time of each world size that
the run had) over the wall time since it began, all drivers and the time between them included. The rest is split by what
the worker of rank 0 was doing: taking steps (more slowly than the median, or in vain), steps computed again, evaluations,
commits, loading and first quorum, changes of the quorum. `other_s` is what is left: nobody was there to say.
"""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tidepool.training.membership import Quorum, Report

_CATEGORY = {
    "step": "step_s",
    "exchange": "step_s",
    "evaluate": "evaluate_s",
    "commit": "commit_s",
    "finish": "finish_s",
    "load": "start_s",
}
_ELSE = "quorum_s"


@dataclass
class Ledger:
    """The account of a run; `before` is what `to_json` gave at the commit that this driver began from. Times in seconds of the epoch."""

    started_at: float
    before: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started_at = self.before.get("started_at", self.started_at)
        self._spent_s: dict[str, float] = dict(self.before.get("spent_s", {}))
        self._useful_s: float = self.before.get("useful_s", 0.0)
        self._num_formed: int = self.before.get("quorums", 0)
        self._recomputed: int = self.before.get("recomputed_steps", 0)
        self._newest_step = 0
        self._quorum: Quorum | None = None
        self._last: Report | None = None
        self._steps_s: dict[int, deque[float]] = {}

    def note_quorum(self, quorum: Quorum) -> None:
        """A quorum was formed."""
        self._num_formed += 1
        self._quorum, self._last = quorum, None
        if self._newest_step > quorum.step:
            num_lost = self._newest_step - quorum.step
            self._recomputed += num_lost
            lost_s = num_lost * self.step_s(len(quorum.workers))
            self._useful_s -= lost_s
            self._spent_s["recompute_s"] = self._spent_s.get("recompute_s", 0.0) + lost_s
            self._newest_step = quorum.step

    def note_report(self, report: Report) -> None:
        """A worker reported."""
        if self._quorum is None or report.worker != self._quorum.workers[0]:
            return
        last, self._last = self._last, report
        if last is None or report.sequence <= last.sequence:
            return
        for phase, total_s in report.spent_s.items():
            name = _CATEGORY.get(phase, _ELSE)
            self._spent_s[name] = self._spent_s.get(name, 0.0) + total_s - last.spent_s.get(phase, 0.0)
        size = len(self._quorum.workers)
        if num_steps := report.num_steps - last.num_steps:
            self._steps_s.setdefault(size, deque(maxlen=200)).append(report.step_s)
            self._useful_s += num_steps * self.step_s(size)
        if report.step is not None:
            self._newest_step = max(self._newest_step, report.step)

    def step_s(self, size: int) -> float:
        """The median step time with so many workers, 0 while none is known."""
        known = self._steps_s.get(size)
        return statistics.median(known) if known else 0.0

    def to_json(self, now: float) -> dict[str, Any]:
        """What goes into the result and into each commit: `goodput`, `quorum_changes`, `recomputed_steps`, and the times."""
        wall_s = max(now - self.started_at, 1e-9)
        recompute_s = self._spent_s.get("recompute_s", 0.0)
        slow_s = max(0.0, self._spent_s.get("step_s", 0.0) - self._useful_s - recompute_s)
        named = {name: value for name, value in self._spent_s.items() if name != "step_s"}
        rest = {**named, "slow_steps_s": slow_s}
        return {
            "started_at": self.started_at,
            "wall_s": wall_s,
            "goodput": min(1.0, self._useful_s / wall_s),
            "useful_s": self._useful_s,
            "rest": rest | {"other_s": max(0.0, wall_s - self._useful_s - sum(rest.values()))},
            "quorums": self._num_formed,
            "quorum_changes": max(0, self._num_formed - 1),
            "recomputed_steps": self._recomputed,
            "spent_s": dict(self._spent_s),
        }
