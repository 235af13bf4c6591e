"""The nodes as the policy is to see them, without those that nobody is to use. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tidepool.messages import Node, Template

_CHECK_S = 10.0
"""About what a check takes."""


def without_quarantined(nodes: Iterable[Node], quarantined: Mapping[str, str], now_s: float) -> tuple[Node, ...]:
    """The nodes as the policy is to see them: one in quarantine leaves now, which asks back what is on it, with the reason."""
    return tuple(
        replace(node, leaves_at_s=now_s, quarantine=quarantined[node.name]) if node.name in quarantined else node for node in nodes
    )


def held_back(nodes: Iterable[Node], unchecked: frozenset[str]) -> tuple[tuple[Node, ...], tuple[Template, ...]]:
    """The nodes without those that are being checked, which the policy sees as nodes that start: so it asks the cluster for no others."""
    nodes = tuple(nodes)
    starting = tuple(
        Template(f"{node.name} (being checked)", node.kind, node.gpus, node.cpus, 0, node.labels, node.is_spot, 1, _CHECK_S)
        for node in nodes
        if node.name in unchecked
    )
    return tuple(node for node in nodes if node.name not in unchecked), starting
