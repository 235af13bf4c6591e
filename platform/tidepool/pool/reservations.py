"""Reserved GPUs are free when their time comes, for the project's runs alone. Pure.

From one tenure before its start no new claim is met from what a reservation needs; `vacate_s` before its start whoever is
in the way is asked back. What serving needs comes before it.
"""

from tidepool.messages import Reservation, Resources
from tidepool.pool.givers import Demand
from tidepool.pool.minimums import meet, rank
from tidepool.pool.ranking import RESERVED, Power
from tidepool.pool.round import Round

_POWER = Power(RESERVED, 0, 0, 0)


def reserve(state: Round) -> None:
    """Keep free what is reserved, and give it to the runs that it is reserved for."""
    for reservation in state.snapshot.reservations:
        if reservation.starts_s - state.rules.tenure_s <= state.now_s < reservation.ends_s:
            state.givers.forget_failures()
            _keep(state, reservation)


def _keep(state: Round, reservation: Reservation) -> None:
    kind, project = reservation.kind, reservation.project
    own = [holding for holding in state.holdings if holding.run.project == project and kind in holding.options.kinds]
    left = reservation.gpus - sum(holding.num_groups * holding.gpus_per_group for holding in own)
    if state.now_s >= reservation.starts_s:
        for holding in sorted((holding for holding in own if holding.missing), key=lambda holding: rank(state, holding)):
            needed = holding.missing * holding.gpus_per_group
            if needed <= left and meet(state, holding, _POWER, reservation):
                left -= needed
    if left <= 0:
        return
    has_gpus = any(place.gpus for place in state.room.classes if place.kind == kind)
    options = state.room.options(Resources(1, 0) if has_gpus else Resources(0, 1), frozenset(), kind, False)
    if state.now_s >= reservation.starts_s - state.rules.vacate_s:
        spots, is_coming = state.claim(reservation.name, Demand(options, 1, left, _POWER, spares=project))
        if spots or is_coming:
            return
    state.book(options, left)
