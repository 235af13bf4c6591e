"""Serving comes first: the replicas that traffic needs get a place before any run does, up to the quota. Pure.

Replicas that are only kept because traffic may come back keep their places, too, unless a premium run lacks its min.
"""

from heapq import heapify, heappop, heappush

from tidepool.messages import Deployment, DrainReplica, Replica, StartReplica, Wait
from tidepool.pool.givers import Demand
from tidepool.pool.holding import Holding
from tidepool.pool.ranking import STRONGEST
from tidepool.pool.reasons import reason
from tidepool.pool.round import Round, weight


def serve(state: Round) -> None:
    """Start replicas: by priority, then where the smallest part of what is wanted is there."""
    counts = state.num_replicas
    short = [(-d.priority, counts[d.name] / _needed(d), d.name, d) for d in state.snapshot.deployments if counts[d.name] < _needed(d)]
    heapify(short)
    while short and not state.is_full:
        _, _, name, deployment = heappop(short)
        if _start_one(state, deployment):
            counts[name] += 1
            if counts[name] < _needed(deployment):
                heappush(short, (-deployment.priority, counts[name] / _needed(deployment), name, deployment))
    for *_, name, deployment in short:
        state.wait_for_next_round(name, _needed(deployment) - counts[name])


def _needed(deployment: Deployment) -> int:
    return deployment.wanted if deployment.needed is None else min(deployment.needed, deployment.wanted)


def take_spare_replicas(state: Round, holding: Holding) -> bool:
    """Drain replicas that traffic does not need now, so that a run gets all that it lacks; False, and nothing is done, if it would not."""
    room, run, options = state.room, holding.run, holding.options
    taken: list[tuple[Deployment, Replica, int, int]] = []
    for deployment, replica in _spare(state):
        node = room.number_of.get(replica.node)
        if node is None:
            continue
        units = room.units(deployment.replica)[room.all_class_of[node]]
        room.soon.change(node, units)
        taken.append((deployment, replica, node, units))
        if room.take(room.soon, options, holding.missing, run.workers_per_group):
            break
    else:
        for _, _, node, units in reversed(taken):
            room.use(room.soon, node, units)
        return False
    for deployment, replica, _, _ in taken:
        facts = {"wanted": deployment.wanted, "needed": _needed(deployment), "missing": holding.missing}
        why = reason("spare", run=run.name, deployment=deployment.name, **facts)
        state.num_replicas[deployment.name] -= 1
        state.decisions.append(DrainReplica(deployment.name, replica.name, why, state.now_s + state.rules.vacate_s))
    return True


def _spare(state: Round) -> list[tuple[Deployment, Replica]]:
    """The replicas above what is needed; the deployments of the lowest priority first, and of each its newest."""
    found = []
    for deployment in sorted(state.snapshot.deployments, key=lambda one: (one.priority, one.name)):
        num_spare = max(0, state.num_replicas[deployment.name] - _needed(deployment))
        staying = [replica for replica in deployment.replicas if replica.state != "draining"]
        found += [(deployment, replica) for replica in staying[::-1][:num_spare]]
    return found


def _start_one(state: Round, deployment: Deployment) -> bool:
    """Start one more replica, or make room for it; False if the deployment gets no further in this round."""
    held = state.num_replicas[deployment.name]
    missing = _needed(deployment) - held
    gpus = weight(deployment.replica)
    over = state.usage.serving_over(deployment.project, gpus)
    if over is not None:
        state.waits.append(Wait(deployment.name, missing, over))
        return False
    options = state.room.options(deployment.replica, deployment.labels, None, False)
    spots, is_coming = state.claim(deployment.name, Demand(options, 1, 1, STRONGEST))
    if spots:
        why = reason("serve", deployment=deployment.name, wanted=deployment.wanted, held=held)
        state.num_granted += 1
        state.decisions.append(StartReplica(deployment.name, state.room.names(spots[0])[0][0], why))
    elif is_coming:
        state.waits.append(Wait(deployment.name, 1, reason("coming", missing=1)))
    else:
        _launch(state, deployment, missing)
        return False
    state.usage.add_serving(deployment.project, gpus)
    return True


def _launch(state: Round, deployment: Deployment, missing: int) -> None:
    """No run can make room: ask for as many nodes as there are."""
    options = state.room.options(deployment.replica, deployment.labels, None, False)
    found = state.launches.promise_some(deployment.name, missing, deployment.replica, deployment.labels)
    if found is not None:
        template, promised = found
        why = reason("launching", missing=promised, template=template.name, start_s=template.start_s)
        state.waits.append(Wait(deployment.name, promised, why))
        missing -= promised
    if missing:
        state.wait_for_room(deployment.name, missing, 1, deployment.replica, deployment.labels, options)
