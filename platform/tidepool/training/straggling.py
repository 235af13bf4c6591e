"""Which workers are slower than their peers, and have been for long. Pure; light: the coordinator imports no torch for it.

A worker's *score* is the median of its peers' time for one logical shard, by its own: 1 is as fast, 0.5 takes twice as long. Only
what a worker computes itself counts, not what it waits for; and by shard, since workers own different numbers of them. Each worker's
time is the median of its last steps, which are the same steps for all. After NVIDIA's resiliency extension (nvidia-resiliency-ext,
`straggler`), which compares with the fastest worker: a median is not moved by one that is fast or wrong.

Invariants:
- A straggler has scored below `Rules.slow` in every report for `Rules.lasting_s`, and over as many steps as a worker's median is of.
- It is one until it scores `Rules.fast`: a score between the two changes nothing.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tidepool.training.membership import Report, WorkerId

WINDOW = 20
"""The steps that a worker's median is of; it reports none before it has taken so many."""


@dataclass(frozen=True)
class Rules:
    """What a straggler is."""

    slow: float = 0.7
    fast: float = 0.8
    lasting_s: float = 30.0


@dataclass
class _Slow:
    since_s: float
    num_steps: int
    """That the worker had taken then."""
    is_straggler: bool = False


class Straggling:
    """The scores of a run's workers. Times are seconds of one clock."""

    def __init__(self, rules: Rules | None = None) -> None:
        self._rules = rules or Rules()
        self._slow: dict[WorkerId, _Slow] = {}
        self.scores: Mapping[WorkerId, float] = {}
        """Of the workers that take steps together, as far as they are known."""

    @property
    def stragglers(self) -> dict[WorkerId, float]:
        """Those that have long been slow, with their scores."""
        return {worker: self.scores[worker] for worker, slow in self._slow.items() if slow.is_straggler}

    def note(self, reports: Iterable[Report], now_s: float) -> None:
        """Take in the newest reports of the members of the quorum."""
        members = {report.worker: report for report in reports if report.shard_s > 0}
        self.scores = _scores({worker: report.shard_s for worker, report in members.items()})
        self._slow = {worker: slow for worker, slow in self._slow.items() if worker in self.scores}
        for worker, score in self.scores.items():
            slow, num_steps = self._slow.get(worker), members[worker].num_steps
            if slow is None:
                if score < self._rules.slow:
                    self._slow[worker] = _Slow(now_s, num_steps)
            elif score >= (self._rules.fast if slow.is_straggler else self._rules.slow):
                del self._slow[worker]
            elif now_s - slow.since_s >= self._rules.lasting_s and num_steps - slow.num_steps >= WINDOW:
                slow.is_straggler = True


def _scores(shard_s: Mapping[WorkerId, float]) -> dict[WorkerId, float]:
    """The scores of workers that have peers."""
    ordered, num_peers = sorted((own_s, worker) for worker, own_s in shard_s.items()), len(shard_s) - 1
    if num_peers < 1:
        return {}
    middle = {(num_peers - 1) // 2, num_peers // 2}
    peers_s = ([ordered[place + (place >= own)][0] for place in middle] for own in range(len(ordered)))
    return {worker: statistics.fmean(around) / own_s for (own_s, worker), around in zip(ordered, peers_s, strict=True)}
