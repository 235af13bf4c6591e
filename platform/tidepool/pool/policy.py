"""The policy: who holds which GPU, and why. A pure function from a snapshot to a plan."""

from tidepool.messages import Plan, Snapshot
from tidepool.pool.growth import share_the_rest
from tidepool.pool.minimums import meet_minimums
from tidepool.pool.notices import vacate
from tidepool.pool.replicas import serve
from tidepool.pool.reservations import reserve
from tidepool.pool.round import Round
from tidepool.pool.rules import Rules


def decide(snapshot: Snapshot, rules: Rules | None = None) -> Plan:
    """What is to be done now, and who waits for what. If nothing changes, the next round decides nothing."""
    state = Round(snapshot, rules or Rules())
    vacate(state)
    serve(state)
    reserve(state)
    meet_minimums(state)
    share_the_rest(state)
    return Plan((*state.decisions, *state.launches.decisions), tuple(state.waits))
