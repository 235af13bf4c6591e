"""Keeps Serve away from nodes in quarantine: what is free on them is held by placement groups. A shell.

Runs come only to nodes that they are granted. Serve's replicas go where Ray finds room, and Ray has no way to close a node that is to be
opened again (a drained node ends). Replicas that are there already leave by themselves (`serving.engines`).

Nothing is held where Serve runs no replicas at all: a node in quarantine that is idle may end, and the autoscaler brings another.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray.util.placement_group import get_placement_group, placement_group, placement_group_table, remove_placement_group

from tidepool.messages import ClusterView, Resources
from tidepool.pool.tables import NODE_ID_LABEL

_PREFIX = "tidepool-closed-"


@dataclass(frozen=True)
class _Held:
    """What one placement group holds of a node; or waits for."""

    name: str
    node: str
    resources: Resources
    is_placed: bool


class Closures:
    """Ray alone remembers what is held, so that one that takes over from another finds it. `step` is for one thread at a time."""

    def __init__(self) -> None:
        self._may_hold = True

    def step(self, view: ClusterView, quarantined: Mapping[str, str] | None) -> ClusterView:
        """Hold what is free on the nodes in quarantine and free the others, unless it is None and not known yet which those are.

        Returns what is seen of the cluster with all that is held so counted as free. Raises Ray's errors.
        """
        wanted = {node for node in quarantined or () if node in view.free} if view.replicas else set()
        if not wanted and not self._may_hold:
            return view
        held = _held()
        if quarantined is not None:
            gone = [one for one in held if one.node not in wanted or not one.is_placed]  # who waits would take what comes free at any time
            for one in gone:
                remove_placement_group(get_placement_group(one.name))
            for node in wanted:
                _hold(node, view.free[node])
            self._may_hold = bool(wanted or gone)
        free = dict(view.free)
        for one in held:
            if one.is_placed and one.node in free:
                free[one.node] = Resources(free[one.node].gpus + one.resources.gpus, free[one.node].cpus + one.resources.cpus)
        return replace(view, free=free)


def _held() -> list[_Held]:
    found = []
    for row in placement_group_table().values():
        name = row["name"]
        if name.startswith(_PREFIX) and row["state"] != "REMOVED":
            [bundle] = row["bundles"].values()
            node = name.removeprefix(_PREFIX).partition("-")[0]
            resources = Resources(int(bundle.get("GPU", 0)), int(bundle.get("CPU", 0)))
            found.append(_Held(name, node, resources, row["state"] == "CREATED"))
    return found


def _hold(node: str, free: Resources) -> None:
    bundle = {name: float(count) for name, count in (("GPU", free.gpus), ("CPU", free.cpus)) if count}
    if bundle:
        name = f"{_PREFIX}{node}-{secrets.token_hex(4)}"
        placement_group([bundle], name=name, lifetime="detached", bundle_label_selector=[{NODE_ID_LABEL: node}])
