"""Who holds what and who waits, as JSON, for people who ask the arbiter. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tidepool.messages import ClusterView, Deployment, Node, Resources, Run, Snapshot, Wait

Told = dict[str, Any]


def tell(
    snapshot: Snapshot,
    waits: Iterable[Wait],
    cluster: ClusterView,
    allowed: Callable[[str], int | None],
    quarantined: Mapping[str, str],
    resubmissions: Sequence[Told],
) -> Told:
    """The queue in its order, the runs that hold anything, deployments, nodes, and runs that wait for another driver."""
    runs = {run.name: run for run in snapshot.runs}
    reasons = {wait.name: str(wait.reason) for wait in waits}
    queue = [runs[name] for name in reasons if name in runs]
    places = {run.name: place for place, run in enumerate(queue, 1)}

    def told(run: Run) -> Told:
        return _run(run, places.get(run.name), reasons.get(run.name, ""))

    return {
        "queue": [told(run) for run in queue],
        "runs": [told(run) for run in snapshot.runs if run.groups],
        "deployments": [_deployment(one, allowed(one.name), reasons.get(one.name, "")) for one in snapshot.deployments],
        "nodes": [_node(node, cluster.free.get(node.name), quarantined.get(node.name, "")) for node in cluster.nodes],
        "resubmissions": list(resubmissions),
    }


def _run(run: Run, place: int | None, reason: str) -> Told:
    return {
        "run": run.name,
        "place": place,
        "project": run.project,
        "tier": run.tier,
        "priority": run.priority,
        "groups": len(run.groups),
        "min": run.min_groups,
        "max": run.max_groups,
        "waiting_since_s": run.waiting_since_s,
        "reason": reason,
    }


def _deployment(one: Deployment, allowed: int | None, reason: str) -> Told:
    """`allowed` is null for one that nothing was decided about yet."""
    facts = {"name": one.name, "project": one.project, "wanted": one.wanted, "allowed": allowed, "replicas": len(one.replicas)}
    return facts | {"reason": reason}


def _node(node: Node, free: Resources | None, quarantined: str) -> Told:
    """What is free is what Ray could still place there."""
    left = free or Resources(node.gpus, node.cpus)
    facts = {"name": node.name, "kind": node.kind, "gpus": node.gpus, "cpus": node.cpus}
    return facts | {"free_gpus": left.gpus, "free_cpus": left.cpus, "quarantined": quarantined}
