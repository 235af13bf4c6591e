"""What the autoscaler is told."""

from typing import Any

from tidepool.messages import ClusterView, LaunchNodes, Node, Reason, Template
from tidepool.pool.demand import as_bundles, levels

WHY = Reason("launch", "")


def seen(up: int, leaving: int = 0, **template: Any) -> ClusterView:
    """A cluster of `up` nodes of type `t`, and some more that leave."""
    labels = frozenset({"ray.io/node-group=t"})
    nodes = tuple(Node(f"n{i}", "gpu", 1, 8, labels, leaves_at_s=1.0 if i >= up else None) for i in range(up + leaving))
    head = Node("head", "cpu", 0, 8, frozenset({"ray.io/node-group=head"}))
    templates = (Template("t", "gpu", 1, 8, **({"available": 9} | template)), Template("other", "gpu", 8, 8, 9))
    return ClusterView((head, *nodes), {}, templates=templates)


def test_nothing_is_asked_for_while_nothing_is_launched_so_that_idle_nodes_end() -> None:
    assert levels(seen(3), (), {"t": 4}) == {}


def test_what_is_launched_comes_on_top_of_what_there_is() -> None:
    assert levels(seen(3, launching=1), (LaunchNodes("t", 2, WHY), LaunchNodes("t", 1, WHY)), {}) == {"t": 7}


def test_a_level_stays_while_what_was_asked_for_becomes_nodes() -> None:
    before: dict[str, int] = {}
    for view, launches in (
        (seen(1), (LaunchNodes("t", 2, WHY),)),  # asked for
        (seen(1, launching=2), ()),
        (seen(2, launching=2), ()),  # one has come, and still counts as starting
        (seen(2, launching=1), ()),
    ):
        before = dict(levels(view, launches, before))
        assert before == {"t": 3}
    assert levels(seen(3), (), before) == {}


def test_nodes_that_start_for_others_are_not_asked_for() -> None:
    assert levels(seen(1, launching=2), (), {}) == {}


def test_a_level_falls_with_nodes_that_are_lost() -> None:
    assert levels(seen(0, launching=1), (), {"t": 3}) == {"t": 1}


def test_a_node_that_leaves_is_not_counted_on() -> None:
    assert levels(seen(1, leaving=1), (LaunchNodes("t", 1, WHY),), {}) == {"t": 2}


def test_bundles_are_whole_nodes_with_the_labels_of_their_type() -> None:
    templates = Template("g", "gpu", 2, 8, 9, frozenset({"rack=r1", "ray.io/market-type=spot"})), Template("c", "cpu", 0, 4, 9)
    bundles, selectors = as_bundles({"g": 2, "c": 1}, templates)
    assert bundles == [{"CPU": 8.0, "GPU": 2.0}] * 2 + [{"CPU": 4.0}]
    assert selectors == [{"rack": "r1", "ray.io/market-type": "spot"}] * 2 + [{}]
