"""What holds for every pool and at every moment of its life, over random clusters and demands."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.pool import truth
from tests.pool.pools import GPU, SHORT, after, held, life, nodes, pools, run, staying
from tidepool.messages import AskBack, Deployment, GrantGroup, Plan, Quota, Run, Snapshot, StartReplica
from tidepool.pool import decide
from tidepool.pool.room import Choice, Index

_many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
_few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
_some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@_many
@given(pools(), st.lists(st.integers(0, 5), min_size=2, max_size=2))
def test_no_resource_is_given_twice(pool: Snapshot, then_wanted: list[int]) -> None:
    for now, plan in _with_change(pool, then_wanted):
        gpus, cpus = held(now, plan)
        for node in now.nodes:
            assert gpus[node.name] <= node.gpus
            assert cpus[node.name] <= node.cpus
        granted = [d for d in plan.decisions if isinstance(d, GrantGroup | StartReplica)]
        closing = {node.name for node in now.nodes if node.leaves_at_s is not None}
        names = {node.name for node in now.nodes}
        for decision in granted:
            places = decision.places if isinstance(decision, GrantGroup) else ((decision.node, 1),)
            assert {name for name, _ in places} <= names - closing


@_many
@given(pools(), st.lists(st.integers(0, 5), min_size=2, max_size=2))
def test_gangs_are_whole_of_one_kind_and_of_helpful_sizes(pool: Snapshot, then_wanted: list[int]) -> None:
    kinds = {node.name: node for node in pool.nodes}
    for now, plan in _with_change(pool, then_wanted):
        kinds |= {node.name: node for node in now.nodes}
        granted = Counter(d.run for d in plan.decisions if isinstance(d, GrantGroup))
        asked = Counter(d.run for d in plan.decisions if isinstance(d, AskBack))
        assert len({(d.run, d.group) for d in plan.decisions if isinstance(d, AskBack)}) == sum(asked.values())
        for r in now.runs:
            for decision in plan.decisions:
                if isinstance(decision, GrantGroup) and decision.run == r.name:
                    assert sum(workers for _, workers in decision.places) == r.workers_per_group
                    assert all(r.labels <= kinds[name].labels for name, _ in decision.places)
            if granted[r.name]:
                size = sum(not g.leaving and _is_up(now, g.places) for g in r.groups) + granted[r.name]
                steps = [-(-r.shards // (groups * r.workers_per_group)) for groups in (size - 1 or 1, size)]
                assert size == r.min_groups or steps[1] < steps[0]
            places = [g.places for g in r.groups] + [d.places for d in plan.decisions if isinstance(d, GrantGroup) and d.run == r.name]
            assert len({kinds[name].kind for place in places for name, _ in place}) <= 1


@_many
@given(pools(), st.lists(st.integers(0, 5), min_size=2, max_size=2), st.integers(1, 6), st.integers(1, 4))
def test_quotas_hold_at_every_moment(pool: Snapshot, then_wanted: list[int], training_gpus: int, serving_gpus: int) -> None:
    quotas = (Quota("p0", serving_gpus, training_gpus), Quota("p1", serving_gpus, training_gpus))
    for now, plan in _with_change(replace(pool, quotas=quotas), then_wanted):
        granted = Counter(d.run for d in plan.decisions if isinstance(d, GrantGroup))
        started = Counter(d.deployment for d in plan.decisions if isinstance(d, StartReplica))
        for quota in now.quotas:
            training = sum(
                (len(r.groups) + granted[r.name]) * r.workers_per_group * (r.worker.gpus or r.worker.cpus)
                for r in now.runs
                if r.project == quota.project
            )
            serving = sum(
                (len(d.replicas) + started[d.name]) * (d.replica.gpus or d.replica.cpus)
                for d in now.deployments
                if d.project == quota.project
            )
            assert quota.training_gpus is None or training <= quota.training_gpus
            assert quota.serving_gpus is None or serving <= quota.serving_gpus


@_many
@given(pools(), st.lists(st.integers(0, 5), min_size=2, max_size=2))
def test_every_reason_is_true_and_everybody_who_lacks_something_is_told_why(pool: Snapshot, then_wanted: list[int]) -> None:
    for now, plan in _with_change(pool, then_wanted):
        for decision in (*plan.decisions, *plan.waits):
            assert str(decision.reason)
            truth.check_reason(decision, now, plan, SHORT)
        told = Counter({wait.name: 0 for wait in plan.waits})
        for wait in plan.waits:
            told[wait.name] += wait.missing
        granted = Counter(d.run for d in plan.decisions if isinstance(d, GrantGroup))
        started = Counter(d.deployment for d in plan.decisions if isinstance(d, StartReplica))
        paused = {d.run for d in plan.decisions if isinstance(d, AskBack)}
        for r in now.runs:
            missing = r.min_groups - sum(not g.leaving and _is_up(now, g.places) for g in r.groups) - granted[r.name]
            if missing > 0 and r.name not in paused:
                assert told[r.name] == missing
        for d in now.deployments:
            up = sum(replica.state != "draining" and _is_up(now, ((replica.node, 1),)) for replica in d.replicas)
            if d.wanted > up + started[d.name]:
                assert told[d.name] == d.wanted - up - started[d.name]


@_many
@given(pools())
def test_no_min_is_unmet_while_room_exists(pool: Snapshot) -> None:
    """In a pool at rest: neither idle room, nor what runs hold above their min, would hold a run that waits."""
    calm = tuple(replace(node, leaves_at_s=None, is_spot=False, cpus=8 * node.gpus or node.cpus) for node in pool.nodes)
    quiet = replace(pool, reservations=(), quotas=(), nodes=calm)
    for now, plan in list(life(quiet, 14, SHORT))[10:]:
        if plan.decisions or any(wait.reason.rule in {"coming", "launching", "tenure"} for wait in plan.waits):
            continue
        if any(r.waiting_since_s is not None and now.now_s - r.waiting_since_s >= SHORT.aging_s for r in now.runs):
            continue  # who waited so long keeps what comes free
        for wait in plan.waits:
            for r in now.runs:
                if r.name == wait.name:
                    assert _slots_with_surplus(now, r) < wait.missing * r.workers_per_group, str(wait.reason)


@_many
@given(pools())
def test_nobody_is_paused_while_room_exists(pool: Snapshot) -> None:
    """A run that alone wants something pauses nobody if idle room, or what runs hold above their min, would hold it."""
    still = replace(pool, nodes=tuple(replace(node, is_spot=False, cpus=8 * node.gpus or node.cpus) for node in pool.nodes))
    for now, plan in life(still, 20, SHORT):
        paused_for = {d.reason.facts["claimant"] for d in plan.decisions if isinstance(d, AskBack) and d.reason.rule == "pause"}
        for r in now.runs:
            if {r.name} == paused_for == {wait.name for wait in plan.waits} and not any(isinstance(d, GrantGroup) for d in plan.decisions):
                assert _slots_with_surplus(now, r) < (r.min_groups - staying(r)) * r.workers_per_group


@_some
@given(pools())
def test_a_pool_in_which_nothing_changes_comes_to_rest(pool: Snapshot) -> None:
    """All mins fit here, so that nobody takes turns; then the decisions end, and stay ended."""
    wide = replace(pool, nodes=tuple(replace(node, leaves_at_s=None) for node in pool.nodes), reservations=(), templates=())
    more = tuple(replace(n, name=f"{n.name}-{i}", gpus=n.gpus * 64, cpus=n.cpus * 64) for n in wide.nodes for i in range(4))
    lived = list(life(replace(wide, nodes=more), 60, SHORT, seconds=30.0))
    assert [plan.decisions for _, plan in lived[30:]] == [()] * 30


@_some
@given(pools())
def test_the_same_snapshot_gives_the_same_plan(pool: Snapshot) -> None:
    later = after(pool, 3, SHORT)
    assert decide(later, SHORT) == decide(later, SHORT)


@_some
@given(pools())
def test_leaving_nodes_are_empty_in_time(pool: Snapshot) -> None:
    for now, plan in life(pool, 20, SHORT):
        asked = {(d.run, d.group) for d in plan.decisions if isinstance(d, AskBack)}
        for node in now.nodes:
            if node.leaves_at_s is None or now.now_s < node.leaves_at_s - SHORT.vacate_s:
                continue
            for r in now.runs:
                for group in r.groups:
                    if any(name == node.name for name, _ in group.places):
                        assert group.leaving or (r.name, group.name) in asked


@_few
@example(spare=0, guaranteed=[("standard", 1)], basics=[1] * 5)
@given(
    st.integers(0, 2),
    st.lists(st.tuples(st.sampled_from(["premium", "standard"]), st.integers(1, 3)), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), min_size=3, max_size=5),
)
def test_guarantees_hold_over_the_window_where_they_can(spare: int, guaranteed: list[tuple[str, int]], basics: list[int]) -> None:
    """Premium and standard fit just so; basic runs overload the pool and go ahead when they have waited too long."""
    size = sum(smallest for _, smallest in guaranteed) + spare
    runs = [run(f"g{i}", smallest, smallest, tier=tier) for i, (tier, smallest) in enumerate(guaranteed)]
    runs += [run(f"b{i}", min(smallest, size), size, tier="basic") for i, smallest in enumerate(basics)]
    _check_guarantees(life(Snapshot(0.0, nodes(size), runs=tuple(runs)), 600, SHORT))


@_few
@example(guaranteed=[("standard", 4)], spare=0, seed=360_794)
@given(
    st.lists(st.tuples(st.sampled_from(["premium", "standard"]), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 1_000_000),
)
def test_guarantees_hold_while_basic_runs_come_and_go(guaranteed: list[tuple[str, int]], spare: int, seed: int) -> None:
    """The same, with basic runs of all sizes that come at any time, and end when they have done their work."""
    size = sum(smallest for _, smallest in guaranteed) + spare
    fixed = tuple(run(f"g{i}", smallest, smallest, tier=tier) for i, (tier, smallest) in enumerate(guaranteed))
    rng = random.Random(seed)
    often, longest_s = rng.choice([0.05, 0.15, 0.4]), rng.choice([100.0, 600.0, 3000.0])
    work_s: dict[str, float] = {}

    def come_and_go(now: Snapshot) -> list[Run]:
        there = [r for r in now.runs if r.used_gpu_s < work_s.get(r.name, math.inf)]
        if rng.random() < often and len(there) < 40:
            smallest = rng.randint(1, min(4, size))
            new = run(f"b{len(work_s)}", smallest, smallest + rng.randint(0, 2), tier="basic", priority=rng.choice([0, 0, 1]))
            work_s[new.name] = smallest * rng.uniform(0.2, 1.0) * longest_s
            there.append(replace(new, submitted_s=now.now_s, waiting_since_s=now.now_s))
        return there

    _check_guarantees(life(Snapshot(0.0, nodes(size), runs=fixed), 600, SHORT, come_and_go=come_and_go))


@_few
@example([("premium", 0, 1)] * 4 + [("basic", 0, 1), ("basic", 0, 4)], 1)
@given(
    st.lists(st.tuples(st.sampled_from(["premium", "standard", "basic"]), st.integers(0, 2), st.integers(1, 4)), min_size=2, max_size=7),
    st.integers(0, 2),
)
def test_nobody_starves(demands: list[tuple[str, int, int]], wanted: int) -> None:
    """Endless runs, far more than fit: each one gets its min again and again, whatever its tier and size."""
    runs = tuple(run(f"r{i}", smallest, 4, tier=tier, priority=priority) for i, (tier, priority, smallest) in enumerate(demands))
    pool = Snapshot(0.0, nodes(2, 2, wanted or 1), (Deployment("d", "serving", wanted, GPU),), runs)
    last = dict.fromkeys((r.name for r in runs), 0.0)
    longest = dict.fromkeys((r.name for r in runs), 0.0)
    for now, _ in life(pool, 1500, SHORT, seconds=30.0):
        for r in now.runs:
            if staying(r) >= r.min_groups:
                last[r.name] = now.now_s
            longest[r.name] = max(longest[r.name], now.now_s - last[r.name])
    bound_s = len(runs) * (SHORT.aging_s + SHORT.window_s)
    assert max(longest.values()) <= bound_s


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-4, 4)), max_size=60))
def test_the_index_finds_what_is_free(changes: list[tuple[int, int]]) -> None:
    index = Index([4] * 6, [0, 0, 0, 1, 1, -1], [4, 4])
    for node, units in changes:
        if 0 <= index.free[node] + units <= 4:
            index.change(node, units)
    for number, members in enumerate([(0, 1, 2), (3, 4)]):
        for free in range(5):
            expected = {node for node in members if index.free[node] == free}
            assert set(index.some(number, free, 9)) == expected
            assert index.top(number, free) in (expected or {-1})
        assert index.slots([Choice(number, 3, 4, 0)]) == sum(index.free[node] // 3 for node in members)


def _check_guarantees(lived: Iterator[tuple[Snapshot, Plan]]) -> None:
    """Each run that is guaranteed something held its min for that part of every window; a round takes ten seconds."""
    window = int(SHORT.window_s / 10.0)
    history: defaultdict[str, list[bool]] = defaultdict(list)
    for now, _ in lived:
        for r in now.runs:
            history[r.name].append(staying(r) >= r.min_groups)
            if len(history[r.name]) >= window:
                assert sum(history[r.name][-window:]) / window >= SHORT.guarantees[r.tier], (r.name, now.now_s)


def _with_change(pool: Snapshot, then_wanted: list[int]) -> list[tuple[Snapshot, Plan]]:
    """Six rounds, then what serving wants changes, then twelve more."""
    first = list(life(pool, 6, SHORT))
    now = after(pool, 6, SHORT)
    deployments = tuple(replace(d, wanted=wanted) for d, wanted in zip(now.deployments, then_wanted, strict=False))
    return first + list(life(replace(now, deployments=deployments), 12, SHORT))


def _is_up(now: Snapshot, places: tuple[tuple[str, int], ...]) -> bool:
    up = {node.name for node in now.nodes if node.leaves_at_s is None}
    return all(name in up for name, _ in places)


def _slots_with_surplus(now: Snapshot, r: Run) -> int:
    """The most workers of a run that fit on one kind of nodes, with all that runs hold above their min given up."""
    gpus, cpus = held(now)
    for giver in now.runs:
        for group in sorted(giver.groups, key=lambda g: (g.granted_s, g.name))[giver.min_groups :]:
            for name, workers in group.places:
                gpus[name] -= workers * giver.worker.gpus
                cpus[name] -= workers * giver.worker.cpus
    best: Counter[str] = Counter()
    for node in now.nodes:
        if node.leaves_at_s is None and r.labels <= node.labels and r.kind in {None, node.kind} and (r.worker.gpus > 0) == (node.gpus > 0):
            if node.gpus:
                units = max(r.worker.gpus, -(-r.worker.cpus * node.gpus // node.cpus))
                best[node.kind] += (node.gpus - gpus[node.name]) // units
            else:
                best[node.kind] += (node.cpus - cpus[node.name]) // max(1, r.worker.cpus)
    return max(best.values(), default=0)
