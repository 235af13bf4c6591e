"""How many replicas a base model shall have for its traffic, with the objective of a time to first token. Pure.

Two numbers come out. *Wanted* is what traffic asks for after the delays of the serving spec: more than a blip. *Needed* is what the traffic
of this moment cannot do without: what is wanted beyond it may be taken for something more important. Replicas are counted as they report;
answers travel past Serve, so its own count of requests sees nothing here.

The module imports nothing of ours: Serve carries it to its controller by value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OCCUPANCY, CACHE_USE, TTFT_S = "occupancy", "cache_use", "ttft_s"
"""What a replica reports: answers that run and wait, as a share of those that can run at once; the share of its cache that is in use; and
the time to the first token, of nearly all of its latest requests and of the one that waits longest."""

_FULL = 0.7
"""A replica that is busier than this is too busy, in the mean: bursts need room."""
_EMPTY = 0.4
"""Replicas go if those that stay are less busy than this: not so near to `_FULL` that one comes again at once."""
_CALM = 0.5
"""And if nobody waits longer than this share of the objective."""
_RUNG_S = 15.0
"""Who waits for a first replica rings much more often than this; who has not rung for so long has left."""


@dataclass(frozen=True)
class ReplicaLoad:
    """What one replica reported last."""

    occupancy: float
    cache_use: float
    ttft_s: float


@dataclass(frozen=True)
class Limits:
    """See `ScaleSpec`."""

    min: int
    max: int
    ttft_s: float
    up_after_s: float
    down_after_s: float
    zero_after_s: float


def num_wanted(loads: Sequence[ReplicaLoad], num_running: int, num_target: int, ttft_s: float) -> int:
    """The number of replicas for these loads, of `num_running` that run and `num_target` that were wanted last."""
    busy = _busy(loads)
    slowest_s = _slowest_s(loads)
    needed = math.ceil(busy / _FULL)
    if needed > num_target:
        return needed
    if len(loads) < num_running:
        return num_target  # who has not reported yet has just started: it is not idle
    if slowest_s > ttft_s and busy > 0:
        return num_target if num_target > num_running else num_target + 1  # one that starts may be enough
    if busy == 0 and slowest_s == 0:
        return 0
    staying = max(needed, math.ceil(busy / _EMPTY), 1)
    return staying if staying < num_target and slowest_s <= _CALM * ttft_s else num_target


def num_needed(loads: Sequence[ReplicaLoad], num_wanted: int, ttft_s: float) -> int:
    """Of those wanted, how many this moment's traffic cannot do without."""
    if _slowest_s(loads) > _CALM * ttft_s:
        return num_wanted
    return min(num_wanted, math.ceil(_busy(loads) / _FULL))


class Demand:
    """What one deployment's traffic wants, as time goes: `num_wanted` within limits, and after their delays."""

    def __init__(self, limits: Limits, num_target: int) -> None:
        self._limits = limits
        self.num_wanted = self._within(num_target)
        self.num_needed = min(limits.min, self.num_wanted)
        self._differs_since: tuple[bool, float] | None = None  # whether upwards, and since when
        self._rung_at = -math.inf

    def update(self, loads: Sequence[ReplicaLoad], num_running: int, now_s: float, has_rung: bool) -> None:
        """Take in what replicas report now, and whether somebody waits for a first one."""
        if has_rung:
            self._rung_at = now_s
            self.num_wanted = max(self.num_wanted, self._within(1))
        raw = num_wanted(loads, num_running, self.num_wanted, self._limits.ttft_s)
        is_first = num_running == 0 and now_s - self._rung_at < _RUNG_S  # somebody waits for it
        self._follow(self._within(max(raw, is_first)), now_s)
        floor = min(max(self._limits.min, is_first), self.num_wanted)
        self.num_needed = max(floor, num_needed(loads, self.num_wanted, self._limits.ttft_s))

    def _follow(self, raw: int, now_s: float) -> None:
        if raw == self.num_wanted:
            self._differs_since = None
            return
        is_up = raw > self.num_wanted
        if self._differs_since is None or self._differs_since[0] != is_up:
            self._differs_since = is_up, now_s
        if now_s - self._differs_since[1] >= self._delay_s(is_up):
            is_last = self.num_wanted == 1
            self.num_wanted = raw if is_up or is_last else max(raw, 1)  # the last one goes by a delay of its own
            self._differs_since = None

    def _delay_s(self, is_up: bool) -> float:
        if is_up:
            return self._limits.up_after_s
        return self._limits.zero_after_s if self.num_wanted == 1 else self._limits.down_after_s

    def _within(self, num: int) -> int:
        return max(self._limits.min, min(num, self._limits.max))


def latest_loads(metrics: Mapping[str, Mapping[Any, Sequence[Any]]]) -> list[ReplicaLoad]:
    """The last values of each replica, from metric to replica to values with their times."""
    latest = {name: {replica: values[-1].value for replica, values in metrics.get(name, {}).items() if values} for name in _NAMES}
    return [ReplicaLoad(*(latest[name].get(replica, 0.0) for name in _NAMES)) for replica in latest[OCCUPANCY]]


_NAMES = (OCCUPANCY, CACHE_USE, TTFT_S)


def _busy(loads: Sequence[ReplicaLoad]) -> float:
    return sum(max(load.occupancy, load.cache_use) for load in loads)


def _slowest_s(loads: Sequence[ReplicaLoad]) -> float:
    return max((load.ttft_s for load in loads), default=0.0)
