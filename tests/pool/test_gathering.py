"""Room for a run that needs several places at once: what comes free is kept together, and nobody takes the rest one by one."""

from dataclasses import replace
from typing import Any

import pytest

from tests.pool import truth
from tests.pool.pools import SHORT, life, nodes, run
from tidepool.messages import AskBack, GrantGroup, Node, Run, Snapshot
from tidepool.pool import decide

NOW_S = 3600.0


def waiting(name: str, smallest: int = 1, waited_s: float = 0.0, **rest: Any) -> Run:
    """A basic run that has waited so long, unless `rest` says otherwise."""
    return run(name, smallest, smallest, **({"tier": "basic", "waiting_since_s": NOW_S - waited_s, "as_of_s": NOW_S} | rest))


def holder(name: str, tier: str, for_s: float = NOW_S) -> Run:
    """A run that holds its min of one group for so long, and held it all the time before."""
    whole = {"held_s": SHORT.window_s, "submitted_s": NOW_S - 2 * SHORT.window_s}
    return run(name, held={"n0": NOW_S - for_s}, tier=tier, started_s=NOW_S - for_s, as_of_s=NOW_S, **whole)


def asked(*runs: Run, on: tuple[Node, ...] = ()) -> list[str]:
    """Who is asked for a group in the pool of two GPUs."""
    return [d.run for d in decide(Snapshot(NOW_S, on or nodes(2), runs=runs), SHORT).decisions if isinstance(d, AskBack)]


OLD = waiting("old", 2, 2 * SHORT.aging_s)
FRESH = holder("fresh", "premium", for_s=SHORT.tenure_s - 1.0)


def test_who_waited_less_does_not_take_one_of_the_places_that_who_waited_longer_needs() -> None:
    able, later = holder("able", "premium"), waiting("later", 1, SHORT.aging_s)
    assert asked(able, FRESH, later) == ["able"]
    assert asked(able, FRESH, later, OLD) == []
    assert sorted(asked(able, holder("other", "premium"), later, OLD)) == ["able", "other"]


def test_meanwhile_a_guaranteed_run_still_takes_the_place_of_one_that_is_not() -> None:
    gold = waiting("gold", tier="premium", held_s=SHORT.window_s, submitted_s=NOW_S - 2 * SHORT.window_s)
    assert asked(holder("b", "basic"), FRESH, gold, OLD) == ["b"]
    assert asked(holder("s", "standard"), FRESH, gold) == ["s"]
    assert asked(holder("s", "standard"), FRESH, gold, OLD) == []


def test_meanwhile_a_run_without_a_guarantee_takes_nobodys_place() -> None:
    urgent = waiting("urgent", priority=1)
    assert asked(holder("b", "basic"), FRESH, urgent) == ["b"]
    assert asked(holder("b", "basic"), FRESH, urgent, OLD) == []


def test_nobody_who_waits_in_vain_holds_the_others_up() -> None:
    """The cluster cannot hold it, so that nothing is gathered for it."""
    urgent = waiting("urgent", priority=1)
    assert asked(holder("b", "basic"), FRESH, urgent, replace(OLD, min_groups=3, max_groups=3)) == ["b"]


@pytest.mark.parametrize("tier", ["standard", "premium"])
def test_a_guaranteed_gang_is_not_kept_out_by_runs_that_take_turns(tier: Any) -> None:
    """Three basic runs hold a GPU each, their tenures end one after the other, and dozens wait too long to take their places."""
    gang = waiting("gang", 3, tier=tier, held_s=SHORT.guarantees[tier] * SHORT.window_s, submitted_s=NOW_S - 2 * SHORT.window_s)
    turns = [holder(f"turn{i}", "basic", for_s=20.0 * i) for i in range(3)]
    aged = [waiting(f"aged{i}", 1, SHORT.aging_s + i) for i in range(40)]
    lived = list(life(Snapshot(NOW_S, nodes(3), runs=(gang, *turns, *aged)), 10, SHORT))
    for now, plan in lived:
        for decision in (*plan.decisions, *plan.waits):
            truth.check_reason(decision, now, plan, SHORT)
    assert lived[0][1].waits[0].reason.rule == "tenure"
    back_s = [now.now_s - NOW_S for now, plan in lived if any(isinstance(d, GrantGroup) and d.run == "gang" for d in plan.decisions)]
    assert back_s == [SHORT.return_s]


def test_what_comes_free_is_kept_for_a_gang_that_only_tenures_keep_out() -> None:
    gang = waiting("gang", 2, tier="standard", held_s=0.0, submitted_s=NOW_S - SHORT.window_s)
    turn, small = holder("turn", "basic", for_s=SHORT.tenure_s - 1.0), waiting("small")
    plan = decide(Snapshot(NOW_S, nodes(2), runs=(gang, turn, small)), SHORT)
    assert plan.decisions == ()
    assert {wait.name: wait.reason.rule for wait in plan.waits} == {"gang": "tenure", "small": "no_room"}


def test_a_gang_that_no_tenure_keeps_out_gathers_nothing() -> None:
    """Who holds cannot spare its place, so that it is not a matter of a tenure: what is idle goes to others."""
    gang = waiting("gang", 2, tier="standard", held_s=0.0, submitted_s=NOW_S - SHORT.window_s)
    worn = replace(holder("worn", "premium"), held_s=0.0)
    plan = decide(Snapshot(NOW_S, nodes(2), runs=(gang, worn, waiting("small"))), SHORT)
    assert [d.run for d in plan.decisions if isinstance(d, GrantGroup)] == ["small"]


def test_no_guarantee_is_broken_for_another_where_all_can_be_kept() -> None:
    """The one who waits has used less, so that it ranks before the one who holds; but the basic run's tenure is soon over."""
    owed = waiting("owed", tier="standard", submitted_s=NOW_S - SHORT.window_s)
    worn = replace(holder("worn", "standard"), held_s=0.0, as_of_s=NOW_S - 0.7 * SHORT.window_s, used_gpu_s=1e6)
    turn = holder("turn", "basic", for_s=SHORT.tenure_s - 1.0)
    assert asked(worn, turn, owed) == []
    assert asked(worn, owed, on=nodes(1)) == ["worn"]


def test_room_is_kept_on_nodes_that_could_hold_the_run() -> None:
    on = (Node("a0", "A100", 1, 8), *nodes(2))
    small = waiting("small")
    plan = decide(Snapshot(NOW_S, on, runs=(FRESH, OLD, small)), SHORT)
    assert [(d.run, d.places) for d in plan.decisions if isinstance(d, GrantGroup)] == [("small", (("a0", 1),))]
