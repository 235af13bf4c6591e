"""What one run holds in a round, and in which steps it would give that up. Pure.

Invariants:
- Groups on nodes that are gone or leave soon do not count: the run needs others in their place.
- Groups go newest first; those of a basic run that are on spot nodes go before all others.
- A run above its min gives up what takes it to its next smaller useful size, in one piece: a size in between would not be
  faster. Each further piece costs at least as much as the one before.
"""

from dataclasses import dataclass
from math import log

from tidepool.messages import Group, Run
from tidepool.pool.room import Options
from tidepool.pool.rules import Rules
from tidepool.pool.speed import speed_at, useful_sizes


@dataclass(slots=True)
class Holding:
    """One run in one round. `groups` are those that stay, `num_groups` also counts what it was granted since.

    `gpus_per_group` is what a group counts for against a quota: its CPUs if it has no GPUs.
    """

    run: Run
    options: Options
    units: list[int]
    groups: list[Group]
    closing: list[Group]
    num_groups: int
    gpus_per_group: int
    num_in_pieces: int = 0
    is_paused: bool = False
    was_granted: bool = False
    is_coming: bool = False
    gathers: bool = False

    @property
    def missing(self) -> int:
        """Groups short of the min."""
        short = self.run.min_groups - self.num_groups
        return short if short > 0 else 0


@dataclass(slots=True)
class Piece:
    """Groups that a run would give up together, for a `loss` in weighted log speed, `cost` per unit.

    `smaller` is the size after it; a whole run (`smaller` 0) has no cost: rank decides.
    """

    holding: Holding
    groups: tuple[Group, ...]
    smaller: int
    cost: float
    loss: float
    newest_s: float
    is_released: bool = False


def removal_order(holding: Holding, spot_nodes: frozenset[str]) -> list[Group]:
    """The groups in the order in which they would go."""

    def key(group: Group) -> tuple[bool, float, str]:
        on_spot = holding.run.tier == "basic" and any(node in spot_nodes for node, _ in group.places)
        return on_spot, group.granted_s, group.name

    if len(holding.groups) < 2:
        return holding.groups
    return sorted(holding.groups, key=key, reverse=True)


def cut(holding: Holding, spot_nodes: frozenset[str], rules: Rules) -> list[Piece]:
    """The pieces above the min, in the order in which they would go."""
    run = holding.run
    size = len(holding.groups)
    if size <= run.min_groups:
        return []
    order = removal_order(holding, spot_nodes)
    weight = rules.weights[run.tier]
    pieces: list[Piece] = []
    cost, speed = 0.0, speed_at(run, size)
    for smaller, slower in reversed(useful_sizes(run)):
        if smaller >= size:
            continue
        groups = tuple(order[len(holding.groups) - size : len(holding.groups) - smaller])
        units = (size - smaller) * holding.gpus_per_group
        cost = max(cost, weight * log(max(1.0, speed / slower)) / units)
        pieces.append(Piece(holding, groups, smaller, cost, cost * units, max(group.granted_s for group in groups)))
        size, speed = smaller, slower
    holding.num_in_pieces = len(holding.groups) - size
    return pieces


def rest(holding: Holding, spot_nodes: frozenset[str]) -> Piece:
    """All that the run holds at its min, as one piece."""
    order = removal_order(holding, spot_nodes)
    groups = tuple(order[holding.num_in_pieces :])
    return Piece(holding, groups, 0, 0.0, 0.0, max((group.granted_s for group in groups), default=0.0))
