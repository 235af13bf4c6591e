"""How fast a run is at a size, and which sizes help. Pure.

A step takes as long as the worker with the most logical shards: speed follows 1 / ceil(shards / workers). Where a run's
speed was measured the measurement counts; sizes not measured follow the shards from the nearest one that was.

Invariants:
- The first useful size is the min; each one after it is faster than all before, by at least `MIN_GAIN`.
- No useful size has more workers than shards.
"""

from functools import lru_cache

from tidepool.messages import Run

MIN_GAIN = 1.02

Sizes = tuple[tuple[int, float], ...]


def useful_sizes(run: Run) -> Sizes:
    """Pairs (groups, speed), ascending in both; the unit of speed is the same within a run only."""
    return _useful_sizes(run.min_groups, run.max_groups, run.workers_per_group, run.shards, run.speeds)


@lru_cache(maxsize=65_536)
def _useful_sizes(min_groups: int, max_groups: int, workers: int, shards: int, speeds: tuple[tuple[int, float], ...]) -> Sizes:
    sizes = [(min_groups, _speed(min_groups, workers, shards, speeds))]
    for groups in range(min_groups + 1, min(max_groups, shards // workers) + 1):
        speed = _speed(groups, workers, shards, speeds)
        if speed >= sizes[-1][1] * MIN_GAIN:
            sizes.append((groups, speed))
    return tuple(sizes)


def speed_at(run: Run, groups: int) -> float:
    """The speed of a run at any size; 0 below its min."""
    return _speed(groups, run.workers_per_group, run.shards, run.speeds) if groups >= run.min_groups else 0.0


def _speed(groups: int, workers: int, shards: int, speeds: tuple[tuple[int, float], ...]) -> float:
    by_shards = shard_speed(groups * workers, shards)
    if not speeds:
        return by_shards
    near, measured = min(speeds, key=lambda pair: (abs(pair[0] - groups), pair[0]))
    return measured * by_shards / shard_speed(near * workers, shards)


def shard_speed(workers: int, shards: int) -> float:
    """How many times faster than one worker."""
    return shards / -(-shards // workers)
