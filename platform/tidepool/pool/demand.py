"""Tells Ray's autoscaler which nodes the policy wants launched. A shell with its decisions in two pure functions.

What the autoscaler takes is a level, not an increase: a list of bundles that the cluster must have room for in all, whoever uses it now.
It counts until the next list comes, and while it names a node of some type, one of that type is not ended for being idle.

Invariants:
- Each bundle is a whole node of one type, asked for by its size and its type's labels: with the type's name among them (`cluster.yaml`) the
  autoscaler has no choice of its own.
- Types of which nothing is launched are not named: their nodes end when they have been idle for long enough. So an arbiter that
  dies for good leaves at most those nodes standing that were being launched.
- A level rises by what the policy wants launched and by nothing else. A node that has come and that the autoscaler still
  counts as starting is in both counts for some seconds, and no reason for another.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tidepool.messages import ClusterView, LaunchNodes, Template
from tidepool.pool.tables import type_of

Levels = Mapping[str, int]
"""How many nodes of a type there shall be in all, by its name."""


class Demand:
    """What the autoscaler was last told. One that takes over from another tells it anew."""

    def __init__(self) -> None:
        self._told: Levels | None = None

    def tell(self, view: ClusterView, launches: Sequence[LaunchNodes]) -> None:
        """Have these nodes launched; says nothing where it said so before, or where nothing can be launched. Raises Ray's errors."""
        wanted = levels(view, launches, self._told or {})
        if view.templates and wanted != self._told:
            from ray.autoscaler.sdk import request_resources  # here: who starts the arbiter imports this module, and that one is large

            bundles, selectors = as_bundles(wanted, view.templates)
            request_resources(bundles=bundles, bundle_label_selectors=selectors)
            self._told = wanted


def levels(view: ClusterView, launches: Iterable[LaunchNodes], before: Levels) -> Levels:
    """The new levels, given those that the autoscaler was told before."""
    up = Counter(type_of(node) for node in view.nodes if node.leaves_at_s is None)
    wanted: Counter[str] = Counter()
    for launch in launches:
        wanted[launch.template] += launch.count
    found: dict[str, int] = {}
    for template in view.templates:
        there = up[template.name] + template.launching
        if wanted[template.name]:
            found[template.name] = there + wanted[template.name]
        elif template.launching and template.name in before:
            found[template.name] = min(before[template.name], there)
    return found


def as_bundles(wanted: Levels, templates: Iterable[Template]) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """The bundles of these levels, and the labels that each must be placed by."""
    bundles: list[dict[str, float]] = []
    selectors: list[dict[str, str]] = []
    for template in templates:
        size = {name: float(count) for name, count in (("CPU", template.cpus), ("GPU", template.gpus)) if count}
        labels = dict(label.split("=", 1) for label in sorted(template.labels))
        for _ in range(wanted.get(template.name, 0)):
            bundles.append(size)
            selectors.append(labels)
    return bundles, selectors
