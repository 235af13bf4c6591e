"""Each rule of the policy on the smallest pool that shows it; decisions are compared as lines of text."""

from dataclasses import replace

import pytest

from tests.pool import truth
from tests.pool.pools import SHORT, after, changed, deployment, life, nodes, run
from tidepool.messages import (
    AskBack,
    DrainReplica,
    GrantGroup,
    LaunchNodes,
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
from tidepool.pool import decide
from tidepool.pool.reasons import rule_names

NOW_S = 800.0


def lines(plan: Plan) -> list[str]:
    """The decisions in short: `+run node`, `-run/group`, `+deployment node`, `-replica`, `*template count`."""
    shown = []
    for decision in plan.decisions:
        match decision:
            case GrantGroup(run=name, places=places):
                shown.append(f"+{name} {' '.join(f'{node}x{workers}' if workers > 1 else node for node, workers in places)}")
            case AskBack(group=group):
                shown.append(f"-{group}")
            case StartReplica(deployment=name, node=node):
                shown.append(f"+{name} {node}")
            case DrainReplica(replica=replica):
                shown.append(f"-{replica}")
            case LaunchNodes(template=template, count=count):
                shown.append(f"*{template} {count}")
    return shown


def rules_of(plan: Plan) -> set[str]:
    return {decision.reason.rule for decision in plan.decisions}


def waits(plan: Plan) -> dict[str, str]:
    return {wait.name: wait.reason.rule for wait in plan.waits}


def pool(*runs: Run, on: tuple[Node, ...] = (), now_s: float = NOW_S, **rest: object) -> Snapshot:
    return Snapshot(now_s, on or nodes(2), runs=runs, **rest)  # type: ignore[arg-type]


def names_started(plan: Plan) -> list[str]:
    return [decision.run for decision in plan.decisions if isinstance(decision, GrantGroup)]


# --- Serving first -----------------------------------------------------------------------------------------------------


def test_serving_takes_idle_room_first() -> None:
    plan = decide(pool(run("r"), deployments=(deployment("chat", 2),)), SHORT)
    assert lines(plan) == ["+chat n0", "+chat n0"]
    assert waits(plan) == {"r": "no_room"}


def test_serving_takes_what_runs_hold_above_their_min_before_it_pauses_anybody() -> None:
    wide = run("wide", 1, 2, {"n0": 0.0, "n0#": 10.0}, tier="premium")
    plan = decide(pool(wide, run("last", held={"n0": 0.0}, tier="basic"), on=nodes(3), deployments=(deployment("chat", 1),)), SHORT)
    assert lines(plan) == ["-wide/1"]
    assert waits(plan) == {"chat": "coming"}


def test_serving_pauses_the_lowest_rank_if_it_must_even_within_its_tenure() -> None:
    both = (run("gold", held={"n0": 0.0}, tier="premium"), run("tin", held={"n0": 0.0}, tier="basic", started_s=NOW_S - 1))
    plan = decide(pool(*both, deployments=(deployment("chat", 1),)), SHORT)
    assert lines(plan) == ["-tin/0"]
    assert rules_of(plan) == {"pause"}


def test_serving_stops_at_its_quota() -> None:
    plan = decide(pool(on=nodes(4), deployments=(deployment("chat", 3),), quotas=(Quota("serving", serving_gpus=1),)), SHORT)
    assert lines(plan) == ["+chat n0"]
    assert waits(plan) == {"chat": "quota"}


def test_a_premium_run_takes_replicas_that_are_kept_though_traffic_does_not_need_them() -> None:
    chat = deployment("chat", 3, ("n0", "n0", "n1"), needed=1)
    gold = run("gold", 2, 2, tier="premium")
    now = pool(run("plain"), gold, on=nodes(2, 1), deployments=(chat,))
    plan = decide(now, SHORT)
    assert sorted(lines(plan)) == ["-chat/1", "-chat/2"]
    assert waits(plan) == {"gold": "coming", "plain": "no_room"}
    for one in (*plan.decisions, *plan.waits):
        truth.check_reason(one, now, plan, SHORT)
    assert lines(decide(replace(now, runs=(replace(gold, min_groups=3, max_groups=3),)), SHORT)) == [], "one is needed"
    assert lines(decide(replace(now, runs=(replace(gold, tier="standard"),)), SHORT)) == []


def test_deployments_of_one_priority_get_the_same_part_of_what_they_want() -> None:
    plan = decide(pool(on=nodes(3), deployments=(deployment("a", 4), deployment("b", 2))), SHORT)
    assert sorted(line.split()[0] for line in lines(plan)) == ["+a", "+a", "+b"]


def test_a_deployment_of_higher_priority_comes_first() -> None:
    plan = decide(pool(deployments=(deployment("a", 2), deployment("b", 2, priority=1))), SHORT)
    assert lines(plan) == ["+b n0", "+b n0"]


def test_a_draining_replica_makes_room_that_is_coming_and_nobody_else_is_asked() -> None:
    drains = replace(deployment("old", 0, ("n0",)), replicas=(Replica("old/0", "n0", "draining"),))
    plan = decide(pool(run("r", held={"n0": 0.0}), deployments=(drains, deployment("new", 1))), SHORT)
    assert lines(plan) == []
    assert waits(plan) == {"new": "coming"}


# --- Each run to its min -----------------------------------------------------------------------------------------------


def test_mins_go_by_tier_then_priority_then_what_was_used_then_waiting() -> None:
    fair = {"held_s": 3600.0, "submitted_s": -7200.0, "as_of_s": NOW_S}
    ordered = [
        run("a", tier="premium", **fair),
        run("b", priority=1, used_gpu_s=9e9, **fair),
        run("c", waiting_since_s=500.0, **fair),
        run("d", waiting_since_s=600.0, **fair),
        run("e", used_gpu_s=9e9, **fair),
        run("f", tier="basic", priority=9, **fair),
    ]
    for room in range(1, 7):
        plan = decide(pool(*reversed(ordered), on=nodes(room), now_s=NOW_S - 300), SHORT)
        assert names_started(plan) == ["a", "b", "c", "d", "e", "f"][:room]


def test_a_run_gets_its_whole_min_or_nothing() -> None:
    plan = decide(pool(run("big", 3, 3), run("small", 1, 1, tier="basic")), SHORT)
    assert lines(plan) == ["+small n0"]


def test_others_shrink_to_their_min_before_anybody_waits() -> None:
    plan = decide(pool(run("wide", 1, 2, {"n0": 0.0, "n0#": 10.0}), run("new", waiting_since_s=NOW_S, submitted_s=NOW_S)), SHORT)
    assert lines(plan) == ["-wide/1"]
    assert waits(plan) == {"new": "coming"}


def test_asked_once_a_group_that_is_leaving_is_not_asked_for_again() -> None:
    wide = run("wide", 1, 3, {"n0": 0.0, "n0#": 10.0, "n0##": 20.0})
    leaving = replace(wide, groups=(*wide.groups[:2], replace(wide.groups[2], leaving=True)))
    plan = decide(pool(leaving, run("new", waiting_since_s=NOW_S), on=nodes(3)), SHORT)
    assert lines(plan) == []


def test_the_newest_group_goes_first() -> None:
    wide = run("wide", 1, 4, {"n0": 30.0, "n0#": 10.0, "n0##": 20.0})
    assert lines(decide(pool(wide, run("new"), on=nodes(3)), SHORT)) == ["-wide/0"]


def test_of_a_basic_run_the_groups_on_spot_nodes_go_first() -> None:
    on = (*nodes(1), *nodes(1, is_spot=True))
    for tier, gone in [("basic", "-wide/1"), ("standard", "-wide/0")]:
        wide = run("wide", 1, 2, {"n0": 30.0, "s0": 10.0}, tier=tier)
        assert lines(decide(pool(wide, run("new"), on=on), SHORT)) == [gone]


def test_basic_goes_to_spot_nodes_and_the_other_tiers_do_not_if_they_can() -> None:
    on = (*nodes(1), *nodes(1, is_spot=True))
    assert lines(decide(pool(run("r", tier="basic"), on=on), SHORT)) == ["+r s0"]
    assert lines(decide(pool(run("r", tier="premium"), on=on), SHORT)) == ["+r n0"]


def test_the_run_that_loses_least_gives() -> None:
    small, large = run("small", 1, 2, {"n0": 0.0, "n0#": 5.0}), run("large", 1, 4, {f"n1{'#' * i}": 0.0 for i in range(4)}, shards=16)
    assert lines(decide(pool(small, large, run("new"), on=nodes(2, 4)), SHORT)) == ["-large/3"]


def test_a_run_gives_what_takes_it_to_its_next_useful_size_in_one_piece() -> None:
    wide = run("wide", 1, 8, {f"n0{'#' * i}": float(i) for i in range(8)}, shards=8)
    assert len(lines(decide(pool(wide, run("new"), on=nodes(8)), SHORT))) == 4


def test_no_more_is_taken_than_the_claim_needs() -> None:
    others = [run(f"w{i}", 1, 2, {f"n{i}": 0.0, f"n{i}#": 10.0 - i}) for i in range(3)]
    pair = run("pair", 1, 1, workers_per_group=1, worker=Resources(gpus=2, cpus=1))
    giver = run("giver", 1, 3, {"n3": 0.0, "n3#": 1.0, "n3##": 2.0})
    plan = decide(pool(*others, giver, pair, on=nodes(2, 2, 2, 3)), SHORT)
    assert sorted(lines(plan)) == ["-giver/1", "-giver/2"]


def test_a_stronger_run_pauses_a_weaker_one_whole() -> None:
    weak = run("weak", 2, 2, {"n0": 0.0, "n0#": 0.0}, tier="basic")
    plan = decide(pool(weak, run("strong", tier="premium")), SHORT)
    assert sorted(lines(plan)) == ["-weak/0", "-weak/1"]
    assert "premium" in str(plan.decisions[0].reason)


def test_nobody_is_paused_within_a_tenure_or_by_an_equal() -> None:
    fresh = run("weak", held={"n0": 790.0}, tier="basic", started_s=790.0)
    assert lines(decide(pool(fresh, run("strong", tier="premium"), on=nodes(1)), SHORT)) == []
    equal = run("same", held={"n0": 0.0}, tier="basic")
    assert lines(decide(pool(equal, run("new", tier="basic"), on=nodes(1)), SHORT)) == []
    assert lines(decide(pool(equal, run("new", tier="basic", priority=1), on=nodes(1)), SHORT)) == ["-same/0"]


def test_a_run_that_lost_groups_and_cannot_get_others_gives_back_the_rest() -> None:
    broken = run("broken", 2, 2, {"n0": 0.0})
    plan = decide(pool(broken, on=nodes(1)), SHORT)
    assert lines(plan) == ["-broken/0"]
    assert rules_of(plan) == {"gang"}


def test_all_groups_of_a_run_are_of_one_kind() -> None:
    two_kinds = (*nodes(1), Node("a0", "A100", 4, 32))
    assert lines(decide(pool(run("r", 1, 4, {"n0": 0.0}, kind="H100"), on=two_kinds), SHORT)) == []
    assert lines(decide(pool(run("r", 2, 2), on=two_kinds), SHORT)) == ["+r a0", "+r a0"]


def test_labels_are_honoured() -> None:
    labelled = replace(nodes(1)[0], name="z0", labels=frozenset({"zone=z"}))
    assert lines(decide(pool(run("r", labels=frozenset({"zone=z"})), on=(*nodes(4), labelled)), SHORT)) == ["+r z0"]
    assert waits(decide(pool(run("r", labels=frozenset({"zone=q"}))), SHORT)) == {"r": "no_node"}


def test_a_gang_that_spans_nodes_is_granted_as_one() -> None:
    assert lines(decide(pool(run("r", workers_per_group=3, shards=3), on=nodes(2, 2)), SHORT)) == ["+r n1x2 n0"]


# --- Waiting too long ----------------------------------------------------------------------------------------------------


def test_who_waits_too_long_goes_before_tiers_and_priorities() -> None:
    old = run("old", tier="basic", waiting_since_s=NOW_S - SHORT.aging_s)
    gold = run("gold", tier="premium", priority=9, held_s=3600.0, submitted_s=-7200.0, as_of_s=NOW_S, waiting_since_s=NOW_S)
    plan = decide(pool(old, gold, on=nodes(1)), SHORT)
    assert names_started(plan) == ["old"]
    assert rules_of(plan) == {"aged"}


def test_a_guarantee_goes_before_waiting_too_long_unless_more_is_guaranteed_than_there_is() -> None:
    old = run("old", tier="basic", waiting_since_s=NOW_S - SHORT.aging_s)
    golds = [run(f"gold{i}", tier="premium", waiting_since_s=NOW_S - 5, submitted_s=NOW_S - 5) for i in range(2)]
    assert names_started(decide(pool(old, golds[0], on=nodes(1)), SHORT)) == ["gold0"]
    assert names_started(decide(pool(old, *golds, on=nodes(1)), SHORT)) == ["old"]


def test_who_waits_too_long_keeps_what_comes_free_until_it_fits() -> None:
    old = run("old", 2, 2, tier="basic", waiting_since_s=NOW_S - SHORT.aging_s)
    fresh = run("fresh", held={"n0": 790.0}, started_s=790.0)
    new = run("new", tier="basic", waiting_since_s=NOW_S)
    assert lines(decide(pool(old, fresh, new), SHORT)) == []
    assert names_started(decide(pool(replace(old, waiting_since_s=NOW_S), fresh, new), SHORT)) == ["new"]


def test_nothing_is_kept_for_a_run_that_the_cluster_cannot_hold() -> None:
    huge = run("huge", 5, 5, waiting_since_s=NOW_S - SHORT.aging_s)
    assert names_started(decide(pool(huge, run("new", waiting_since_s=NOW_S), on=nodes(4)), SHORT)) == ["new"]


# --- The rest ----------------------------------------------------------------------------------------------------------


def test_idle_room_speeds_runs_up_to_useful_sizes_only() -> None:
    plan = decide(pool(run("r", 1, 7, shards=8), on=nodes(7)), SHORT)
    assert len(lines(plan)) == 4  # 5, 6 and 7 of 8 shards are no faster than 4


def test_idle_room_goes_where_it_speeds_up_most() -> None:
    large, small = run("large", 1, 8, {f"n0{'#' * i}": 0.0 for i in range(4)}), run("small", 1, 8, {"n0": 0.0})
    assert names_started(decide(pool(large, small, on=nodes(8)), SHORT)) == ["small"] * 3


def test_a_measured_speed_counts_more_than_the_shards() -> None:
    slow = run("slow", 1, 2, {"n0": 0.0}, speeds=((1, 1.0), (2, 1.1)))
    fast = run("zfast", 1, 2, {"n0": 0.0}, speeds=((1, 1.0), (2, 1.9)))
    assert names_started(decide(pool(slow, fast, on=nodes(3)), SHORT)) == ["zfast"]


def test_a_better_tier_counts_more() -> None:
    plan = decide(pool(run("a", 1, 2, {"n0": 0.0}), run("b", 1, 2, {"n0": 0.0}, tier="premium"), on=nodes(3)), SHORT)
    assert names_started(plan) == ["b"]


def test_nobody_grows_so_soon_after_a_change() -> None:
    assert lines(decide(pool(run("r", 1, 2, {"n0": 0.0}, resized_s=NOW_S - SHORT.cooldown_s + 1)), SHORT)) == []
    assert lines(decide(pool(run("r", 1, 2, {"n0": 0.0}, resized_s=NOW_S - SHORT.cooldown_s)), SHORT)) == ["+r n0"]


def test_room_moves_to_where_it_helps_much_more_once_its_tenure_is_over() -> None:
    wide, small = run("wide", 1, 8, {f"n0{'#' * i}": 0.0 for i in range(8)}, shards=16), run("small", 1, 2, {"n0": 0.0})
    assert rules_of(decide(pool(wide, small, on=nodes(9)), SHORT)) == {"rebalance"}
    fresh = replace(wide, groups=tuple(replace(group, granted_s=NOW_S - 1) for group in wide.groups))
    assert lines(decide(pool(fresh, small, on=nodes(9)), SHORT)) == []


def test_room_does_not_move_for_a_small_gain() -> None:
    one, other = run("one", 1, 4, {f"n0{'#' * i}": 0.0 for i in range(4)}), run("other", 1, 4, {f"n0{'#' * i}": 0.0 for i in range(3)})
    assert lines(decide(pool(one, other, on=nodes(7)), SHORT)) == []


def test_a_run_whose_min_is_still_coming_does_not_grow() -> None:
    wide = run("wide", 1, 2, {"n1": 0.0, "n1#": 10.0})
    assert lines(decide(pool(wide, run("new", 2, 4), on=nodes(1, 2)), SHORT)) == ["-wide/1"]


# --- Notices, reservations, quotas, launches --------------------------------------------------------------------------------


def test_a_node_with_a_notice_is_vacated_in_time_and_not_before() -> None:
    def plan(left_s: float) -> Plan:
        leaves = replace(nodes(2)[0], leaves_at_s=NOW_S + left_s)
        served = deployment("chat", 1, ("n0",))
        return decide(pool(run("r", held={"n0": 0.0}), on=(leaves,), deployments=(served,)), SHORT)

    assert lines(plan(SHORT.vacate_s + 1)) == []
    assert sorted(lines(plan(SHORT.vacate_s))) == ["-chat/0", "-r/0"]
    assert {decision.deadline_s for decision in plan(5.0).decisions if isinstance(decision, AskBack)} == {NOW_S + 5.0}


def test_a_place_elsewhere_is_given_as_soon_as_the_notice_is_known() -> None:
    leaves = replace(nodes(2)[0], leaves_at_s=NOW_S + 500)
    elsewhere = Node("m0", "H100", 2, 16)
    plan = decide(pool(run("r", held={"n0": 0.0}), on=(leaves, elsewhere), deployments=(deployment("chat", 1, ("n0",)),)), SHORT)
    assert sorted(lines(plan)) == ["+chat m0", "+r m0"]


def test_a_group_on_a_node_that_is_gone_is_asked_back_and_replaced() -> None:
    plan = decide(pool(run("r", held={"lost": 0.0})), SHORT)
    assert lines(plan) == ["-r/0", "+r n0"]
    assert plan.decisions[0].reason.rule == "gone"


RESERVED = Reservation("night", "team", "H100", 2, NOW_S, NOW_S + 100)


def test_what_is_reserved_is_kept_free_and_made_free() -> None:
    assert lines(decide(pool(run("r"), reservations=(RESERVED,)), SHORT)) == []
    busy = run("r", 1, 2, {"n0": 0.0, "n0#": 0.0}, tier="premium", started_s=NOW_S)
    assert sorted(lines(decide(pool(busy, reservations=(RESERVED,)), SHORT))) == ["-r/0", "-r/1"]


def test_what_is_reserved_is_for_the_projects_runs() -> None:
    own = run("own", 2, 2, project="team", tier="basic")
    plan = decide(pool(run("r", tier="premium"), own, reservations=(RESERVED,)), SHORT)
    assert names_started(plan) == ["own", "own"]
    assert rules_of(plan) == {"reserved"}


@pytest.mark.parametrize(("now_s", "granted"), [(NOW_S - SHORT.tenure_s - 1, 1), (NOW_S - SHORT.tenure_s, 0), (NOW_S + 100, 1)])
def test_a_reservation_binds_from_a_tenure_before_its_start_to_its_end(now_s: float, granted: int) -> None:
    assert len(lines(decide(pool(run("r", submitted_s=0.0), now_s=now_s, reservations=(RESERVED,)), SHORT))) == granted


def test_before_a_reservation_starts_room_is_made_only_as_early_as_it_takes() -> None:
    busy = run("r", 2, 2, {"n0": 0.0, "n0#": 0.0})
    assert lines(decide(pool(busy, now_s=NOW_S - SHORT.vacate_s - 1, reservations=(RESERVED,)), SHORT)) == []
    assert len(lines(decide(pool(busy, now_s=NOW_S - SHORT.vacate_s, reservations=(RESERVED,)), SHORT))) == 2


def test_a_project_gets_no_more_than_its_quota() -> None:
    quotas = (Quota("p", training_gpus=2),)
    plan = decide(pool(run("a"), run("b"), run("c"), run("d", project="q"), on=nodes(9), quotas=quotas), SHORT)
    assert names_started(plan) == ["a", "b", "d"]
    assert waits(plan) == {"c": "quota"}


def test_at_its_quota_a_projects_own_runs_make_room() -> None:
    wide = run("wide", 1, 2, {"n0": 0.0, "n0#": 5.0})
    plan = decide(pool(wide, run("new"), on=nodes(9), quotas=(Quota("p", training_gpus=2),)), SHORT)
    assert lines(plan) == ["-wide/1"]
    assert rules_of(plan) == {"project"}
    assert waits(plan) == {"new": "coming"}


def test_at_its_quota_nobody_is_asked_for_a_run_that_would_have_no_room_even_then() -> None:
    wide, large = run("wide", 1, 2, {"n0": 0.0, "n0#": 5.0}), run("large", worker=Resources(gpus=2, cpus=1))
    plan = decide(pool(wide, large, on=nodes(2), quotas=(Quota("p", training_gpus=3),)), SHORT)
    assert lines(plan) == []
    assert waits(plan) == {"large": "quota"}


def test_what_is_leaving_counts_for_the_quota_until_it_has_left() -> None:
    wide = run("wide", 1, 2, {"n0": 0.0, "n0#": 5.0})
    leaving = replace(wide, groups=(wide.groups[0], replace(wide.groups[1], leaving=True)))
    plan = decide(pool(leaving, run("new"), on=nodes(9), quotas=(Quota("p", training_gpus=2),)), SHORT)
    assert lines(plan) == []
    assert waits(plan) == {"new": "coming"}


def spot_nodes(available: int, launching: int = 0) -> tuple[Template, ...]:
    return (Template("big", "H100", 4, 32, available, launching=launching, start_s=90.0),)


def test_nodes_are_launched_for_what_has_no_room_and_no_more_than_that() -> None:
    plan = decide(pool(run("r", 6, 6), on=nodes(1), templates=spot_nodes(9)), SHORT)
    assert lines(plan) == ["*big 2"]
    assert waits(plan) == {"r": "launching"}


def test_nodes_that_are_starting_are_waited_for_and_not_launched_again() -> None:
    assert lines(decide(pool(run("r", 6, 6), on=nodes(1), templates=spot_nodes(9, launching=2)), SHORT)) == []
    assert lines(decide(pool(run("r", 6, 6), run("q", 3, 3), on=nodes(1), templates=spot_nodes(9, launching=2)), SHORT)) == ["*big 1"]


def test_nobody_is_paused_for_a_run_that_nodes_can_be_launched_for() -> None:
    weak = run("weak", held={"n0": 0.0}, tier="basic")
    strong = run("strong", tier="premium")
    assert lines(decide(pool(weak, strong, on=nodes(1), templates=spot_nodes(1)), SHORT)) == ["*big 1"]
    assert lines(decide(pool(weak, strong, on=nodes(1), templates=spot_nodes(0)), SHORT)) == ["-weak/0"]


def test_serving_launches_what_it_cannot_get() -> None:
    plan = decide(pool(on=nodes(1), deployments=(deployment("chat", 6),), templates=spot_nodes(1)), SHORT)
    assert lines(plan) == ["+chat n0", "*big 1"]
    assert [(wait.missing, wait.reason.rule) for wait in plan.waits] == [(4, "launching"), (1, "no_room")]


def test_nothing_is_launched_for_growth() -> None:
    assert lines(decide(pool(run("r", 1, 8, {"n0": 0.0}), on=nodes(1), templates=spot_nodes(9)), SHORT)) == []


NO_GPUS = (Node("c0", "cpu", 0, 4),)


def test_basic_runs_launch_spot_nodes_first_and_others_spot_nodes_last() -> None:
    spot = Template("spot", "H100", 1, 8, 1, is_spot=True)
    templates = (Template("demand", "H100", 1, 8, 1), spot)
    for tier, expected in {"basic": "*spot 1", "standard": "*demand 1", "premium": "*demand 1"}.items():
        assert lines(decide(pool(run("r", tier=tier), on=NO_GPUS, templates=templates), SHORT)) == [expected]
    assert lines(decide(pool(deployments=(deployment("chat", 1),), on=NO_GPUS, templates=templates), SHORT)) == ["*demand 1"]
    coming = (replace(templates[0], available=0, launching=1), spot)
    assert lines(decide(pool(run("r", tier="basic"), on=NO_GPUS, templates=coming), SHORT)) == []  # what comes anyway will do
    without = (templates[0], replace(spot, available=0))
    assert lines(decide(pool(run("r", tier="basic"), on=NO_GPUS, templates=without), SHORT)) == ["*demand 1"]


def test_the_nodes_that_leave_the_least_unused_are_launched() -> None:
    templates = (Template("big", "H100", 8, 64, 2), Template("small", "H100", 1, 8, 9))
    assert lines(decide(pool(run("r"), on=NO_GPUS, templates=templates), SHORT)) == ["*small 1"]
    assert lines(decide(pool(run("r", workers_per_group=8, shards=8), on=NO_GPUS, templates=templates), SHORT)) == ["*big 1"]
    assert lines(decide(pool(run("r", 3, 3), on=NO_GPUS, templates=templates), SHORT)) == ["*small 3"]
    assert lines(decide(pool(run("r", 10, 10, shards=16), on=NO_GPUS, templates=templates), SHORT)) == ["*big 2"]


def test_serving_launches_spot_nodes_for_what_others_have_no_room_for() -> None:
    templates = (Template("spot", "H100", 1, 8, 9, is_spot=True), Template("demand", "H100", 1, 8, 2))
    served = deployment("chat", 3)
    assert lines(decide(pool(on=NO_GPUS, deployments=(served,), templates=templates), SHORT)) == ["*demand 2"]
    rest = (templates[0], replace(templates[1], available=0, launching=0))
    assert lines(decide(pool(on=NO_GPUS, deployments=(served,), templates=rest), SHORT)) == ["*spot 3"]


# --- Over several rounds ----------------------------------------------------------------------------------------------------


def test_a_tide_comes_in_and_goes_out() -> None:
    """Serving takes what it needs from training and training takes it back, with a few decisions each time."""
    start = Snapshot(0.0, nodes(8), (deployment("chat", 0),), (run("r", 1, 8),))
    low = after(start, 10, SHORT)
    assert len(low.runs[0].groups) == 8
    high = after(changed(low, "chat", wanted=4), 10, SHORT)
    assert (len(high.runs[0].groups), len(high.deployments[0].replicas)) == (4, 4)
    again = after(changed(high, "chat", wanted=0), 10, SHORT)
    assert len(again.runs[0].groups) == 8


def test_a_wobble_in_what_serving_wants_does_not_make_a_run_flap() -> None:
    now = after(Snapshot(0.0, nodes(8), (deployment("chat", 3),), (run("r", 1, 8),)), 10, SHORT)
    changes = 0
    for turn in range(20):
        rounds = list(life(changed(now, "chat", wanted=3 + turn % 2), 2, SHORT, seconds=1.0))
        changes += sum(isinstance(decision, GrantGroup) for _, plan in rounds for decision in plan.decisions)
        now = rounds[-1][0]
    assert changes <= 2


def test_one_round_grants_no_more_than_it_may_and_the_next_goes_on() -> None:
    few = replace(SHORT, max_grants=3)
    lived = list(life(pool(*(run(f"r{i}") for i in range(8)), on=nodes(9), deployments=(deployment("chat", 1),)), 4, few))
    assert [len(lines(plan)) for _, plan in lived] == [3, 3, 3, 0]
    assert [len(plan.waits) for _, plan in lived] == [6, 3, 0, 0]
    for now, plan in lived:
        for decision in (*plan.decisions, *plan.waits):
            truth.check_reason(decision, now, plan, few)


def test_the_truth_of_every_rule_is_checked() -> None:
    assert {name.removeprefix("_check_") for name in vars(truth) if name.startswith("_check_")} == rule_names()
