"""Serving comes first: the replicas that Serve wants get a place before any run does, up to the quota. Pure."""

from heapq import heapify, heappop, heappush

from tidepool.messages import Deployment, StartReplica, Wait
from tidepool.pool.givers import Demand
from tidepool.pool.ranking import STRONGEST
from tidepool.pool.reasons import reason
from tidepool.pool.round import Round, weight


def serve(state: Round) -> None:
    """Start replicas: by priority, then where the smallest part of what is wanted is there."""
    counts = state.num_replicas
    short = [(-d.priority, counts[d.name] / d.wanted, d.name, d) for d in state.snapshot.deployments if counts[d.name] < d.wanted]
    heapify(short)
    while short and not state.is_full:
        _, _, name, deployment = heappop(short)
        if _start_one(state, deployment):
            counts[name] += 1
            if counts[name] < deployment.wanted:
                heappush(short, (-deployment.priority, counts[name] / deployment.wanted, name, deployment))
    for *_, name, deployment in short:
        state.wait_for_next_round(name, deployment.wanted - counts[name])


def _start_one(state: Round, deployment: Deployment) -> bool:
    """Start one more replica, or make room for it; False if the deployment gets no further in this round."""
    held = state.num_replicas[deployment.name]
    missing = deployment.wanted - held
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
