"""From Ray's tables to a view of the cluster."""

from dataclasses import replace
from typing import Any

from tidepool.messages import ReplicaActor, Resources, Template
from tidepool.pool.tables import Actor, Autoscaler, Tables, type_of, view

NOW_S = 1_700_000_000.0
NO_TABLES = Tables(nodes=(), available={}, draining={}, actors=())
CONFIG = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 8}, "max_workers": 0},
        "big": {"resources": {"CPU": 96, "GPU": 8, "accelerator_type:H100": 1}, "max_workers": 2},
        "spot": {"resources": {"CPU": 16, "GPU": 1}, "max_workers": 4, "labels": {"ray.io/market-type": "spot", "rack": "r1"}},
    },
}


def row(name: str, resources: dict[str, float], labels: dict[str, str] | None = None, is_alive: bool = True) -> dict[str, Any]:
    """A row of `ray.nodes()`, as far as it is read."""
    return {"NodeID": name, "Alive": is_alive, "Resources": resources, "Labels": {"ray.io/node-id": name} | (labels or {})}


def replica(name: str, node: str = "a", is_alive: bool = True, **resources: float) -> Actor:
    return Actor(name, "serve", node, is_alive, resources)


def test_nodes_that_are_up_are_seen_with_whole_devices_kind_labels_and_rack() -> None:
    nodes = (
        row("a", {"CPU": 8.0, "memory": 1e9}, {"ray.io/availability-zone": "z1"}),
        row("b", {"CPU": 15.5, "GPU": 2.0, "accelerator_type:A100": 1.0}, {"ray.io/market-type": "spot", "rack": "r1"}),
        row("c", {"CPU": 4.0, "GPU": 1.0}, {"ray.io/accelerator-type": "L4", "ray.io/market-type": "on-demand"}),
        row("d", {"CPU": 4.0, "GPU": 1.0}),
        row("e", {"CPU": 4.0}, {"tidepool-device": "arm"}),
        row("gone", {"CPU": 4.0}, is_alive=False),
    )
    a, b, c, d, e = view(replace(NO_TABLES, nodes=nodes), NOW_S, "ours").nodes
    assert (a.kind, a.gpus, a.cpus, a.domain, a.is_spot, a.labels) == ("cpu", 0, 8, "z1", False, {"ray.io/availability-zone=z1"})
    assert (b.kind, b.gpus, b.cpus, b.domain, b.is_spot) == ("A100", 2, 15, "r1", True)
    assert (c.kind, c.is_spot, d.kind, e.kind) == ("L4", False, "gpu", "arm")


def test_a_node_that_is_drained_leaves_at_its_deadline_or_now_and_has_no_room() -> None:
    nodes = tuple(row(name, {"CPU": 4.0}) for name in "abc")
    tables = replace(NO_TABLES, nodes=nodes, draining={"a": 1_700_000_060_500, "b": 0}, available={name: {"CPU": 4.0} for name in "abc"})
    seen = view(tables, NOW_S, "ours")
    assert [node.leaves_at_s for node in seen.nodes] == [NOW_S + 60.5, NOW_S, None]
    assert seen.free == {"a": Resources(0, 0), "b": Resources(0, 0), "c": Resources(0, 4)}


def test_what_is_free_is_counted_whole() -> None:
    nodes = (row("a", {"CPU": 4.0, "GPU": 2.0}), row("full", {"CPU": 4.0}))
    seen = view(replace(NO_TABLES, nodes=nodes, available={"a": {"CPU": 2.9999999999, "GPU": 1.5}, "gone": {"CPU": 9.0}}), NOW_S, "ours")
    assert seen.free == {"a": Resources(1, 3), "full": Resources(0, 0)}


def test_replicas_that_need_room_are_seen_whether_they_run_or_pend() -> None:
    actors = (
        replica("SERVE_REPLICA::app#engine#x1", CPU=1.0),
        replica("SERVE_REPLICA::app#engine#x2", node="", is_alive=False, GPU=1.0, CPU=2.0),
        replica("SERVE_REPLICA::engine#x3", node="ff" * 28),
        replica("SERVE_REPLICA::engine#x4", node="ff" * 28, CPU=1.0),
        replica("SERVE_REPLICA::app#engine#x6", GPU=0.25, CPU=1.5),
        replica("SERVE_CONTROLLER_ACTOR", CPU=1.0),
        replace(replica("SERVE_REPLICA::app#engine#x5", CPU=1.0), namespace="another"),
    )
    seen = view(replace(NO_TABLES, nodes=(row("a", {"CPU": 4.0}),), actors=actors), NOW_S, "ours")
    assert seen.replicas == (
        ReplicaActor("app", "engine", "SERVE_REPLICA::app#engine#x1", "a", True, Resources(0, 1)),
        ReplicaActor("app", "engine", "SERVE_REPLICA::app#engine#x2", "", False, Resources(1, 2)),
        ReplicaActor("", "engine", "SERVE_REPLICA::engine#x4", "", True, Resources(0, 1)),
        ReplicaActor("app", "engine", "SERVE_REPLICA::app#engine#x6", "a", True, Resources(1, 2)),
    )


def test_runs_are_those_that_have_a_coordinator() -> None:
    coordinator = Actor("tidepool-run-tides", "ours", "a", True, {})
    others = (Actor("tidepool-run-other", "theirs", "a", True, {}), Actor("tidepool-arbiter", "ours", "a", True, {}))
    assert view(replace(NO_TABLES, actors=(coordinator, *others)), NOW_S, "ours").runs == {"tides"}


def test_what_could_be_launched_is_what_the_configuration_has_left() -> None:
    types = {"ray.io/node-group": "big"}, {"ray.io/node-group": "spot"}, {"ray.io/node-group": "head"}
    nodes = tuple(row(f"n{number}", {"CPU": 1.0}, labels) for number, labels in enumerate(types))
    autoscaler = Autoscaler(CONFIG, launching={"spot": 2})
    big, spot = view(replace(NO_TABLES, nodes=nodes, autoscaler=autoscaler), NOW_S, "ours").templates
    assert big == Template("big", "H100", 8, 96, available=1)
    labels = frozenset({"ray.io/market-type=spot", "rack=r1"})
    assert spot == Template("spot", "gpu", 1, 16, available=1, labels=labels, is_spot=True, launching=2)


def test_no_more_nodes_are_offered_than_the_cluster_may_have() -> None:
    seen = view(replace(NO_TABLES, autoscaler=Autoscaler(CONFIG | {"max_workers": 3}, launching={"spot": 2})), NOW_S, "ours")
    assert [template.available for template in seen.templates] == [1, 1]


def test_a_node_that_leaves_makes_room_for_another_of_its_type() -> None:
    nodes = tuple(row(name, {"CPU": 1.0}, {"ray.io/node-group": "big"}) for name in "ab")
    tables = replace(NO_TABLES, nodes=nodes, autoscaler=Autoscaler(CONFIG))
    assert view(tables, NOW_S, "ours").templates[0].available == 0
    assert view(replace(tables, draining={"a": 0}), NOW_S, "ours").templates[0].available == 1


def test_a_type_that_could_not_be_had_lately_is_not_offered() -> None:
    def available(failed_s: float) -> int:
        return view(replace(NO_TABLES, autoscaler=Autoscaler(CONFIG, failed={"spot": failed_s})), NOW_S, "ours").templates[1].available

    assert (available(NOW_S - 599.0), available(NOW_S - 600.0)) == (0, 4)


def test_a_node_without_a_type_has_none() -> None:
    nodes = row("a", {"CPU": 1.0}, {"ray.io/node-group": "big"}), row("b", {"CPU": 1.0}, {"x": "ray.io/node-group=big"})
    assert [type_of(node) for node in view(replace(NO_TABLES, nodes=nodes), NOW_S, "ours").nodes] == ["big", ""]
