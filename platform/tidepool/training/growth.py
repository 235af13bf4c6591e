"""How many replica groups to start and to release. Pure; until the pool decides this, the driver asks here.

Only sizes that help are asked for: a step takes as long as the worker with the most shards, ceil(shards / workers). Below the
minimum a group is started whether or not there is room now (its demand is what an autoscaler answers); above it, only into
room that is there, so that nothing pends which nobody waits for.
"""


def useful_groups(limit: int, workers_per_group: int, num_shards: int) -> int:
    """The fewest groups, at most `limit`, that are as fast as `limit` groups."""

    def shards_of_slowest(groups: int) -> int:
        return -(-num_shards // (groups * workers_per_group))

    return min(range(1, limit + 1), key=lambda groups: (shards_of_slowest(groups), groups), default=0)


def num_to_start(running: int, room: int, least: int, wanted: int, workers_per_group: int, num_shards: int) -> int:
    """How many groups to start, where `running` run or start, and `room` more would find a place now."""
    reachable = min(wanted, running + room)
    return max(least - running, useful_groups(reachable, workers_per_group, num_shards) - running, 0)
