"""Nodes that are gone or leave: what is on them is asked back in time. Pure.

Its place elsewhere is claimed as soon as the notice is known, since what is on such a node does not count as held.
"""

from tidepool.messages import AskBack, DrainReplica, Reason
from tidepool.pool.reasons import reason
from tidepool.pool.round import Round


def vacate(state: Round) -> None:
    """Ask back what is on nodes that are gone, or leave so soon that the time is needed."""
    for holding in state.holdings:
        for group in holding.closing:
            found = _must_leave(state, [node for node, _ in group.places])
            if found is not None:
                why, deadline_s = found
                state.decisions.append(AskBack(holding.run.name, group.name, why, deadline_s))
    if not state.room.has_notices:
        return
    for deployment in state.snapshot.deployments:
        for replica in deployment.replicas:
            found = _must_leave(state, [replica.node]) if replica.state != "draining" else None
            if found is not None and found[1] is not None:
                state.decisions.append(DrainReplica(deployment.name, replica.name, found[0], found[1]))


def _must_leave(state: Round, names: list[str]) -> tuple[Reason, float | None] | None:
    """Why a gang on these nodes must leave now, and by when; None if it need not yet."""
    notices: list[tuple[float, str]] = []
    for name in names:
        number = state.room.number_of.get(name)
        if number is None:
            return reason("gone", node=name), None
        leaves_at_s = state.snapshot.nodes[number].leaves_at_s
        if leaves_at_s is not None:
            notices.append((leaves_at_s, name))
    if not notices:
        return None
    leaves_at_s, name = min(notices)
    node = state.snapshot.nodes[state.room.number_of[name]]
    if node.quarantine:
        return reason("quarantine", node=name, why=node.quarantine), leaves_at_s
    if state.now_s < leaves_at_s - state.rules.vacate_s:
        return None
    return reason("notice", node=name, left_s=leaves_at_s - state.now_s, vacate_s=state.rules.vacate_s), leaves_at_s
