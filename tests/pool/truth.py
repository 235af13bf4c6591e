"""What each reason claims, checked against the snapshot by other code than the policy's. An unknown rule fails."""

from dataclasses import dataclass
from math import isclose, log
from typing import Any

import pytest

from tests.pool.pools import staying
from tidepool.messages import AskBack, Decision, DrainReplica, GrantGroup, Plan, Run, Snapshot, StartReplica, Wait
from tidepool.pool import Rules

_LEVEL = {"premium": 0, "standard": 1, "basic": 2}


@dataclass(frozen=True)
class Seen:
    """What a round saw and decided."""

    now: Snapshot
    plan: Plan
    rules: Rules


def check_reason(decision: Decision | Wait, now: Snapshot, plan: Plan, rules: Rules) -> None:
    """Fail if the reason of a decision or a wait is not true."""
    facts = dict(decision.reason.facts)
    check = globals().get(f"_check_{decision.reason.rule}")
    assert check is not None, f"nobody checks {decision.reason.rule}"
    check(Seen(now, plan, rules), decision, facts)


def _run(now: Snapshot, name: Any) -> Run:
    return next(r for r in now.runs if r.name == name)


def _counted(now: Snapshot, r: Run) -> int:
    """Groups that stay: not asked back, on nodes that are there and have no notice."""
    up = {node.name for node in now.nodes if node.leaves_at_s is None}
    return sum(not g.leaving and all(name in up for name, _ in g.places) for g in r.groups)


def _waited(now: Snapshot, r: Run) -> float:
    return now.now_s - (r.waiting_since_s if r.waiting_since_s is not None else now.now_s)


def _shards_per_step(r: Run, groups: int) -> int:
    return -(-r.shards // (groups * r.workers_per_group))


def _grants(plan: Plan, name: str) -> int:
    return sum(isinstance(d, GrantGroup) and d.run == name for d in plan.decisions)


def _check_min(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    r = _run(seen.now, decision.run)
    assert (facts["run"], facts["tier"], facts["priority"], facts["min"]) == (r.name, r.tier, r.priority, r.min_groups)
    assert facts["held"] == _counted(seen.now, r) < r.min_groups <= facts["held"] + _grants(seen.plan, r.name)
    assert facts["waited_s"] == _waited(seen.now, r)


def _check_owed(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    r = _run(seen.now, decision.run)
    assert _counted(seen.now, r) < r.min_groups
    assert facts["guarantee"] == seen.rules.guarantees[r.tier]
    span_s = min(seen.rules.window_s, seen.now.now_s - r.submitted_s)
    assert facts["share"] == pytest.approx(min(r.held_s, span_s) / span_s)
    assert (r.held_s - min(r.held_s, seen.rules.tenure_s)) / seen.rules.window_s < facts["guarantee"] or facts["share"] < 1


def _check_aged(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    assert facts["waited_s"] == _waited(seen.now, _run(seen.now, decision.run)) >= facts["aging_s"] == seen.rules.aging_s


def _check_reserved(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    reservation = next(r for r in seen.now.reservations if r.name == facts["reservation"])
    assert reservation.starts_s <= seen.now.now_s < reservation.ends_s
    assert facts["reserved"] == reservation.gpus
    assert facts["project"] == reservation.project == _run(seen.now, decision.run).project


def _check_grow(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    r = _run(seen.now, decision.run)
    assert r.min_groups <= facts["held"] < facts["size"] <= r.max_groups
    assert facts["size"] <= _counted(seen.now, r) + _grants(seen.plan, r.name)
    assert seen.now.now_s - r.resized_s >= seen.rules.cooldown_s
    if not r.speeds:
        assert facts["speedup"] == pytest.approx(_shards_per_step(r, facts["held"]) / _shards_per_step(r, facts["size"]))
    assert facts["speedup"] > 1
    gpus = (facts["size"] - facts["held"]) * r.workers_per_group * (r.worker.gpus or r.worker.cpus)
    assert facts["gain"] == pytest.approx(seen.rules.weights[r.tier] * log(facts["speedup"]) / gpus)


def _check_serve(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    d = next(d for d in seen.now.deployments if d.name == decision.deployment)
    up = {node.name for node in seen.now.nodes if node.leaves_at_s is None}
    have = sum(replica.state != "draining" and replica.node in up for replica in d.replicas)
    assert facts["wanted"] == d.wanted
    assert have <= facts["held"] < (d.wanted if d.needed is None else min(d.needed, d.wanted))


def _check_spare(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    d = next(d for d in seen.now.deployments if d.name == decision.deployment)
    r = _run(seen.now, facts["run"])
    drained = [
        one for one in seen.plan.decisions if isinstance(one, DrainReplica) and one.deployment == d.name and one.reason.rule == "spare"
    ]
    up = {node.name for node in seen.now.nodes if node.leaves_at_s is None}
    have = sum(replica.state != "draining" and replica.node in up for replica in d.replicas)
    assert facts["wanted"] == d.wanted
    assert d.needed is not None
    assert facts["needed"] == min(d.needed, d.wanted) <= have - len(drained)
    assert r.tier == "premium"
    assert facts["missing"] == r.min_groups - _counted(seen.now, r) > 0
    assert decision.deadline_s == seen.now.now_s + seen.rules.vacate_s


def _check_notice(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    node = next(node for node in seen.now.nodes if node.name == facts["node"])
    assert node.leaves_at_s is not None
    assert facts["left_s"] == node.leaves_at_s - seen.now.now_s <= facts["vacate_s"] == seen.rules.vacate_s
    assert decision.deadline_s == node.leaves_at_s


def _check_quarantine(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    node = next(node for node in seen.now.nodes if node.name == facts["node"])
    assert facts["why"] == node.quarantine != ""
    assert decision.deadline_s == node.leaves_at_s


def _check_gone(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    assert facts["node"] not in {node.name for node in seen.now.nodes}
    group = next(g for g in _run(seen.now, decision.run).groups if g.name == decision.group)
    assert facts["node"] in dict(group.places)


def _check_shrink(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    r = _run(seen.now, decision.run)
    assert facts["min"] == r.min_groups <= facts["smaller"] < facts["held"] <= _counted(seen.now, r)
    assert _is_claimant(facts["claimant"], seen.now, seen.plan)
    if not r.speeds:
        slower = _shards_per_step(r, facts["held"]) / _shards_per_step(r, facts["smaller"])
        assert facts["slowdown"] == pytest.approx(1 - slower)


def _check_rebalance(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    r, claimant = _run(seen.now, decision.run), _run(seen.now, facts["claimant"])
    assert facts["min"] == r.min_groups <= facts["smaller"] < facts["held"]
    assert facts["ratio"] == seen.rules.rebalance_ratio
    assert facts["gain"] >= facts["cost"] * facts["ratio"] or isclose(facts["gain"], facts["cost"] * facts["ratio"])
    assert _counted(seen.now, claimant) >= claimant.min_groups
    group = next(g for g in r.groups if g.name == decision.group)
    assert seen.now.now_s - group.granted_s >= seen.rules.tenure_s


def _check_pause(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    victim = _run(seen.now, decision.run)
    assert _is_claimant(facts["claimant"], seen.now, seen.plan)
    assert facts["tenure_s"] == seen.now.now_s - victim.started_s
    back = {d.group for d in seen.plan.decisions if isinstance(d, AskBack) and d.run == victim.name}
    assert back >= {g.name for g in victim.groups if not g.leaving and _counted(seen.now, victim)} - _closing(seen.now, victim)
    claimant = next((r for r in seen.now.runs if r.name == facts["claimant"]), None)
    if claimant is None or facts["claimant_rank"] == "reserved":
        return
    assert facts["tenure_s"] >= seen.rules.tenure_s
    has_waited = _waited(seen.now, claimant) >= seen.rules.aging_s
    assert has_waited == facts["claimant_rank"].startswith("waited")
    if not has_waited and not facts["claimant_rank"].startswith("its guarantee"):
        assert (_LEVEL[claimant.tier], -claimant.priority) <= (_LEVEL[victim.tier], -victim.priority)
    if has_waited and seen.rules.guarantees[victim.tier]:
        age_s = seen.now.now_s - victim.submitted_s
        held_s = victim.held_s + seen.now.now_s - victim.as_of_s
        assert held_s / min(seen.rules.window_s, age_s) >= seen.rules.guarantees[victim.tier]


def _check_gang(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    r = _run(seen.now, decision.run)
    assert facts["held"] == _counted(seen.now, r) < facts["min"] == r.min_groups
    assert _grants(seen.plan, r.name) == 0


def _check_project(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    r, claimant = _run(seen.now, decision.run), _run(seen.now, facts["claimant"])
    assert r.project == claimant.project == facts["project"]
    assert next(q.training_gpus for q in seen.now.quotas if q.project == r.project) == facts["quota"]
    assert r.min_groups <= facts["smaller"] < facts["held"]
    assert _counted(seen.now, claimant) < claimant.min_groups


def _check_launch(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    template = next(t for t in seen.now.templates if t.name == decision.template == facts["template"])
    assert 0 < decision.count == facts["count"] <= template.available
    assert _is_claimant(facts["claimant"], seen.now, seen.plan)


def _check_next_round(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    started = sum(isinstance(d, GrantGroup | StartReplica) for d in seen.plan.decisions)
    assert started == facts["num_granted"] >= facts["most"] == seen.rules.max_grants
    assert decision.missing > 0


def _check_coming(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    leaving = any(g.leaving for r in seen.now.runs for g in r.groups)
    draining = any(replica.state == "draining" for d in seen.now.deployments for replica in d.replicas)
    asked = any(isinstance(d, AskBack | DrainReplica) for d in seen.plan.decisions)
    assert leaving or draining or asked
    assert facts["missing"] == decision.missing


def _check_launching(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    template = next(t for t in seen.now.templates if t.name == facts["template"])
    launched = any(d.template == template.name for d in seen.plan.decisions if hasattr(d, "template"))
    assert template.launching or launched
    assert (facts["missing"], facts["start_s"]) == (decision.missing, template.start_s)


def _check_tenure(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    r = _run(seen.now, decision.name)
    assert (facts["missing"], facts["workers"], facts["tenure_s"]) == (decision.missing, r.workers_per_group, seen.rules.tenure_s)
    assert _grants(seen.plan, decision.name) == 0
    assert any(_counted(seen.now, x) >= x.min_groups and seen.now.now_s - x.started_s < seen.rules.tenure_s for x in seen.now.runs)


def _check_no_room(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    assert facts["missing"] == decision.missing > 0
    r = next((r for r in seen.now.runs if r.name == decision.name), None)
    assert facts["workers"] == (r.workers_per_group if r else 1)
    assert _grants(seen.plan, decision.name) == 0
    assert facts["idle"] >= 0


def _check_no_node(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    r = next((r for r in seen.now.runs if r.name == decision.name), None)
    worker = r.worker if r else next(d.replica for d in seen.now.deployments if d.name == decision.name)
    labels, kind = (r.labels, r.kind) if r else (frozenset(), None)
    assert (facts["gpus"], facts["cpus"]) == (worker.gpus, worker.cpus)
    for place in (*seen.now.nodes, *seen.now.templates):
        is_kind = (worker.gpus > 0) == (place.gpus > 0) and labels <= place.labels and kind in {None, place.kind}
        assert not is_kind or worker.gpus > place.gpus or worker.cpus > place.cpus


def _check_quota(seen: Seen, decision: Any, facts: dict[str, Any]) -> None:
    quota = next(q for q in seen.now.quotas if q.project == facts["project"])
    assert facts["quota"] == (quota.training_gpus if facts["what"] == "training" else quota.serving_gpus)
    assert facts["held"] + facts["more"] > facts["quota"]
    if facts["what"] == "training":
        r = _run(seen.now, decision.name)
        per_group = r.workers_per_group * (r.worker.gpus or r.worker.cpus)
        assert facts["more"] == decision.missing * per_group
        before = sum(
            len(x.groups) * x.workers_per_group * (x.worker.gpus or x.worker.cpus) for x in seen.now.runs if x.project == r.project
        )
        assert facts["held"] >= before


def _is_claimant(name: Any, now: Snapshot, plan: Plan) -> bool:
    """Whether somebody of that name waits for what was asked for (or is a run that grows, or a reservation)."""
    waits = {wait.name for wait in plan.waits}
    reserved = {r.name for r in now.reservations}
    return name in waits | reserved or any(r.name == name and staying(r) >= r.min_groups for r in now.runs)


def _closing(now: Snapshot, r: Run) -> set[str]:
    up = {node.name for node in now.nodes if node.leaves_at_s is None}
    return {g.name for g in r.groups if not all(name in up for name, _ in g.places)}
