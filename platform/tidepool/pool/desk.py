"""The arbiter's mind: what runs, deployments and the cluster said last, and what is answered to them. Pure: no Ray, no clock.

All that comes in says how things are, not how they have changed; so whatever is lost on the way comes again. A desk that starts
anew knows nothing, and learns all from the reports: runs carry their groups, their grants and their account.

Invariants:
- A desk decides nothing before it has heard of every run that has a driver (or for `LISTEN_S`): who holds a place counts.
- A grant is repeated until the run reports the group; from the decision on, its place is taken.
- What others hold on a node, of whom the desk knows nothing, is no room. It is looked at while nothing comes or goes there.
- Groups start only where no replica of Serve's that traffic needs could go: the policy serves first, in every round anew.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from tidepool.messages import (
    Account,
    AskBack,
    ClusterView,
    Deployment,
    DrainReplica,
    Grant,
    GrantGroup,
    Group,
    LaunchNodes,
    Node,
    Places,
    Plan,
    Quota,
    Reason,
    Replica,
    ReplicaActor,
    Resources,
    Run,
    RunReport,
    Snapshot,
    Standing,
    StartReplica,
    Wait,
)
from tidepool.pool.admission import held_back, without_quarantined
from tidepool.pool.bookkeeping import change, count_on, new_account
from tidepool.pool.policy import decide
from tidepool.pool.rules import Rules

LISTEN_S = 5.0
SILENT_S = 5.0
"""A run whose driver has said nothing for so long, and that Ray knows no driver of, is gone."""
_WISH_S = 15.0
"""A deployment's wish holds for so long. Then as many replicas are wanted as Serve has asked for."""
_COMING_S = 30.0
"""So long after a replica was wanted, what is held and nobody's may be its own."""
_NOTHING = Resources(0, 0)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a deployment that scales said last. `needed`: what the traffic of this moment needs."""

    project: str
    priority: int
    replica: Resources
    wanted: int
    needed: int
    heard_s: float


@dataclass(slots=True)
class _Known:
    """A run, as it was heard of last."""

    report: RunReport
    heard_s: float
    account: Account
    priority: int
    grants: dict[str, tuple[Grant, Group]] = field(default_factory=dict)
    leaving: dict[str, str] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[Group, ...]:
        """What it has, and what it has been granted."""
        reported = tuple(replace(group, leaving=group.leaving or group.name in self.leaving) for group in self.report.groups)
        return (*reported, *(group for _, group in self.grants.values()))

    @property
    def num_staying(self) -> int:
        """The groups that have not been asked back."""
        return sum(not group.leaving for group in self.groups)

    @property
    def gpus_per_group(self) -> int:
        """GPUs of a group; CPUs where it has none."""
        worker = self.report.worker
        return self.report.workers_per_group * (worker.gpus or worker.cpus)


class Desk:
    """See the module's docstring. `epoch` makes the names of its grants its own; times are seconds since 1970."""

    def __init__(self, rules: Rules, epoch: str, now_s: float) -> None:
        self._rules, self._epoch, self._since_s = rules, epoch, now_s
        self._num_granted = 0
        self._has_decided = False
        self._runs: dict[str, _Known] = {}
        self._wishes: dict[str, Wish] = {}
        self._view = ClusterView((), {})
        self._others: dict[str, Resources] = {}
        self._unplaced: dict[str, float] = {}
        """Since when these replicas have had no node, as far as Ray says."""
        self.quotas: tuple[Quota, ...] = ()
        self.quarantined: Mapping[str, str] = {}
        """Why nobody is to be on these nodes."""
        self.unchecked: frozenset[str] = frozenset()
        """Nodes that have joined and that nobody is to come to before their check."""
        self._plan = Plan()
        self._allowed: dict[str, int] = {}
        self.snapshot = Snapshot(now_s, ())

    # --- What is said ---------------------------------------------------------------------------------------------------

    def see_cluster(self, view: ClusterView, now_s: float) -> None:
        """Take in what Ray says."""
        self._unplaced = {one.name: self._unplaced.get(one.name, now_s) for one in view.replicas if not one.node}
        new = {name for name, since_s in self._unplaced.items() if now_s - since_s < _COMING_S}
        self._view = view = seated(view, self._runs.values(), self._others, new)
        for run, known in list(self._runs.items()):
            if run not in view.runs and now_s - known.heard_s > SILENT_S:
                del self._runs[run]
        self._wishes = {name: wish for name, wish in self._wishes.items() if now_s - wish.heard_s <= _WISH_S}
        self._others = others(view, self._runs.values(), self._others)

    def see_run(self, report: RunReport, now_s: float) -> bool:
        """Take a driver's report in; returns whether it says anything new."""
        known = self._runs.get(report.run)
        if known is not None and report.session < known.report.session:
            return False
        if known is None or report.session > known.report.session:
            account = report.account or (self._counted(known, 0, now_s) if known else new_account(now_s))
            self._runs[report.run] = _Known(report, now_s, account, report.priority)
            return True
        is_new = replace(known.report, account=None) != replace(report, account=None)
        had = known.num_staying
        known.report, known.heard_s = report, now_s
        names = {group.name for group in report.groups}
        known.grants = {name: grant for name, grant in known.grants.items() if name not in names}
        known.leaving = {name: why for name, why in known.leaving.items() if name in names}
        self._note_change(known, had, now_s)
        return is_new

    def see_wish(self, deployment: str, wish: Wish) -> bool:
        """Take in what a deployment wants; returns whether it is anything new."""
        before = self._wishes.get(deployment)
        self._wishes[deployment] = wish
        return before is None or replace(before, heard_s=wish.heard_s) != wish

    def forget(self, run: str, session: int) -> None:
        """A run has left the cluster."""
        known = self._runs.get(run)
        if known is not None and known.report.session == session:
            del self._runs[run]

    def set_priority(self, run: str, priority: int) -> bool:
        """Give a run another priority, which it carries from now on; returns whether it is known."""
        if known := self._runs.get(run):
            known.priority = priority
        return known is not None

    # --- What is decided ------------------------------------------------------------------------------------------------

    def is_ready(self, now_s: float) -> bool:
        """Whether it knows enough to decide."""
        return bool(self._view.nodes) and (self._view.runs <= self._runs.keys() or now_s - self._since_s > LISTEN_S)

    def decide(self, now_s: float) -> bool:
        """Decide anew, if that may be; returns whether anybody is to be told anything."""
        if not self.is_ready(now_s):
            return False
        if not self._has_decided:  # what was seen before runs had said what they hold looked like others'
            self._others = others(self._view, self._runs.values(), {})
            self._has_decided = True
        self.snapshot = self._snapshot(now_s)
        self._plan = decide(self.snapshot, self._rules)
        num_drained: dict[str, int] = {}
        num_started: dict[str, int] = {}
        had = {name: known.num_staying for name, known in self._runs.items()}
        gave: set[str] = set()
        for decision in self._plan.decisions:
            match decision:
                case GrantGroup(run, places, why):
                    self._grant(self._runs[run], places, str(why), now_s)
                case AskBack(run, group, why):
                    known = self._runs[run]
                    if known.grants.pop(group, None) is None:  # else it has not begun, and never will
                        known.leaving[group] = str(why)
                    if why.rule == "rebalance":
                        gave.add(run)
                case StartReplica(deployment, _, _):
                    num_started[deployment] = num_started.get(deployment, 0) + 1
                case DrainReplica(deployment, _, Reason("spare"), _):  # Serve itself moves those of nodes that leave
                    num_drained[deployment] = num_drained.get(deployment, 0) + 1
        for name, known in self._runs.items():
            self._note_change(known, had[name], now_s, name in gave)
        before, self._allowed = self._allowed, {}
        for one in self.snapshot.deployments:
            there = len(one.replicas) + num_started.get(one.name, 0) - num_drained.get(one.name, 0)
            self._allowed[one.name] = min(one.wanted, there)
        return before != self._allowed or any(isinstance(one, GrantGroup | AskBack) for one in self._plan.decisions)

    def _grant(self, known: _Known, places: Places, why: str, now_s: float) -> None:
        self._num_granted += 1
        name = f"{self._epoch}-{self._num_granted}"
        known.grants[name] = Grant(name, places, why), Group(name, places, now_s)
        if known.account.kind is None:
            kinds = {node.name: node.kind for node in self._view.nodes}
            known.account = replace(known.account, kind=kinds.get(places[0][0]))

    def _note_change(self, known: _Known, had: int, now_s: float, gave: bool = False) -> None:
        if known.num_staying != had:
            known.account = self._counted(known, known.num_staying, now_s, had, gave)

    def _counted(self, known: _Known, has: int, now_s: float, had: int | None = None, gave: bool = False) -> Account:
        """The account of a run that has `has` groups from now on, and had `had` (None: what is known) until now."""
        had, least = known.num_staying if had is None else had, known.report.min_groups
        account = count_on(known.account, had, least, known.gpus_per_group, now_s, self._rules.window_s)
        return change(account, had, has, least, now_s, gave)

    # --- What is answered -----------------------------------------------------------------------------------------------

    def standing(self, run: str, session: int | None = None) -> Standing | None:
        """What a run's driver is to know and to do; None of a run that is not known, or by another driver than that of `session`."""
        known = self._runs.get(run)
        if known is None or session not in {None, known.report.session}:
            return None
        queue = [wait for wait in self._plan.waits if wait.name in self._runs]
        place = next((place for place, wait in enumerate(queue, 1) if wait.name == run), None)
        grants = tuple(grant for grant, _ in known.grants.values())
        why = str(queue[place - 1].reason) if place else ""
        return Standing(grants, tuple(known.leaving.items()), known.account, known.priority, place, len(queue), why)

    def allowed(self, deployment: str) -> int | None:
        """How many replicas a deployment may have now; None of one that nothing was decided about."""
        return self._allowed.get(deployment)

    @property
    def view(self) -> ClusterView:
        """What was seen of the cluster last."""
        return self._view

    @property
    def launches(self) -> tuple[LaunchNodes, ...]:
        """The nodes that the cluster is to be asked for."""
        return tuple(decision for decision in self._plan.decisions if isinstance(decision, LaunchNodes))

    @property
    def waits(self) -> tuple[Wait, ...]:
        """Who waits for what, and why, in the order in which they come."""
        return self._plan.waits

    @property
    def reports(self) -> tuple[RunReport, ...]:
        """The newest of each run."""
        return tuple(known.report for known in self._runs.values())

    @property
    def used_nodes(self) -> frozenset[str]:
        """The nodes on which a group or a replica is, or shall be."""
        groups = {node for known in self._runs.values() for group in known.groups for node, _ in group.places}
        return frozenset(groups | {replica.node for replica in self._view.replicas if replica.node})

    # --- The snapshot ---------------------------------------------------------------------------------------------------

    def _snapshot(self, now_s: float) -> Snapshot:
        taken = dict(self._others)
        runs = []
        for known in self._runs.values():
            if known.report.max_groups > 0:
                runs.append(_run(known))
                continue
            for group in known.groups:  # of a run that leaves: nobody's yet
                _add(taken, group.places, known.report.worker)
        nodes, starting = held_back(without_quarantined(self._view.nodes, self.quarantined, now_s), self.unchecked)
        nodes = tuple(_rest_of(node, taken.get(node.name)) for node in nodes)
        templates = (*self._view.templates, *starting)
        return Snapshot(now_s, nodes, self._deployments(), tuple(runs), quotas=self.quotas, templates=templates)

    def _deployments(self) -> tuple[Deployment, ...]:
        actors: dict[str, list[ReplicaActor]] = {}
        for actor in self._view.replicas:
            actors.setdefault(deployment_name(actor.application, actor.deployment), []).append(actor)
        found = []
        for name in sorted(actors.keys() | self._wishes.keys()):
            wish, there = self._wishes.get(name), actors.get(name, [])
            placed = tuple(Replica(one.name, one.node, "running" if one.is_alive else "starting") for one in there if one.node)
            if wish is None:  # as many as Serve has asked for; those that wait for a place are to get one
                found.append(Deployment(name, "default", len(there), there[0].resources, placed))
            else:
                found.append(Deployment(name, wish.project, wish.wanted, wish.replica, placed, wish.priority, needed=wish.needed))
        return tuple(found)


def deployment_name(application: str, deployment: str) -> str:
    """By which the policy knows a deployment."""
    return f"{application}/{deployment}"


def _run(known: _Known) -> Run:
    report, account = known.report, known.account
    return Run(
        report.run,
        report.project,
        min(report.min_groups, report.max_groups),
        report.max_groups,
        report.shards,
        account.submitted_s,
        report.tier,
        known.priority,
        report.workers_per_group,
        report.worker,
        report.labels,
        account.kind,
        groups=known.groups,
        waiting_since_s=account.waiting_since_s,
        started_s=account.started_s,
        resized_s=account.resized_s,
        held_s=account.held_s,
        used_gpu_s=account.used_gpu_s,
        as_of_s=account.as_of_s,
    )


def seated(view: ClusterView, runs: Iterable[_Known], others: Mapping[str, Resources], new: Collection[str]) -> ClusterView:
    """What Ray says, with the new replicas on the nodes that they have a place on, which Ray names only once their process runs.

    That is seconds later. So what is held on a node beyond all that is known (of `others`, too) is theirs.
    """
    held = dict(others)
    for known in runs:
        for group in known.groups:
            _add(held, group.places, known.report.worker)
    for replica in view.replicas:
        if replica.node:
            _add(held, ((replica.node, 1),), replica.resources)
    left = {node.name: _left(node, view.free.get(node.name, _NOTHING), held.get(node.name, _NOTHING)) for node in view.nodes}
    nodes: dict[str, str] = {}
    for replica in view.replicas:
        needs = replica.resources
        fits = (node for node, one in left.items() if one.gpus >= needs.gpus and one.cpus >= needs.cpus)
        if replica.name in new and (node := next(fits, None)) is not None:
            left[node] = Resources(left[node].gpus - needs.gpus, left[node].cpus - needs.cpus)
            nodes[replica.name] = node
    return replace(view, replicas=tuple(replace(one, node=nodes.get(one.name, one.node)) for one in view.replicas))


def others(view: ClusterView, runs: Iterable[_Known], before: Mapping[str, Resources]) -> dict[str, Resources]:
    """What is held on each node by those of whom the pool knows nothing.

    Ray's accounts lag behind what starts: of that it may have counted any part. So what was known `before` counts, as far as it
    is not more than Ray has given out besides what has settled, nor less than what is left if all of ours were counted.
    """
    ours: dict[str, Resources] = {}
    settled: dict[str, Resources] = {}
    for known in runs:
        for group in known.groups:
            _add(ours, group.places, known.report.worker)
            if group.name in known.report.settled and not group.leaving:
                _add(settled, group.places, known.report.worker)
    for replica in view.replicas:
        if replica.node:
            _add(ours, ((replica.node, 1),), replica.resources)
            if replica.is_alive:
                _add(settled, ((replica.node, 1),), replica.resources)
    found = {}
    for node in view.nodes:
        free = view.free.get(node.name, Resources(node.gpus, node.cpus))
        least, most = (_left(node, free, held.get(node.name, _NOTHING)) for held in (ours, settled))
        known_before = before.get(node.name, least)
        gpus = min(max(known_before.gpus, least.gpus), most.gpus)
        found[node.name] = Resources(gpus, min(max(known_before.cpus, least.cpus), most.cpus))
    return found


def _rest_of(node: Node, taken: Resources | None) -> Node:
    """The node without what others hold of it."""
    if taken is None:
        return node
    return replace(node, gpus=max(0, node.gpus - taken.gpus), cpus=max(0, node.cpus - taken.cpus))


def _left(node: Node, free: Resources, held: Resources) -> Resources:
    return Resources(max(0, node.gpus - free.gpus - held.gpus), max(0, node.cpus - free.cpus - held.cpus))


def _add(taken: dict[str, Resources], places: Places, worker: Resources) -> None:
    for node, workers in places:
        before = taken.get(node, _NOTHING)
        taken[node] = Resources(before.gpus + workers * worker.gpus, before.cpus + workers * worker.cpus)
