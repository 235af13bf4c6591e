"""What is left speeds runs up: where it speeds up most, fairly. Pure.

The room goes where the sum of weighted logarithms of the runs' speeds grows most per GPU, one useful size at a time. This
is proportional fairness (Kelly 1997): doubling a small run counts as much as doubling a large one. Room that a run holds
above its min moves to another one only where that sum gains `rebalance_ratio` times what it loses, so it always ends.

Invariants:
- A run grows to useful sizes only, whole steps at a time, not within `cooldown_s` of its last change, and not in the round
  in which it is asked for something.
- Nobody goes below its min for growth.
"""

from heapq import heapify, heappop, heappush
from math import log
from typing import NamedTuple

from tidepool.messages import GrantGroup
from tidepool.pool.givers import Demand, Pauses
from tidepool.pool.holding import Holding
from tidepool.pool.ranking import WEAKEST
from tidepool.pool.reasons import reason
from tidepool.pool.round import Round
from tidepool.pool.speed import speed_at, useful_sizes


class Step(NamedTuple):
    """A run's next useful size, and what it gains."""

    holding: Holding
    size: int
    speedup: float
    gain: float

    @property
    def groups(self) -> int:
        """Groups more than it holds."""
        return self.size - self.holding.num_groups


def share_the_rest(state: Round) -> None:
    """Grow runs into what is idle, then move room to where it helps much more."""
    unmet = _grow(state)
    _rebalance(state, unmet)


def _grow(state: Round) -> list[Step]:
    """Grow runs into idle room, the largest gain first; returns the steps that found none, in that order."""
    heap = [
        (-step.gain, holding.run.submitted_s, number, step)
        for number, holding in enumerate(state.holdings)
        if _may_grow(state, holding) and (step := next_step(state, holding)) is not None
    ]
    heapify(heap)
    unmet: list[Step] = []
    failed: dict[int, int] = {}  # room only shrinks here: what did not fit does not fit later
    while heap and not state.is_full:
        _, submitted_s, number, step = heappop(heap)
        holding, run = step.holding, step.holding.run
        total = step.groups * run.workers_per_group
        if total >= failed.get(id(holding.options), total + 1):
            unmet.append(step)
            continue
        if state.usage.training_over(run.project, step.groups * holding.gpus_per_group) is not None:
            continue
        spots = state.room.take(state.room.idle, holding.options, step.groups, run.workers_per_group)
        if spots is None:
            if state.room.take(state.room.soon, holding.options, step.groups, run.workers_per_group) is None:
                failed[id(holding.options)] = total
                unmet.append(step)
            continue
        why = reason("grow", run=run.name, held=holding.num_groups, size=step.size, speedup=step.speedup, gain=step.gain)
        state.decisions += [GrantGroup(run.name, state.room.names(spot), why) for spot in spots]
        state.usage.add_training(run.project, step.groups * holding.gpus_per_group)
        state.num_granted += step.groups
        holding.num_groups = step.size
        holding.was_granted = True
        following = next_step(state, holding)
        if following is not None:
            heappush(heap, (-following.gain, submitted_s, number, following))
    return unmet


def _rebalance(state: Round, unmet: list[Step]) -> None:
    """Ask runs for what helps others much more."""
    state.givers.forget_failures()
    for step in unmet:
        holding, run = step.holding, step.holding.run
        if run.name in state.giving or holding.num_groups != len(holding.groups):
            continue
        if state.givers.has_failed_for(holding.options, step.groups * run.workers_per_group):
            continue
        limit = step.gain / state.rules.rebalance_ratio
        total = limit * step.groups * holding.gpus_per_group
        demand = Demand(
            holding.options,
            step.groups,
            run.workers_per_group,
            WEAKEST,
            Pauses.NOBODY,
            max_cost=limit,
            total_cost=total,
            is_rebalancing=True,
        )
        state.claim(run.name, demand, run)


def _may_grow(state: Round, holding: Holding) -> bool:
    run = holding.run
    return (
        holding.num_groups < run.max_groups
        and holding.missing == 0
        and not holding.is_coming
        and not holding.is_paused
        and run.name not in state.giving
        and state.now_s - run.resized_s >= state.rules.cooldown_s
    )


def next_step(state: Round, holding: Holding) -> Step | None:
    """The next useful size of a run; None at its largest."""
    run, held = holding.run, holding.num_groups
    for size, speed in useful_sizes(run):
        if size > held:
            speedup = speed / speed_at(run, held)
            if speedup <= 1:
                continue
            units = (size - held) * holding.gpus_per_group
            return Step(holding, size, speedup, state.rules.weights[run.tier] * log(speedup) / units)
    return None
