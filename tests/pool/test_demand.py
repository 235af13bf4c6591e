"""What the autoscaler is told."""

from typing import Any

from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated import common_pb2
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, NodeState
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind

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


# --- What Ray's own scheduler makes of it ------------------------------------------------------------------------------------

TYPES = (
    Template("large", "cpu", 0, 4, 1, frozenset({"ray.io/node-group=large"})),
    Template("small", "cpu", 0, 2, 4, frozenset({"ray.io/node-group=small"})),
    Template("spot", "cpu", 0, 2, 4, frozenset({"ray.io/node-group=spot"}), is_spot=True),
)


def labels_of(template: Template) -> dict[str, str]:
    return dict(label.split("=") for label in template.labels)


def instance(name: str, template: Template, idle_s: float | None = None) -> AutoscalerInstance:
    """A node that starts, or one that is up and has been idle for so long (0: it is busy)."""
    status = Instance.ALLOCATED if idle_s is None else Instance.RAY_RUNNING
    own = Instance(instance_id=name, instance_type=template.name, status=status, node_kind=NodeKind.WORKER, node_id=name)
    if idle_s is None:
        return AutoscalerInstance(cloud_instance_id=name, im_instance=own)
    total = {"CPU": float(template.cpus)}
    node = NodeState(node_id=name.encode(), total_resources=total, available_resources=total if idle_s else {}, labels=labels_of(template))
    node.idle_duration_ms = int(idle_s * 1000)
    return AutoscalerInstance(cloud_instance_id=name, im_instance=own, ray_node=node)


def rays_answer(wanted: dict[str, int], *instances: AutoscalerInstance) -> tuple[dict[str, int], set[str]]:
    """How many nodes of which types Ray's scheduler launches, and which instances it ends."""
    bundles, selectors = as_bundles(wanted, TYPES)
    equal = common_pb2.LABEL_OPERATOR_IN
    requests = [
        ResourceRequestUtil.make(bundle, label_selectors=[[(key, equal, [value]) for key, value in selector.items()]])
        for bundle, selector in zip(bundles, selectors, strict=True)
    ]
    constraint = ClusterResourceConstraint(resource_requests=ResourceRequestUtil.group_by_count(requests))
    types = {
        template.name: NodeTypeConfig(template.name, 0, template.available, resources={"CPU": template.cpus}, labels=labels_of(template))
        for template in TYPES
    }
    asked = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=9,
        idle_timeout_s=60,
        cluster_resource_constraints=[constraint] if wanted else [],
        current_instances=list(instances),
    )
    reply = ResourceDemandScheduler().schedule(asked)
    return {one.instance_type: one.count for one in reply.to_launch}, {one.instance_id for one in reply.to_terminate}


def test_ray_launches_nodes_of_the_types_that_are_asked_for() -> None:
    assert rays_answer({"spot": 2, "large": 1}) == ({"spot": 2, "large": 1}, set())


def test_ray_counts_nodes_that_are_up_busy_or_not_and_those_that_start() -> None:
    _, small, spot = TYPES
    there = instance("busy", small, 0.0), instance("idle", small, 5.0), instance("starts", small), instance("other", spot, 5.0)
    assert rays_answer({"small": 4}, *there) == ({"small": 1}, set())
    assert rays_answer({"small": 3}, *there) == ({}, set())


def test_ray_ends_idle_nodes_of_a_type_of_which_nothing_is_asked_for() -> None:
    _, small, spot = TYPES
    there = instance("busy", small, 0.0), instance("idle", small, 61.0), instance("kept", spot, 61.0)
    assert rays_answer({"spot": 1}, *there) == ({}, {"idle"})
    assert rays_answer({}, *there) == ({}, {"idle", "kept"})
