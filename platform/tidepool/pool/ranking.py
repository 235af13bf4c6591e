"""Who goes before whom, and who may be paused for whom. Pure.

Of the runs that wait for their min, those go first whose tier's guarantee would be broken; then those that have waited too
long; then by tier, by priority, by how little they have used, by how long they have waited. If more was guaranteed than the
pool can hold, no order keeps every guarantee: then those that have waited too long come before all.

Invariants:
- A rank is a tuple that compares: the smaller one goes first. Its `power` (the rank without waiting time) decides who may
  take from whom, and only a strictly smaller one may: equals never take turns.
- A run that holds its min has not waited: whoever waits long enough goes before all that hold and can spare it.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

from tidepool.messages import Run
from tidepool.pool.rules import TIERS, Rules

RESERVED, STARVING, OWED, AGED, USUAL = range(5)

_TIER_LEVEL = {tier: level for level, tier in enumerate(TIERS)}


class Power(NamedTuple):
    """What decides who may take from whom; the smaller one may."""

    standing: int
    tier: int
    unpriority: int
    band: int


STRONGEST = Power(-1, 0, 0, 0)
"""Serving's."""
WEAKEST = Power(USUAL + 1, 0, 0, 0)


def power(run: Run, holds_min: bool, now_s: float, rules: Rules, is_overpromised: Callable[[], bool] = bool) -> Power:
    """The power of a run, whether it waits or holds its min. `is_overpromised` says if more is guaranteed than there is."""
    is_aged = not holds_min and waited_s(run, now_s) >= rules.aging_s
    if is_aged and is_overpromised():
        return Power(STARVING, 0, 0, 0)
    if is_owed(run, holds_min, now_s, rules):
        return Power(OWED, _TIER_LEVEL[run.tier], -run.priority, band(run, now_s, rules))
    if is_aged:
        return Power(AGED, 0, 0, 0)
    return Power(USUAL, _TIER_LEVEL[run.tier], -run.priority, band(run, now_s, rules))


def waited_s(run: Run, now_s: float) -> float:
    """How long a run has had less than its min."""
    return 0.0 if run.waiting_since_s is None or run.waiting_since_s > now_s else now_s - run.waiting_since_s


def used_gpu_s(run: Run, now_s: float) -> float:
    """GPU seconds (CPU seconds, without GPUs) that a run has used so far."""
    if not run.groups or run.as_of_s >= now_s:
        return run.used_gpu_s
    per_worker = run.worker.gpus or run.worker.cpus
    return run.used_gpu_s + len(run.groups) * run.workers_per_group * per_worker * (now_s - run.as_of_s)


def band(run: Run, now_s: float, rules: Rules) -> int:
    """How much a run has used, in a few steps."""
    return bisect_right(rules.bands_gpu_s, used_gpu_s(run, now_s))


def share(run: Run, holds_min: bool, now_s: float, rules: Rules, pause_s: float = 0.0) -> float:
    """The part of the window in which a run held its min; at least what it will be after a pause of `pause_s`."""
    age_s, window_s = now_s - run.submitted_s, rules.window_s
    over_s = age_s + pause_s - window_s
    span_s = window_s if over_s > 0 else age_s + pause_s
    if span_s <= 0:
        return 1.0
    held_s = run.held_s
    if holds_min and run.as_of_s < now_s:
        held_s += now_s - run.as_of_s
    if held_s > age_s or held_s > window_s:
        held_s = max(0.0, min(age_s, window_s))
    if over_s > 0 and pause_s:
        held_s -= min(held_s, over_s, pause_s)
    return held_s / span_s


def is_owed(run: Run, holds_min: bool, now_s: float, rules: Rules) -> bool:
    """Whether the guarantee is broken, or would be before a place can be made (`return_s` later) if the run did not hold."""
    guarantee = rules.guarantees[run.tier]
    return guarantee > 0 and share(run, holds_min, now_s, rules, 0.0 if holds_min else rules.return_s) < guarantee


def can_spare(run: Run, now_s: float, rules: Rules) -> bool:
    """Whether the guarantee outlives a pause of one tenure and the making of a new place after it."""
    return share(run, True, now_s, rules, rules.tenure_s + rules.return_s) >= rules.guarantees[run.tier]


def may_pause(
    claimant: Power, own: Power, victim: Run, now_s: float, rules: Rules, *, after_tenure: bool = False, is_overpromised: bool = False
) -> bool:
    """Whether a claimant may take a place below the min of a victim, whose power is `own`.

    Serving and reservations may (they come to the weakest first). Others must outrank the victim, whose tenure must be
    over (`after_tenure` takes it to be); and they must not break its guarantee, unless not all can be kept, their own is broken
    too, and they rank before it all the same.
    """
    if claimant.standing <= RESERVED:
        return True
    if claimant >= own or (now_s - victim.started_s < rules.tenure_s and not after_tenure):
        return False
    return can_spare(victim, now_s, rules) or (is_overpromised and claimant.standing == OWED and claimant[1:] < own[1:])
