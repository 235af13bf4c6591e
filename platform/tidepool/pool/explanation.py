"""The policy's decisions told to a person: who holds what and why, and what a new run would get. Pure: text out."""

from collections.abc import Iterator
from dataclasses import replace

from tidepool.errors import SpecError
from tidepool.messages import AskBack, Decision, Deployment, DrainReplica, GrantGroup, LaunchNodes, Plan, Run, Snapshot, StartReplica, Wait
from tidepool.pool.forecast import Future, begin, staying, step
from tidepool.pool.policy import decide
from tidepool.pool.ranking import power, share
from tidepool.pool.reasons import rank_words
from tidepool.pool.rules import Rules
from tidepool.pool.speed import speed_at, useful_sizes

_FIRST_STEP_S = 10.0
_NUM_FIRST_STEPS = 30
_LONGEST_S = 3 * 86_400.0
_QUIET_STEPS = 12
"""So many steps without news, and the run has got what it gets."""


def explain(snapshot: Snapshot, rules: Rules, name: str | None = None) -> list[str]:
    """The pool line by line, then what is decided now and who waits, with reasons; of one run or deployment, if named.

    Raises `SpecError` for a name that the snapshot does not have.
    """
    plan = decide(snapshot, rules)
    known = [*(run.name for run in snapshot.runs), *(one.name for one in snapshot.deployments)]
    if name is not None and name not in known:
        raise SpecError(f"The snapshot has no run or deployment {name!r}; it has: {', '.join(known) or 'none'}.")
    lines = [_summary(snapshot)]
    lines += [_deployment_line(one) for one in snapshot.deployments if name in {None, one.name}]
    lines += [_run_line(run, snapshot, rules) for run in snapshot.runs if name in {None, run.name}]
    told = [_decision_line(decision) for decision in plan.decisions if name is None or _concerns(decision, name)]
    told += [_wait_line(wait) for wait in plan.waits if name in {None, wait.name}]
    return [*lines, *(told or ["nothing is to be done"])]


def what_if(snapshot: Snapshot, run: Run, rules: Rules) -> list[str]:
    """What a run would get if it were submitted now, when, and who would give, if nothing else changed.

    Raises `SpecError` if a run of that name is there already.
    """
    if any(other.name == run.name for other in snapshot.runs):
        raise SpecError(f"The snapshot has a run {run.name!r} already: give the new one another name.")
    submitted = replace(run, submitted_s=snapshot.now_s, waiting_since_s=snapshot.now_s, as_of_s=snapshot.now_s)
    future = begin(replace(snapshot, runs=(*snapshot.runs, submitted)))
    lines: list[str] = []
    waited = ""
    for plan, now in _ahead(future, rules, run.name):
        after_s = now.now_s - snapshot.now_s
        groups = [decision for decision in plan.decisions if isinstance(decision, GrantGroup) and decision.run == run.name]
        lines += [
            f"after {after_s:.0f} s  {_decision_line(decision)}"
            for decision in plan.decisions
            if decision.reason.facts.get("claimant") == run.name or (isinstance(decision, AskBack) and decision.run == run.name)
        ]
        if groups:
            held = staying(next(one for one in now.runs if one.name == run.name))
            lines.append(f"after {after_s:.0f} s  {run.name} gets {_amount(groups)} and holds {held + len(groups)}: {groups[0].reason}")
        wait = next((wait for wait in plan.waits if wait.name == run.name), None)
        if wait is not None and wait.reason.rule != waited:
            lines.append(f"after {after_s:.0f} s  {_wait_line(wait)}")
        waited = wait.reason.rule if wait else ""
    if not any(" gets " in line for line in lines):
        lines.append(f"{run.name} gets nothing within {_LONGEST_S / 3600:.0f} hours, if no run ends and serving wants what it wants now")
    return lines


def _ahead(future: Future, rules: Rules, name: str) -> Iterator[tuple[Plan, Snapshot]]:
    """The rounds from now on, at growing distances, until the run has what it gets."""
    seconds, quiet, number = _FIRST_STEP_S, 0, 0
    end_s = future.snapshot.now_s + _LONGEST_S
    while future.snapshot.now_s < end_s and quiet < _QUIET_STEPS:
        plan = decide(future.snapshot, rules)
        yield plan, future.snapshot
        run = next(one for one in future.snapshot.runs if one.name == name)
        has_news = any(name in {getattr(decision, "run", None), decision.reason.facts.get("claimant")} for decision in plan.decisions)
        quiet = 0 if has_news or staying(run) < run.min_groups else quiet + 1
        number += 1
        seconds = seconds if number < _NUM_FIRST_STEPS else min(600.0, seconds * 1.3)
        future = step(future, plan, seconds, rules.window_s)


def _summary(snapshot: Snapshot) -> str:
    total = sum(node.gpus or node.cpus for node in snapshot.nodes)
    training = sum(len(run.groups) * run.workers_per_group * (run.worker.gpus or run.worker.cpus) for run in snapshot.runs)
    serving = sum(len(one.replicas) * (one.replica.gpus or one.replica.cpus) for one in snapshot.deployments)
    return f"{len(snapshot.nodes)} nodes, {total} GPUs (CPUs where a node has none): {training} train, {serving} serve"


def _deployment_line(one: Deployment) -> str:
    states = [replica.state for replica in one.replicas]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("running", "starting", "draining") if state in states)
    return f"deployment {one.name}: wants {one.wanted} replicas; {counts or 'none there'}"


def _run_line(run: Run, snapshot: Snapshot, rules: Rules) -> str:
    held = staying(run)
    holds_min = held >= run.min_groups
    own = rank_words(power(run, holds_min, snapshot.now_s, rules), run, snapshot.now_s)
    part = share(run, holds_min, snapshot.now_s, rules)
    larger = next(((size, speed) for size, speed in useful_sizes(run) if size > held and holds_min), None)
    growth = f"; {larger[0]} groups would be {larger[1] / speed_at(run, held):.2f} times as fast" if larger else ""
    return (
        f"run {run.name} ({own}): holds {held} groups, min {run.min_groups}, max {run.max_groups}, "
        f"had its min {part:.0%} of the time ({run.tier} guarantees {rules.guarantees[run.tier]:.0%}){growth}"
    )


def _amount(grants: list[GrantGroup]) -> str:
    nodes = sorted({node for grant in grants for node, _ in grant.places})
    return f"{len(grants)} group{'s' if len(grants) > 1 else ''} on {', '.join(nodes)}"


def _decision_line(decision: Decision) -> str:
    match decision:
        case GrantGroup():
            return f"grant {decision.run} {_amount([decision])}: {decision.reason}"
        case AskBack():
            return f"ask {decision.run} for {decision.group}: {decision.reason}"
        case StartReplica():
            return f"start a replica of {decision.deployment} on {decision.node}: {decision.reason}"
        case DrainReplica():
            return f"drain {decision.replica} of {decision.deployment}: {decision.reason}"
        case LaunchNodes():
            return f"launch {decision.count} of {decision.template}: {decision.reason}"


def _wait_line(wait: Wait) -> str:
    return f"{wait.name} waits: {wait.reason}"


def _concerns(decision: Decision, name: str) -> bool:
    return name in {getattr(decision, "run", None), getattr(decision, "deployment", None), decision.reason.facts.get("claimant")}
