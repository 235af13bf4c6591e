"""Every run gets its min, by rank, as long as there is room or somebody who ranks lower. Pure.

Invariants:
- A run gets all that it lacks of its min, or nothing; what it holds below its min and cannot complete it gives back.
- Nobody is paused for a run that nodes could be launched for.
- Some runs that cannot be met *gather*: what comes free is kept for them until they fit. They are the first of those that
  waited too long and, where all guarantees can be kept, those whose guarantee is at stake and whom only tenures keep out.
- While a run gathers, those that rank after it pause less: a run with a guarantee only runs without one, others nobody.

The last one is why nobody waits for ever. A run of several groups needs all of its places at once; a tenure, and a guarantee
that cannot spare more, each hold one of them back for a time. If others took the rest one by one, each with a new tenure or
with what it could have spared used up, there might never be enough together (docs/pool.md has the proof).
"""

from tidepool.messages import AskBack, GrantGroup, Reason, Reservation, Run, Wait
from tidepool.pool import ranking
from tidepool.pool.givers import Demand, Pauses
from tidepool.pool.holding import Holding
from tidepool.pool.ranking import AGED, OWED, STARVING, Power
from tidepool.pool.reasons import reason
from tidepool.pool.replicas import take_spare_replicas
from tidepool.pool.round import Round


def rank(state: Round, holding: Holding) -> tuple[Power, float, str]:
    """The order of runs that wait."""
    run = holding.run
    since_s = run.waiting_since_s if run.waiting_since_s is not None else state.now_s
    return ranking.power(run, False, state.now_s, state.rules, lambda: state.is_overpromised), since_s, run.name


def meet_minimums(state: Round) -> None:
    """Grant the mins of all runs that have less."""
    state.givers.forget_failures()
    ranked = sorted((rank(state, holding), number) for number, holding in enumerate(state.holdings) if holding.missing)
    standing = STARVING
    for (power, _, _), number in ranked:
        holding = state.holdings[number]
        if state.is_full and holding.missing and not holding.is_paused:
            state.wait_for_next_round(holding.run.name, holding.missing)
            continue
        if power.standing != standing:
            standing = power.standing
            state.givers.forget_failures()
        if holding.is_paused or holding.missing == 0 or meet(state, holding, power):
            continue
        run = holding.run
        if not holding.gathers and holding.groups and len(holding.groups) + len(holding.closing) < run.min_groups:
            why = reason("gang", run=run.name, held=len(holding.groups), min=run.min_groups)
            state.decisions += [AskBack(run.name, group.name, why) for group in holding.groups]


def meet(state: Round, holding: Holding, power: Power, reservation: Reservation | None = None) -> bool:
    """Grant what a run lacks, or see to it that it comes; False if it stays without."""
    run, missing = holding.run, holding.missing
    over = state.usage.training_over(run.project, missing * holding.gpus_per_group)
    if over is not None:
        return reservation is None and _shrink_own_project(state, holding, over)
    pauses = Pauses.ANYBODY if reservation is not None else _pauses(state, run)
    could_launch = state.launches.could_fit(run.worker, run.labels, run.kind)
    has_failed = state.givers.has_failed_for(holding.options, missing * run.workers_per_group, pauses)
    if has_failed and not could_launch and reservation is None and run.tier != "premium":
        _wait(state, holding, power, pauses)
        return False
    demand = _demand(state, holding, power, pauses)
    spots, is_coming = state.claim(run.name, demand._replace(pauses=Pauses.NOBODY) if could_launch else demand, run)
    if not spots and not is_coming and could_launch:
        on_spot = run.tier == "basic"
        template = state.launches.promise(run.name, missing, run.workers_per_group, run.worker, run.labels, run.kind, on_spot)
        if template is not None:
            why = reason("launching", missing=missing, template=template.name, start_s=template.start_s)
            state.waits.append(Wait(run.name, missing, why))
            return True
        spots, is_coming = state.claim(run.name, demand, run)
    if spots:
        why = _grant_reason(state, holding, power, reservation)
        state.decisions += [GrantGroup(run.name, state.room.names(spot), why) for spot in spots]
        state.num_granted += missing
        holding.was_granted = True
        state.fix_kind(holding, spots[0])
    elif is_coming or (run.tier == "premium" and take_spare_replicas(state, holding)):
        state.waits.append(Wait(run.name, missing, reason("coming", missing=missing)))
        holding.is_coming = True
    else:
        if reservation is None:
            _wait(state, holding, power, pauses)
        return False
    holding.num_groups += missing
    state.usage.add_training(run.project, missing * holding.gpus_per_group)
    return True


def _pauses(state: Round, run: Run) -> Pauses:
    """Whom a run may pause for its min: fewer, once the round gathers room for one that goes before it."""
    if not state.gathering:
        return Pauses.ANYBODY
    return Pauses.UNGUARANTEED if state.rules.guarantees[run.tier] > 0 else Pauses.NOBODY


def _demand(state: Round, holding: Holding, power: Power, pauses: Pauses) -> Demand:
    """What a run lacks of its min."""
    is_over = power.standing == OWED and state.is_overpromised
    return Demand(holding.options, holding.missing, holding.run.workers_per_group, power, pauses, is_overpromised=is_over)


def _wait(state: Round, holding: Holding, power: Power, pauses: Pauses) -> None:
    """Say why a run stays without its min, and keep what comes free for it if it is one that gathers."""
    run, missing, workers = holding.run, holding.missing, holding.run.workers_per_group
    kind = None
    if power.standing == OWED and not state.is_overpromised:
        kind = state.givers.would_make_room(_demand(state, holding, power, pauses))
    if kind is not None:
        why = reason("tenure", missing=missing, workers=workers, tenure_s=state.rules.tenure_s)
        state.waits.append(Wait(run.name, missing, why))
    else:
        state.wait_for_room(run.name, missing, workers, run.worker, run.labels, holding.options)
    if power.standing in {AGED, STARVING} and power.standing not in state.gathering:
        kind = state.room.could_hold(holding.options, run.min_groups * workers)
    if kind is not None:
        state.book(kind, missing * workers)
        state.gathering.add(power.standing)
        holding.gathers = True


def _shrink_own_project(state: Round, holding: Holding, over: Reason) -> bool:
    """At the quota: runs of the same project give up what they hold above their min.

    False if that is not enough, or if there would be no room then; in that case nobody is asked.
    """
    run, project = holding.run, holding.run.project
    excess = state.usage.training_excess(project, holding.missing * holding.gpus_per_group)
    pieces = []
    for piece in state.givers.surplus_of(project) if excess > 0 else ():
        pieces.append(piece)
        excess -= len(piece.groups) * piece.holding.gpus_per_group
        if excess <= 0:
            break
    for piece in pieces:
        state.givers.release(piece)
    if excess > 0 or not state.room.take(state.room.soon, holding.options, holding.missing, run.workers_per_group):
        for piece in reversed(pieces):
            state.givers.take_back(piece)
        state.waits.append(Wait(run.name, holding.missing, over))
        return False
    for piece in pieces:
        state.ask_back_for_quota(piece, run.name)
    state.waits.append(Wait(run.name, holding.missing, reason("coming", missing=holding.missing)))
    return True


def _grant_reason(state: Round, holding: Holding, power: Power, reservation: Reservation | None) -> Reason:
    run = holding.run
    waited_s = ranking.waited_s(run, state.now_s)
    if reservation is not None:
        return reason("reserved", run=run.name, project=run.project, reserved=reservation.gpus, reservation=reservation.name)
    if power.standing in {AGED, STARVING}:
        return reason("aged", run=run.name, waited_s=waited_s, aging_s=state.rules.aging_s)
    if power.standing == OWED and run.held_s:
        share = ranking.share(run, False, state.now_s, state.rules)
        return reason("owed", run=run.name, share=share, tier=run.tier, guarantee=state.rules.guarantees[run.tier])
    held = len(holding.groups)
    return reason("min", run=run.name, tier=run.tier, priority=run.priority, held=held, min=run.min_groups, waited_s=waited_s)
