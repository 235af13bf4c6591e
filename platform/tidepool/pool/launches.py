"""Which nodes to ask the cluster for, so that runs get their min and serving what it wants. Pure, within one round.

Invariants:
- No more nodes are asked for than the cluster could launch.
- What nodes that are starting will hold is promised once: nobody causes a launch for room that is coming anyway.
- Nothing is launched for growth.
"""

from collections.abc import Sequence

from tidepool.messages import LaunchNodes, Resources, Template
from tidepool.pool.reasons import reason
from tidepool.pool.room import units_of


class Launches:
    """The launches of one round."""

    def __init__(self, templates: Sequence[Template]) -> None:
        self._templates = templates
        self._free = {template.name: [template.gpus or template.cpus] * template.launching for template in templates}
        self._left = {template.name: template.available for template in templates}
        self.decisions: list[LaunchNodes] = []

    def could_fit(self, worker: Resources, labels: frozenset[str], kind: str | None) -> bool:
        """Whether any template, available or not, could hold such a worker."""
        return bool(self._templates) and any(_fits(template, worker, labels, kind) for template in self._templates)

    def promise_some(self, claimant: str, missing: int, worker: Resources, labels: frozenset[str]) -> tuple[Template, int] | None:
        """As `promise`, for as many of `missing` single workers as there is room for; how many that is."""
        for template in self._templates:
            if _fits(template, worker, labels, None):
                units = units_of(worker, template)
                per_node = (template.gpus or template.cpus) // units
                room = sum(node // units for node in self._free[template.name]) + per_node * self._left[template.name]
                if room:
                    some = min(missing, room)
                    found = self.promise(claimant, some, 1, worker, labels, template.kind)
                    return (found, some) if found else None
        return None

    def promise(
        self, claimant: str, missing: int, workers: int, worker: Resources, labels: frozenset[str], kind: str | None
    ) -> Template | None:
        """Find room for `missing` gangs of `workers` on nodes that start or can be launched; None if there is none."""
        for template in self._templates:
            if not _fits(template, worker, labels, kind):
                continue
            units = units_of(worker, template)
            free = self._free[template.name]
            slots = sum(node // units for node in free)
            short = missing * workers - slots
            per_node = (template.gpus or template.cpus) // units
            count = max(0, -(-short // per_node))
            if count > self._left[template.name]:
                continue
            self._launch(template, count, claimant, missing)
            self._use(template, missing * workers, units)
            return template
        return None

    def _launch(self, template: Template, count: int, claimant: str, missing: int) -> None:
        if count:
            self._left[template.name] -= count
            self._free[template.name] += [template.gpus or template.cpus] * count
            why = reason("launch", missing=missing, claimant=claimant, count=count, template=template.name)
            self.decisions.append(LaunchNodes(template.name, count, why))

    def _use(self, template: Template, workers: int, units: int) -> None:
        free = self._free[template.name]
        for position, node in enumerate(free):
            taken = min(workers, node // units)
            free[position] = node - taken * units
            workers -= taken
        self._free[template.name] = [node for node in free if node]


def _fits(template: Template, worker: Resources, labels: frozenset[str], kind: str | None) -> bool:
    return units_of(worker, template) > 0 and labels <= template.labels and kind in {None, template.kind}
