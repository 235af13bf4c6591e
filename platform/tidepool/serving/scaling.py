"""How many replicas a base model shall have: a pure policy that Ray Serve's controller asks, with the objective of a time to first token.

Serve applies the bounds and the delays of the serving spec to what comes out, starts the first replica when a request waits for
one, and stops replicas gracefully: they hand back what they have not finished. Its own count of requests sees nothing here, since
answers travel past it; what replicas say of themselves is what counts.

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


@dataclass(frozen=True)
class ReplicaLoad:
    """What one replica reported last."""

    occupancy: float
    cache_use: float
    ttft_s: float


def num_wanted(loads: Sequence[ReplicaLoad], num_running: int, num_target: int, ttft_s: float) -> int:
    """The number of replicas for these loads, of `num_running` that run and `num_target` that were asked for last."""
    busy = sum(max(load.occupancy, load.cache_use) for load in loads)
    slowest_s = max((load.ttft_s for load in loads), default=0.0)
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


class Autoscaler:
    """The policy as Serve asks for it: built in its controller, called with an `AutoscalingContext` several times a second."""

    def __init__(self, ttft_s: float) -> None:
        self._ttft_s = ttft_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        loads = latest_loads(context.raw_metrics or {})
        return num_wanted(loads, context.current_num_replicas, context.target_num_replicas, self._ttft_s), {}


def latest_loads(metrics: Mapping[str, Mapping[Any, Sequence[Any]]]) -> list[ReplicaLoad]:
    """The last values of each replica, from metric to replica to values with their times."""
    latest = {name: {replica: values[-1].value for replica, values in metrics.get(name, {}).items() if values} for name in _NAMES}
    return [ReplicaLoad(*(latest[name].get(replica, 0.0) for name in _NAMES)) for replica in latest[OCCUPANCY]]


_NAMES = (OCCUPANCY, CACHE_USE, TTFT_S)
