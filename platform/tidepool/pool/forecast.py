"""What would follow if everybody did as decided, and nothing else happened. Pure.

It is how `what-if` looks ahead, and how the tests let a pool live: groups asked back leave within one step, granted ones
stand, launched nodes are up after their start time, nodes leave when they said they would.

Invariants:
- A step changes nothing but by the plan and the passing of time.
- The books of a run (since when it waits, how long it held its min, what it used) are kept as a shell would keep them.
"""

from dataclasses import dataclass, replace

from tidepool.messages import (
    AskBack,
    Deployment,
    DrainReplica,
    GrantGroup,
    Group,
    LaunchNodes,
    Node,
    Plan,
    Replica,
    Run,
    Snapshot,
    StartReplica,
    Template,
)


@dataclass(frozen=True)
class Future:
    """A snapshot, and the nodes on their way as pairs (second when up, name of the template)."""

    snapshot: Snapshot
    starting: tuple[tuple[float, str], ...] = ()


def begin(snapshot: Snapshot) -> Future:
    """From here on; what is launching already is taken to have just begun."""
    starting = [(snapshot.now_s + template.start_s, template.name) for template in snapshot.templates for _ in range(template.launching)]
    return Future(snapshot, tuple(starting))


def step(future: Future, plan: Plan, seconds: float, window_s: float = 86_400.0) -> Future:
    """The plan carried out, and so many seconds gone by."""
    old = future.snapshot
    now_s = old.now_s + seconds
    starting = list(future.starting)
    templates = {template.name: template for template in old.templates}
    for decision in plan.decisions:
        if isinstance(decision, LaunchNodes):
            template = templates[decision.template]
            templates[template.name] = replace(
                template, launching=template.launching + decision.count, available=template.available - decision.count
            )
            starting += [(old.now_s + template.start_s, template.name)] * decision.count
    nodes = [node for node in old.nodes if node.leaves_at_s is None or node.leaves_at_s > now_s]
    for up_s, name in [item for item in starting if item[0] <= now_s]:
        templates[name] = replace(templates[name], launching=templates[name].launching - 1)
        nodes.append(_new_node(templates[name], up_s, len(nodes)))
    snapshot = replace(
        old,
        now_s=now_s,
        nodes=tuple(nodes),
        runs=_runs(old, plan, now_s, window_s),
        deployments=_deployments(old, plan),
        templates=tuple(templates.values()),
    )
    return Future(snapshot, tuple(item for item in starting if item[0] > now_s))


def _new_node(template: Template, up_s: float, number: int) -> Node:
    name = f"{template.name}-{up_s:.0f}-{number}"
    return Node(name, template.kind, template.gpus, template.cpus, template.labels, template.is_spot)


def _runs(old: Snapshot, plan: Plan, now_s: float, window_s: float) -> tuple[Run, ...]:
    granted: dict[str, list[GrantGroup]] = {}
    asked: dict[str, set[str]] = {}
    for decision in plan.decisions:
        if isinstance(decision, GrantGroup):
            granted.setdefault(decision.run, []).append(decision)
        elif isinstance(decision, AskBack):
            asked.setdefault(decision.run, set()).add(decision.group)
    kinds = {node.name: node.kind for node in old.nodes}
    return tuple(_next(run, granted.get(run.name, []), asked.get(run.name, set()), kinds, old.now_s, now_s, window_s) for run in old.runs)


def _next(run: Run, granted: list[GrantGroup], asked: set[str], kinds: dict[str, str], then_s: float, now_s: float, window_s: float) -> Run:
    groups = [replace(group, leaving=True) if group.name in asked else group for group in run.groups if not group.leaving]
    taken = {group.name for group in run.groups}
    free_names = (name for number in range(len(taken) + len(granted)) if (name := f"{run.name}/{number}@{then_s:g}") not in taken)
    groups += [Group(name, grant.places, then_s) for name, grant in zip(free_names, granted, strict=False)]
    size = sum(not group.leaving for group in groups)
    had, has = staying(run) >= run.min_groups, size >= run.min_groups
    seconds = now_s - then_s
    per_group = run.workers_per_group * (run.worker.gpus or run.worker.cpus)
    held_s = run.held_s + (then_s - run.as_of_s if had else 0.0)
    return replace(
        run,
        groups=tuple(groups),
        kind=run.kind or (kinds.get(groups[0].places[0][0]) if groups else None),
        waiting_since_s=None if has else (run.waiting_since_s if run.waiting_since_s is not None else then_s),
        started_s=then_s if has and not had else run.started_s,
        resized_s=then_s if size != staying(run) else run.resized_s,
        held_s=_drop_old(run, held_s, now_s, seconds, window_s) + (seconds if has else 0.0),
        used_gpu_s=run.used_gpu_s + len(run.groups) * per_group * (then_s - run.as_of_s) + size * per_group * seconds,
        as_of_s=now_s,
    )


def _drop_old(run: Run, held_s: float, now_s: float, seconds: float, window_s: float) -> float:
    """What of the time held is still in the window, taking the pauses to be spread evenly over it."""
    dropped_s = min(seconds, max(0.0, now_s - run.submitted_s - window_s))
    return held_s - dropped_s * min(1.0, held_s / window_s)


def staying(run: Run) -> int:
    """Groups that have not been asked back."""
    return sum(not group.leaving for group in run.groups)


def _deployments(old: Snapshot, plan: Plan) -> tuple[Deployment, ...]:
    started: dict[str, list[str]] = {}
    drained: dict[str, set[str]] = {}
    for decision in plan.decisions:
        if isinstance(decision, StartReplica):
            started.setdefault(decision.deployment, []).append(decision.node)
        elif isinstance(decision, DrainReplica):
            drained.setdefault(decision.deployment, set()).add(decision.replica)
    nodes = {node.name for node in old.nodes}
    return tuple(_after(d, started.get(d.name, []), drained.get(d.name, set()), nodes, old.now_s) for d in old.deployments)


def _after(deployment: Deployment, started: list[str], drained: set[str], nodes: set[str], now_s: float) -> Deployment:
    replicas = [
        replace(replica, state="draining" if replica.name in drained else "running")
        for replica in deployment.replicas
        if replica.state != "draining" and replica.node in nodes
    ]
    replicas += [Replica(f"{deployment.name}/{number}@{now_s:g}", node, "starting") for number, node in enumerate(started)]
    surplus = sum(replica.state != "draining" for replica in replicas) - deployment.wanted
    for position in reversed(range(len(replicas))):
        if surplus > 0 and replicas[position].state != "draining":
            replicas[position] = replace(replicas[position], state="draining")
            surplus -= 1
    return replace(deployment, replicas=tuple(replicas))
