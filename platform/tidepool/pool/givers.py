"""Whose groups make room for a claim: the cheapest that do. Pure, within one round.

First go the pieces that runs hold above their min, by what the loss costs per unit (see `holding`). Only if those are not
enough, and the claim may, whole runs are paused, the lowest rank first, of equals the one that started last. Pieces are
released in that order until the claim fits; then each that turns out not to be needed is given back, the dearest first. So
the dearest piece that goes is as cheap as can be.

Invariants:
- A claim that cannot be met takes nothing.
- A run is paused only by `may_pause`, and then gives up all that it holds; it never holds less than its min otherwise.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum
from operator import itemgetter
from typing import NamedTuple

from tidepool.pool.holding import Holding, Piece, cut, rest
from tidepool.pool.ranking import Power, may_pause, power
from tidepool.pool.room import Options, Room
from tidepool.pool.rules import Rules

_BY_RANK = itemgetter(0, 1, 2)


class Pauses(IntEnum):
    """Whom a demand may pause, if `may_pause` lets it: nobody, runs of tiers without a guarantee, or runs of any tier."""

    NOBODY = 0
    UNGUARANTEED = 1
    ANYBODY = 2


class Demand(NamedTuple):
    """What a claim asks for: `groups` gangs of `workers` at one of `options`, with the claimant's power.

    `max_cost` bounds what a piece may cost per unit, `total_cost` what all of them may cost together; `spares` is a
    project whose runs give nothing. For rebalancing only groups older than a tenure go. `after_tenures` asks what would be
    if nobody were in a tenure; `is_overpromised` says that not all guarantees can be kept.
    """

    options: Options
    groups: int
    workers: int
    power: Power
    pauses: Pauses = Pauses.ANYBODY
    max_cost: float = float("inf")
    total_cost: float = float("inf")
    is_rebalancing: bool = False
    spares: str | None = None
    after_tenures: bool = False
    is_overpromised: bool = False


class Givers:
    """All that runs could give up in a round."""

    def __init__(self, room: Room, holdings: Sequence[Holding], now_s: float, rules: Rules) -> None:
        self._room = room
        self._holdings = holdings
        self._now_s = now_s
        self._rules = rules
        self._spot_nodes = frozenset(node.name for node in room.nodes if node.is_spot)
        self._surplus: list[Piece] | None = None
        self._whole: list[tuple[Power, float, str, Holding]] | None = None
        self._rests: dict[str, Piece] = {}
        self._failed: dict[tuple[int, Pauses, bool], int] = {}

    def make_room(self, demand: Demand) -> list[Piece] | None:
        """Take room for the demand in what is free soon, and say which pieces must go for it; None if there is no way."""
        total = demand.groups * demand.workers
        released = self._release(demand, total)
        if released is None:
            self._failed[id(demand.options), demand.pauses, demand.after_tenures] = total
            return None
        taken = self._room.take(self._room.soon, demand.options, demand.groups, demand.workers)
        assert taken is not None
        self._failed.clear()
        return self._needed(released)

    def would_make_room(self, demand: Demand) -> Options | None:
        """On which kind there will be room for the demand when tenures are over, if nobody else takes it. Nothing is taken."""
        demand = demand._replace(after_tenures=True)
        if self.has_failed(demand):
            return None
        total = demand.groups * demand.workers
        released = self._release(demand, total)
        if released is None:
            self._failed[id(demand.options), demand.pauses, demand.after_tenures] = total
            return None
        for piece in reversed(released):
            self.take_back(piece)
        position = demand.options.kinds.index(self._kind(released[-1]))
        return Options(demand.options.kinds[position : position + 1], demand.options.classes[position : position + 1])

    def has_failed(self, demand: Demand) -> bool:
        """Whether as small a demand, of somebody who could take at least as much, has failed before."""
        return self.has_failed_for(demand.options, demand.groups * demand.workers, demand.pauses, demand.after_tenures)

    def has_failed_for(self, options: Options, total: int, pauses: Pauses = Pauses.NOBODY, after_tenures: bool = False) -> bool:
        """The same of so many workers at these options."""
        return total >= self._failed.get((id(options), pauses, after_tenures), total + 1)

    def forget_failures(self) -> None:
        """Demands that may take from others follow: what failed before may succeed."""
        self._failed.clear()

    def surplus_of(self, project: str) -> Iterator[Piece]:
        """The pieces above the min of a project's runs, the cheapest first."""
        return (piece for piece in self._pieces() if piece.holding.run.project == project and self._can_give(piece))

    def release(self, piece: Piece) -> None:
        """Count a piece as coming."""
        piece.is_released = True
        for node, units in self._footprint(piece):
            self._room.soon.change(node, units)

    def _release(self, demand: Demand, total: int) -> list[Piece] | None:
        """Release pieces until the demand fits; all back and None if it does not."""
        room = self._room
        short = [total - room.soon.slots(classes) for classes in demand.options.classes]
        units = [{choice.number: choice.units for choice in classes} for classes in demand.options.classes]
        kinds = {kind: position for position, kind in enumerate(demand.options.kinds)}
        released: list[Piece] = []
        for piece in self._candidates(demand):
            position = kinds.get(self._kind(piece))
            if position is None:
                continue
            piece.is_released = True
            released.append(piece)
            each = units[position]
            for node, freed in self._footprint(piece):
                per_worker = each.get(room.all_class_of[node])
                before = room.soon.free[node]
                room.soon.change(node, freed)
                if per_worker:
                    short[position] -= room.soon.free[node] // per_worker - before // per_worker
            if short[position] <= 0 and sum(piece.loss for piece in released) <= demand.total_cost:
                return released
            if short[position] <= 0:
                break
        for piece in reversed(released):
            self.take_back(piece)
        return None

    def _needed(self, released: list[Piece]) -> list[Piece]:
        """Give back what the claim did not need."""
        kept: list[Piece] = []
        paused: set[str] = set()
        for piece in reversed(released):
            footprint = self._footprint(piece)
            name = piece.holding.run.name
            if name not in paused and all(self._room.soon.free[node] >= units for node, units in footprint):
                self.take_back(piece)
                continue
            kept.append(piece)
            if piece.smaller == 0:
                paused.add(name)
                piece.holding.is_paused = True
        return kept[::-1]

    def take_back(self, piece: Piece) -> None:
        """Count a released piece as held again."""
        piece.is_released = False
        for node, units in self._footprint(piece):
            self._room.use(self._room.soon, node, units)

    def _candidates(self, demand: Demand) -> Iterator[Piece]:
        for piece in self._pieces():
            if piece.cost > demand.max_cost:
                break
            if not self._can_give(piece) or piece.holding.run.project == demand.spares:
                continue
            if demand.is_rebalancing and self._now_s - piece.newest_s < self._rules.tenure_s:
                continue
            yield piece
        if demand.pauses is Pauses.NOBODY:
            return
        for own, _, name, holding in self._whole_runs():
            if own <= demand.power:
                break
            run = holding.run
            if demand.pauses is Pauses.UNGUARANTEED and self._rules.guarantees[run.tier] > 0:
                continue
            if holding.is_paused or run.project == demand.spares:
                continue
            after, over = demand.after_tenures, demand.is_overpromised
            if may_pause(demand.power, own, run, self._now_s, self._rules, after_tenure=after, is_overpromised=over):
                if name not in self._rests:
                    self._rests[name] = rest(holding, self._spot_nodes)
                yield self._rests[name]

    @staticmethod
    def _can_give(piece: Piece) -> bool:
        holding = piece.holding
        return not piece.is_released and not holding.is_paused and not holding.was_granted and not holding.is_coming

    def _pieces(self) -> list[Piece]:
        if self._surplus is None:
            pieces = [piece for holding in self._holdings for piece in cut(holding, self._spot_nodes, self._rules)]
            self._surplus = sorted(pieces, key=lambda piece: (piece.cost, -piece.newest_s, piece.holding.run.name, -piece.smaller))
        return self._surplus

    def _whole_runs(self) -> list[tuple[Power, float, str, Holding]]:
        """The runs that hold their min, the lowest rank first; what they hold at it is what their pieces leave."""
        if self._whole is None:
            now_s, rules = self._now_s, self._rules
            self._whole = [
                (power(holding.run, True, now_s, rules), holding.run.started_s, holding.run.name, holding)
                for holding in self._holdings
                if len(holding.groups) >= holding.run.min_groups
            ]
            self._whole.sort(key=_BY_RANK, reverse=True)
        return self._whole

    def _kind(self, piece: Piece) -> str:
        node = self._room.number_of[piece.groups[0].places[0][0]]
        return self._room.classes[self._room.all_class_of[node]].kind

    def _footprint(self, piece: Piece) -> list[tuple[int, int]]:
        """Units by node."""
        room = self._room
        total: dict[int, int] = {}
        for group in piece.groups:
            for name, workers in group.places:
                node = room.number_of[name]
                total[node] = total.get(node, 0) + workers * piece.holding.units[room.all_class_of[node]]
        return list(total.items())
