"""From Ray's tables to what the arbiter sees of the cluster. Pure: takes plain values, knows no Ray.

Invariants:
- GPUs and CPUs are counted whole, rounded down.
- Nothing can be placed on a node that is being drained.
- A node type of which the autoscaler has lately got no node is offered with none available, so that another is asked for.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidepool.messages import COORDINATOR_PREFIX, ClusterView, Node, ReplicaActor, Resources, Template

NODE_TYPE_LABEL = "ray.io/node-group"
"""Ray's label of a node's type in the autoscaler's configuration."""
DEVICE_LABEL = "tidepool-device"
"""Says what a node computes with, where Ray does not know: it tells accelerators apart, but not processors."""
_ACCELERATOR_LABEL = "ray.io/accelerator-type"
_ACCELERATOR_PREFIX = "accelerator_type:"
_MARKET_LABEL = "ray.io/market-type"
_DOMAIN_LABELS = "rack", "ray.io/availability-zone"
NODE_ID_LABEL = "ray.io/node-id"
_REPLICA_PREFIX = "SERVE_REPLICA::"
_SERVE_NAMESPACE = "serve"
_NO_CAPACITY_S = 600.0
"""So long after a launch failed the type is not asked for again."""
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Actor:
    """A row of Ray's table of actors, of one that is not dead. `node` is "" while it has none."""

    name: str
    namespace: str
    node: str
    is_alive: bool
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Autoscaler:
    """What Ray's autoscaler is told and says: its configuration file, nodes that start and launches that failed, by node type.

    `failed` is when one last failed, in seconds since 1970. All empty where there is no autoscaler.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    launching: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tables:
    """What Ray says now. `nodes` as in `ray.nodes()`; `draining` is milliseconds since 1970 by node, 0 for no deadline."""

    nodes: Sequence[Mapping[str, Any]]
    available: Mapping[str, Mapping[str, float]]
    draining: Mapping[str, int]
    actors: Sequence[Actor]
    autoscaler: Autoscaler = Autoscaler()


def view(tables: Tables, now_s: float, namespace: str) -> ClusterView:
    """What the arbiter sees. `namespace` is that of our own actors."""
    nodes = tuple(_node(row, tables.draining, now_s) for row in tables.nodes if row["Alive"])
    up = {node.name for node in nodes}
    replicas = (_replica(actor, up) for actor in tables.actors if actor.namespace == _SERVE_NAMESPACE)
    return ClusterView(
        nodes=nodes,
        free={name: Resources(0, 0) if name in tables.draining else _whole(tables.available.get(name, {})) for name in up},
        replicas=tuple(replica for replica in replicas if replica is not None),
        templates=_templates(tables.autoscaler, nodes, now_s),
        runs=frozenset(_runs(tables.actors, namespace)),
    )


def type_of(node: Node) -> str:
    """The name of a node's type in the autoscaler's configuration, "" if it has none."""
    prefix = f"{NODE_TYPE_LABEL}="
    return next((label.removeprefix(prefix) for label in node.labels if label.startswith(prefix)), "")


def _node(row: Mapping[str, Any], draining: Mapping[str, int], now_s: float) -> Node:
    name, resources, labels = row["NodeID"], row["Resources"], row["Labels"]
    whole = _whole(resources)
    return Node(
        name=name,
        kind=_kind(resources, labels),
        gpus=whole.gpus,
        cpus=whole.cpus,
        labels=_label_set(labels),
        is_spot=labels.get(_MARKET_LABEL) == "spot",
        domain=next((labels[label] for label in _DOMAIN_LABELS if label in labels), ""),
        leaves_at_s=(draining[name] / 1000 or now_s) if name in draining else None,
    )


def _kind(resources: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """The device type, as far as Ray can tell. Where it cannot, a worker with another fingerprint is refused by its run."""
    device = labels.get(DEVICE_LABEL)
    if resources.get("GPU", 0) < 1:
        return device or "cpu"
    by_resource = (name.removeprefix(_ACCELERATOR_PREFIX) for name in resources if name.startswith(_ACCELERATOR_PREFIX))
    return device or labels.get(_ACCELERATOR_LABEL) or next(by_resource, "gpu")


def _label_set(labels: Mapping[str, str]) -> frozenset[str]:
    return frozenset(f"{key}={value}" for key, value in labels.items() if key != NODE_ID_LABEL)


def _whole(resources: Mapping[str, float]) -> Resources:
    return Resources(int(resources.get("GPU", 0) + _ROUNDING), int(resources.get("CPU", 0) + _ROUNDING))


def _replica(actor: Actor, up: set[str]) -> ReplicaActor | None:
    """An actor of Serve's as a replica; None if it is something else, or needs no room. A part of a GPU or CPU is one, as its wish says."""
    resources = Resources(*(math.ceil(actor.resources.get(name, 0) - _ROUNDING) for name in ("GPU", "CPU")))
    if not actor.name.startswith(_REPLICA_PREFIX) or resources == Resources(0, 0):
        return None
    *application, deployment, _ = actor.name.removeprefix(_REPLICA_PREFIX).split("#")
    node = actor.node if actor.node in up else ""
    return ReplicaActor(application[0] if application else "", deployment, actor.name, node, actor.is_alive, resources)


def _runs(actors: Iterable[Actor], namespace: str) -> Iterable[str]:
    for actor in actors:
        if actor.namespace == namespace and actor.name.startswith(COORDINATOR_PREFIX):
            yield actor.name.removeprefix(COORDINATOR_PREFIX)


def _templates(autoscaler: Autoscaler, nodes: Iterable[Node], now_s: float) -> tuple[Template, ...]:
    """The node types that could be launched, in the order of the configuration."""
    config, launching = autoscaler.config, autoscaler.launching
    head = config.get("head_node_type")
    up = Counter(type_of(node) for node in nodes if node.leaves_at_s is None)
    types = {name: of for name, of in (config.get("available_node_types") or {}).items() if name != head}
    left = config.get("max_workers", 0) - sum(up[name] + launching.get(name, 0) for name in types)
    found = []
    for name, node_type in types.items():
        resources, labels = node_type.get("resources") or {}, node_type.get("labels") or {}
        whole = _whole(resources)
        available = min(node_type.get("max_workers", config.get("max_workers", 0)) - up[name] - launching.get(name, 0), left)
        has_capacity = now_s - autoscaler.failed.get(name, 0.0) >= _NO_CAPACITY_S
        found.append(
            Template(
                name=name,
                kind=_kind(resources, labels),
                gpus=whole.gpus,
                cpus=whole.cpus,
                available=max(0, available) if has_capacity else 0,
                labels=_label_set(labels),
                is_spot=labels.get(_MARKET_LABEL) == "spot",
                launching=launching.get(name, 0),
            )
        )
    return tuple(found)
