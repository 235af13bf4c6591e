"""Small pools for the tests: builders, random ones, and an independent account of what is held on each node."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from tidepool.messages import (
    Deployment,
    GrantGroup,
    Group,
    Node,
    Plan,
    Quota,
    Replica,
    Reservation,
    Resources,
    Run,
    Snapshot,
    StartReplica,
    Template,
)
from tidepool.pool import Rules, decide
from tidepool.pool.forecast import begin, step

GPU = Resources(gpus=1, cpus=1)
SHORT = Rules(window_s=3600.0, tenure_s=60.0, aging_s=900.0, vacate_s=20.0, cooldown_s=20.0)
"""The usual rules at the pace of a test."""


def nodes(*gpus: int, kind: str = "H100", is_spot: bool = False, domain: str = "") -> tuple[Node, ...]:
    """Nodes n0, n1, ... (s0, s1, ... for spot) with so many GPUs each."""
    return tuple(Node(f"{'s' if is_spot else 'n'}{i}", kind, g, 8 * g, is_spot=is_spot, domain=domain) for i, g in enumerate(gpus))


def run(name: str, smallest: int = 1, largest: int = 1, held: dict[str, float] | None = None, **rest: Any) -> Run:
    """A run of 1-GPU groups that holds one group on each node of `held` since that time, and waits if that is too little."""
    groups = tuple(Group(f"{name}/{i}", ((node.split("#")[0], 1),), since) for i, (node, since) in enumerate((held or {}).items()))
    waits = len(groups) < smallest
    values: dict[str, Any] = {
        "project": "p",
        "shards": 8,
        "submitted_s": 0.0,
        "groups": groups,
        "waiting_since_s": 0.0 if waits else None,
        "worker": GPU,
    }
    return Run(name=name, min_groups=smallest, max_groups=largest, **(values | rest))


def deployment(name: str, wanted: int, on: tuple[str, ...] = (), **rest: Any) -> Deployment:
    """A deployment of 1-GPU replicas, one running on each node of `on`."""
    replicas = tuple(Replica(f"{name}/{i}", node) for i, node in enumerate(on))
    return Deployment(name, "serving", wanted, GPU, replicas, **rest)


def life(
    snapshot: Snapshot, rounds: int, rules: Rules, seconds: float = 10.0, come_and_go: Callable[[Snapshot], Iterable[Run]] | None = None
) -> Iterator[tuple[Snapshot, Plan]]:
    """Each round of a pool in which everybody obeys: the snapshot and what was decided on it.

    How long each run held its min is taken from a record of the rounds, exactly. `come_and_go` says which runs there are now.
    """
    future = begin(snapshot)
    record: defaultdict[str, deque[tuple[float, float]]] = defaultdict(deque)
    for _ in range(rounds):
        now_s = future.snapshot.now_s
        there = come_and_go(future.snapshot) if come_and_go else future.snapshot.runs
        runs = tuple(replace(r, held_s=_held_s(record[r.name], now_s - rules.window_s), as_of_s=now_s) for r in there)
        future = replace(future, snapshot=replace(future.snapshot, runs=runs))
        plan = decide(future.snapshot, rules)
        yield future.snapshot, plan
        future = step(future, plan, seconds, rules.window_s)
        for r in future.snapshot.runs:
            if staying(r) >= r.min_groups:
                record[r.name].append((now_s, now_s + seconds))


def _held_s(spans: deque[tuple[float, float]], since_s: float) -> float:
    while spans and spans[0][1] <= since_s:
        spans.popleft()
    return sum(end_s - max(start_s, since_s) for start_s, end_s in spans)


def after(snapshot: Snapshot, rounds: int, rules: Rules, seconds: float = 10.0) -> Snapshot:
    """The pool after some rounds."""
    return list(life(snapshot, rounds + 1, rules, seconds))[-1][0]


def changed(snapshot: Snapshot, name: str, **values: Any) -> Snapshot:
    """The snapshot with other values for a run or deployment."""
    runs = tuple(replace(r, **values) if r.name == name else r for r in snapshot.runs)
    deployments = tuple(replace(d, **values) if d.name == name else d for d in snapshot.deployments)
    return replace(snapshot, runs=runs, deployments=deployments)


def held(snapshot: Snapshot, plan: Plan | None = None) -> tuple[Counter[str], Counter[str]]:
    """GPUs and CPUs in use by node, with what is leaving, and with what the plan grants."""
    gpus: Counter[str] = Counter()
    cpus: Counter[str] = Counter()

    def add(node: str, count: int, worker: Resources) -> None:
        gpus[node] += count * worker.gpus
        cpus[node] += count * worker.cpus

    for r in snapshot.runs:
        for group in r.groups:
            for node, workers in group.places:
                add(node, workers, r.worker)
    for d in snapshot.deployments:
        for replica in d.replicas:
            add(replica.node, 1, d.replica)
    for decision in plan.decisions if plan else ():
        if isinstance(decision, GrantGroup):
            worker = next(r.worker for r in snapshot.runs if r.name == decision.run)
            for node, workers in decision.places:
                add(node, workers, worker)
        elif isinstance(decision, StartReplica):
            add(decision.node, 1, next(d.replica for d in snapshot.deployments if d.name == decision.deployment))
    return gpus, cpus


def staying(r: Run) -> int:
    """Groups not asked back."""
    return sum(not group.leaving for group in r.groups)


@st.composite
def pools(draw: Any) -> Snapshot:
    """A random empty pool with random demands."""
    kinds = st.sampled_from(["H100", "A100", "cpu"])
    snapshot_nodes = []
    for i in range(draw(st.integers(1, 6))):
        kind = draw(kinds)
        gpus = 0 if kind == "cpu" else draw(st.sampled_from([1, 2, 4, 8]))
        leaves = draw(st.sampled_from([None, None, None, 45.0, 150.0]))
        labels = frozenset(draw(st.sets(st.sampled_from(["zone=a", "fast=yes"]))))
        cpus = draw(st.sampled_from([4, 8, 16]))
        snapshot_nodes.append(Node(f"n{i}", kind, gpus, cpus, labels, draw(st.booleans()), f"rack{i % 2}", leaves))
    runs = tuple(draw(_runs(i)) for i in range(draw(st.integers(0, 8))))
    deployments = tuple(
        Deployment(f"d{i}", draw(st.sampled_from(["p0", "p1"])), draw(st.integers(0, 5)), Resources(draw(st.integers(0, 2)), 1))
        for i in range(draw(st.integers(0, 2)))
    )
    quotas = tuple(draw(st.lists(st.builds(Quota, st.just("p0"), _limits, _limits), max_size=1)))
    reserved = st.builds(
        Reservation, st.just("res"), st.just("p1"), kinds, st.integers(1, 4), st.sampled_from([0.0, 100.0]), st.just(250.0)
    )
    templates = st.builds(Template, st.just("t"), st.just("H100"), st.just(4), st.just(16), st.integers(0, 2), start_s=st.just(35.0))
    return Snapshot(
        0.0,
        tuple(snapshot_nodes),
        deployments,
        runs,
        tuple(draw(st.lists(reserved, max_size=1))),
        quotas,
        tuple(draw(st.lists(templates, max_size=1))),
    )


_limits = st.one_of(st.none(), st.integers(0, 8))


@st.composite
def _runs(draw: Any, number: int) -> Run:
    smallest = draw(st.integers(1, 3))
    waited = draw(st.sampled_from([0.0, 50.0, 2000.0]))
    return Run(
        f"r{number}",
        draw(st.sampled_from(["p0", "p1"])),
        smallest,
        smallest + draw(st.integers(0, 4)),
        draw(st.sampled_from([1, 3, 8, 16])),
        -waited,
        draw(st.sampled_from(["premium", "standard", "basic"])),
        draw(st.integers(-1, 1)),
        draw(st.sampled_from([1, 1, 2, 3])),
        Resources(draw(st.sampled_from([0, 1, 1, 2])), draw(st.integers(1, 3))),
        frozenset(draw(st.sets(st.sampled_from(["zone=a"])))),
        waiting_since_s=-waited,
    )
