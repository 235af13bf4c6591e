"""Which nodes to ask the cluster for, so that runs get their min and serving what it wants. Pure, within one round.

Invariants:
- No more nodes are asked for than the cluster could launch.
- What nodes that are starting will hold is promised once: nobody causes a launch for room that is coming anyway.
- Nothing is launched for growth.
- Of what must be launched: spot nodes for those who go to spot nodes first, others for the rest; of these, the ones that leave the least
  unused, then the fewest.
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
        """As `promise`, for as many of `missing` single workers as one template has room for, not on spot nodes first; how many that is."""
        rooms = [
            (not template.is_spot, min(missing, self._room(template, units_of(worker, template))))
            for template in self._templates
            if _fits(template, worker, labels, None)
        ]
        _, some = max((one for one in rooms if one[1]), default=(False, 0))
        template = self.promise(claimant, some, 1, worker, labels, None) if some else None
        return (template, some) if template else None

    def promise(
        self,
        claimant: str,
        missing: int,
        workers: int,
        worker: Resources,
        labels: frozenset[str],
        kind: str | None,
        prefers_spot: bool = False,
    ) -> Template | None:
        """Find room for `missing` gangs of `workers` on nodes that start or can be launched; None if there is none."""
        found = []
        for position, template in enumerate(self._templates):
            if _fits(template, worker, labels, kind):
                units = units_of(worker, template)
                count = self._count(template, missing * workers, units)
                if count <= self._left[template.name]:
                    size = template.gpus or template.cpus
                    found.append(((count > 0, template.is_spot != prefers_spot, count * size, count, position), template, units, count))
        if not found:
            return None
        _, template, units, count = min(found, key=lambda one: one[0])
        self._launch(template, count, claimant, missing)
        self._use(template, missing * workers, units)
        return template

    def _count(self, template: Template, workers: int, units: int) -> int:
        """How many nodes must be launched for so many workers, besides those that start already."""
        short = workers - sum(node // units for node in self._free[template.name])
        return max(0, -(-short // ((template.gpus or template.cpus) // units)))

    def _room(self, template: Template, units: int) -> int:
        """For how many workers there is room on nodes that start or can be launched."""
        on_new = (template.gpus or template.cpus) // units * self._left[template.name]
        return on_new + sum(node // units for node in self._free[template.name])

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
