"""What the policy does with nodes in quarantine and with those that are being checked."""

from dataclasses import replace

from tests.pool.pools import deployment, nodes, run
from tests.pool.truth import check_reason
from tidepool.messages import AskBack, DrainReplica, GrantGroup, LaunchNodes, Snapshot, Template
from tidepool.pool import Rules, decide
from tidepool.pool.admission import held_back, without_quarantined

NOW_S = 100_000.0
WHY = "the disk of /tmp is full: 1 MB of 1,000 MB are free"


def test_what_is_on_a_node_in_quarantine_is_asked_back_with_the_reason_and_goes_elsewhere() -> None:
    there = without_quarantined(nodes(2, 2), {"n0": WHY, "gone": "x"}, NOW_S)
    held = run("wide", 1, 1, {"n0": 0.0}, started_s=0.0)
    snapshot = Snapshot(NOW_S, there, (deployment("chat", 1, ("n0",)),), (held,))
    plan = decide(snapshot)
    [back] = [decision for decision in plan.decisions if isinstance(decision, AskBack)]
    [drained] = [decision for decision in plan.decisions if isinstance(decision, DrainReplica)]
    assert str(back.reason) == str(drained.reason) == f"node n0 is in quarantine: {WHY}"
    check_reason(back, snapshot, plan, Rules())
    grants = [decision for decision in plan.decisions if isinstance(decision, GrantGroup)]
    assert [grant.places for grant in grants] == [(("n1", 1),)]


def test_nobody_comes_to_a_node_that_is_being_checked_and_no_other_is_launched_for_it() -> None:
    pool, starting = held_back(nodes(1, 1), frozenset({"n1"}))
    assert [node.name for node in pool] == ["n0"]
    more = Template("more", "H100", 1, 8, available=5)
    claimants = (run("first", 1, 1), run("second", 1, 1))
    plan = decide(Snapshot(NOW_S, pool, runs=claimants, templates=(*starting, more)))
    assert [grant.places for grant in plan.decisions if isinstance(grant, GrantGroup)] == [(("n0", 1),)]
    assert not [decision for decision in plan.decisions if isinstance(decision, LaunchNodes)]
    assert "n1 (being checked)" in str(plan.waits[0].reason)
    everybody = decide(Snapshot(NOW_S, tuple(replace(node) for node in nodes(1, 1)), runs=claimants, templates=(more,)))
    assert len([grant for grant in everybody.decisions if isinstance(grant, GrantGroup)]) == 2
