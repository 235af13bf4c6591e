"""The state of one round: what is held, what has been promised so far, and how a claim is met. Pure.

Invariants:
- No unit of a node is granted twice, nor while somebody else still holds it: a claim whose room must first be made waits,
  and the groups asked back for it name it.
- What one claim was promised, idle or coming, no later claim of the round gets.
"""

from functools import cached_property
from typing import NamedTuple

from tidepool.messages import AskBack, Decision, Deployment, Reason, Resources, Run, Snapshot, Wait
from tidepool.pool.givers import Demand, Givers
from tidepool.pool.holding import Holding, Piece
from tidepool.pool.launches import Launches
from tidepool.pool.ranking import power
from tidepool.pool.reasons import rank_words, reason
from tidepool.pool.room import Options, Room, Spot
from tidepool.pool.rules import Rules
from tidepool.pool.speed import speed_at
from tidepool.pool.usage import Usage


class Claimed(NamedTuple):
    """Places that are free now; or, without any, whether they are coming."""

    spots: list[Spot]
    is_coming: bool


class Round:
    """The state of one round."""

    def __init__(self, snapshot: Snapshot, rules: Rules) -> None:
        self.snapshot = snapshot
        self.now_s = snapshot.now_s
        self.rules = rules
        self.room = Room(snapshot.nodes)
        self.usage = Usage(snapshot.quotas)
        self.launches = Launches(snapshot.templates)
        self.decisions: list[Decision] = []
        self.waits: list[Wait] = []
        self.giving: set[str] = set()
        self.gathering: set[int] = set()  # the standings of runs that what comes free is kept for
        self.num_granted = 0
        self.num_replicas = {deployment.name: self._count_replicas(deployment) for deployment in snapshot.deployments}
        self.room.fix()
        self.holdings = [self._hold(run) for run in snapshot.runs]
        self.room.settle()
        self.givers = Givers(self.room, self.holdings, self.now_s, rules)
        self._idle_slots: dict[int, tuple[int, int]] = {}
        self._no_room: dict[tuple[int, int, int], Reason] = {}

    def _count_replicas(self, deployment: Deployment) -> int:
        self.usage.add_serving(deployment.project, len(deployment.replicas) * weight(deployment.replica))
        return self.room.hold_replicas(deployment.replicas, self.room.units(deployment.replica))

    def _hold(self, run: Run) -> Holding:
        room, worker = self.room, run.worker
        units = room.units(worker)
        staying, closing, num_leaving = room.hold(run.groups, units) if run.groups else ([], [], 0)
        kind = run.kind
        if kind is None and staying:
            kind = room.classes[room.all_class_of[room.number_of[staying[0].places[0][0]]]].kind
        options = room.options(worker, run.labels, kind, run.tier == "basic")
        gpus = run.workers_per_group * (worker.gpus or worker.cpus)
        if self.snapshot.quotas:
            self.usage.add_training(run.project, len(run.groups) * gpus, num_leaving * gpus)
        return Holding(run, options, units, staying, closing, len(staying), gpus)

    @cached_property
    def is_overpromised(self) -> bool:
        """Whether the mins of all runs that are guaranteed something are more than the pool could hold besides serving."""
        guaranteed = {tier for tier, part in self.rules.guarantees.items() if part > 0}
        promised = [0, 0]
        for holding in self.holdings:
            if holding.run.tier in guaranteed:
                promised[holding.run.worker.gpus > 0] += holding.run.min_groups * holding.gpus_per_group
        return any(wanted > there for wanted, there in zip(promised, self.room.capacity(), strict=True))

    def fix_kind(self, holding: Holding, spot: Spot) -> None:
        """From its first group on, a run stays on one kind of nodes."""
        run = holding.run
        kind = self.room.classes[self.room.all_class_of[spot[0][0]]].kind
        holding.options = self.room.options(run.worker, run.labels, kind, run.tier == "basic")

    @property
    def is_full(self) -> bool:
        """Whether the round has granted as much as one round may; the next one goes on."""
        return self.num_granted >= self.rules.max_grants

    def wait_for_next_round(self, name: str, missing: int) -> None:
        """Say that the round is full."""
        self.waits.append(Wait(name, missing, reason("next_round", num_granted=self.num_granted, most=self.rules.max_grants)))

    # --- Claims ------------------------------------------------------------------------------------------------------

    def claim(self, claimant: str, demand: Demand, run: Run | None = None) -> Claimed:
        """Take idle room; else room that is coming; else ask for room, if that is possible. `run` is the claimant, if it is one."""
        groups, workers, options = demand.groups, demand.workers, demand.options
        if self.givers.has_failed(demand):
            return Claimed([], False)
        if spots := self.room.take(self.room.idle, options, groups, workers):
            return Claimed(spots, False)
        if self.room.take(self.room.soon, options, groups, workers):
            return Claimed([], True)
        pieces = self.givers.make_room(demand)
        if pieces is None:
            return Claimed([], False)
        for piece in pieces:
            self._ask_back(piece, claimant, demand, run)
        return Claimed([], True)

    def ask_back_for_quota(self, piece: Piece, claimant: str) -> None:
        """Ask a run for a released piece, so that its project stays within its quota."""
        run = piece.holding.run
        sizes = {"held": piece.holding.num_groups, "smaller": piece.holding.num_groups - len(piece.groups)}
        quota = self.usage.training_quota(run.project)
        self._give(piece, reason("project", claimant=claimant, project=run.project, quota=quota, run=run.name, **sizes))

    def _ask_back(self, piece: Piece, claimant: str, demand: Demand, claiming: Run | None) -> None:
        holding, run = piece.holding, piece.holding.run
        facts: dict[str, object] = {"claimant": claimant, "run": run.name}
        if holding.is_paused:
            own = rank_words(power(run, True, self.now_s, self.rules), run, self.now_s)
            claimant_rank = rank_words(demand.power, claiming, self.now_s)
            self._give(piece, reason("pause", **facts, claimant_rank=claimant_rank, rank=own, tenure_s=self.now_s - run.started_s))
            return
        held, smaller = holding.num_groups, holding.num_groups - len(piece.groups)
        facts |= {"held": held, "smaller": smaller, "min": run.min_groups}
        if demand.is_rebalancing:
            ratio = self.rules.rebalance_ratio
            self._give(piece, reason("rebalance", **facts, gain=demand.max_cost * ratio, ratio=ratio, cost=piece.cost))
        else:
            self._give(piece, reason("shrink", **facts, slowdown=1 - speed_at(run, smaller) / speed_at(run, held)))

    def _give(self, piece: Piece, why: Reason) -> None:
        holding = piece.holding
        holding.num_groups = 0 if holding.is_paused else holding.num_groups - len(piece.groups)
        self.giving.add(holding.run.name)
        self.decisions += [AskBack(holding.run.name, group.name, why) for group in piece.groups]

    def book(self, options: Options, workers: int) -> None:
        """Keep what there is on nodes of one kind, idle or coming, for up to so many workers, from everyone who comes later."""
        if options.classes and (slots := min(workers, self.room.soon.slots(options.classes[0]))):
            self.room.take(self.room.soon, options, 1, slots)

    def wait_for_room(self, name: str, missing: int, workers: int, worker: Resources, labels: frozenset[str], options: Options) -> None:
        """Say why there is no room."""
        if not options.classes and not self.launches.could_fit(worker, labels, None):
            why = reason("no_node", gpus=worker.gpus, cpus=worker.cpus, labels=", ".join(sorted(labels)))
        else:
            facts = missing, workers, self._num_idle(options)
            if facts not in self._no_room:
                self._no_room[facts] = reason("no_room", missing=missing, workers=workers, idle=facts[2])
            why = self._no_room[facts]
        self.waits.append(Wait(name, missing, why))

    def _num_idle(self, options: Options) -> int:
        version, slots = self._idle_slots.get(id(options), (-1, 0))
        if version != self.room.idle.version:
            version = self.room.idle.version
            slots = max((self.room.idle.slots(classes) for classes in options.classes), default=0)
            self._idle_slots[id(options)] = version, slots
        return slots


def weight(worker: Resources) -> int:
    """What a worker or replica counts for against a quota."""
    return worker.gpus or worker.cpus
