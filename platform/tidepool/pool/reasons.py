"""The words of every reason. A template's fields are the facts that the decision was taken on; a test holds each to be true."""

from tidepool.messages import Reason, Run
from tidepool.pool.ranking import AGED, OWED, RESERVED, STARVING, Power, used_gpu_s, waited_s

_WORDS = {
    # a group or replica is granted
    "min": "{run} ({tier}, priority {priority}) holds {held} of its min of {min} groups and waited {waited_s:.0f} s; there is room",
    "owed": "{run} held its min for {share:.1%} of the window and {tier} guarantees {guarantee:.0%}; there is room",
    "aged": "{run} waited {waited_s:.0f} s; after {aging_s:.0f} s a run goes ahead of tiers and priorities, and there is room",
    "reserved": "{run} of project {project} takes its part of the {reserved} GPUs that {reservation} reserves",
    "grow": "no run lacks its min for this room; from {held} to {size} groups {run} gets {speedup:.2f} times as fast, "
    "{gain:.4f} per GPU in weighted log speed",
    "serve": "{deployment} wants {wanted} replicas and has {held}; serving comes first up to its quota",
    # a group or replica is asked back
    "notice": "node {node} leaves in {left_s:.0f} s; vacating it takes up to {vacate_s:.0f} s",
    "gone": "node {node} is not there any more",
    "quarantine": "node {node} is in quarantine: {why}",
    "shrink": "{claimant} needs room; from {held} to {smaller} groups (its min is {min}) {run} loses {slowdown:.0%} of its speed",
    "rebalance": "{claimant} gains {gain:.4f} per GPU in weighted log speed, at least {ratio:g} times what {run} loses ({cost:.4f}) "
    "by going from {held} to {smaller} groups (its min is {min})",
    "pause": "{claimant} ({claimant_rank}) goes before {run} ({rank}), and what runs hold above their min does not make enough room; "
    "{run} held its min for {tenure_s:.0f} s",
    "gang": "{run} holds {held} groups, takes no step below its min of {min}, and cannot get the rest now",
    "project": "{claimant} needs its min; project {project} is at its quota of {quota} GPUs, and {run} gives up what it holds above "
    "its own min, from {held} to {smaller} groups",
    "spare": "{deployment} keeps {wanted} replicas and its traffic needs {needed} now; premium run {run} lacks {missing} of its min",
    # nodes are launched
    "launch": "{missing} of {claimant} have no room; {count} more nodes of {template} would give it",
    # somebody waits
    "next_round": "this round starts {num_granted} groups and replicas, and a round starts no more than about {most}; the next one goes on",
    "coming": "room for {missing} more is being made",
    "launching": "no room yet for {missing} more; nodes of {template} that are starting will give it, within {start_s:.0f} s",
    "tenure": "{missing} more of {workers} workers have no room yet; it comes when those who started less than {tenure_s:.0f} s ago "
    "have held their min for so long",
    "no_room": "{missing} more of {workers} workers do not fit: {idle} such workers would fit into what is idle, and nobody who ranks "
    "lower can give the rest",
    "no_node": "no node of the cluster, and none that it could launch, fits {gpus} GPUs, {cpus} CPUs and the labels [{labels}]",
    "quota": "project {project} may hold {quota} GPUs for {what} and holds {held}; {more} more would be too many",
}


def reason(rule: str, **facts: object) -> Reason:
    """The reason of one decision."""
    return Reason(rule, _WORDS[rule], facts)


def rule_names() -> frozenset[str]:
    """The rules that there are words for."""
    return frozenset(_WORDS)


def rank_words(own: Power, run: Run | None, now_s: float) -> str:
    """How a claimant ranks, in words; without a run it is serving or a reservation."""
    if own.standing == RESERVED:
        return "reserved"
    if run is None:
        return "serving"
    if own.standing in {AGED, STARVING}:
        return f"waited {waited_s(run, now_s):.0f} s, longer than any run has to"
    owed = "its guarantee is broken, " if own.standing == OWED else ""
    return f"{owed}{run.tier}, priority {run.priority}, {used_gpu_s(run, now_s) / 3600:.1f} GPU hours used"
