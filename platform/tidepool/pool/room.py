"""Where there is room: the free parts of all nodes, found by size in constant time.

A node is cut into units: its GPUs, or its CPUs where it has none. A worker takes whole units (as many as its GPUs need, or
more if its CPUs do), all on one node. Nodes that look the same form a class; a class keeps its nodes in one bucket per
number of free units, so that a place is found by looking at a few buckets, however many nodes there are.

Invariants:
- The free units of a node are never negative and never more than its size.
- What is `idle` is free now; what is `soon` free is that and what leaves: per node, idle <= soon.
- A node that has been told to leave gives no room.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tidepool.messages import Group, Node, Places, Replica, Resources, Template

Spot = tuple[tuple[int, int], ...]
"""A place by node numbers: pairs (node, workers)."""
_MAX_NODES_TRIED = 256


@dataclass(frozen=True, slots=True)
class NodeClass:
    """Nodes that look the same."""

    kind: str
    labels: frozenset[str]
    is_spot: bool
    gpus: int
    cpus: int

    @property
    def size(self) -> int:
        """Units of a node."""
        return self.gpus or self.cpus


class Choice(NamedTuple):
    """A class that a demand may go to: its number, units per worker, size of a node; those of rank 0 are preferred."""

    number: int
    units: int
    size: int
    rank: int


@dataclass(frozen=True, slots=True)
class Options:
    """The classes that a demand may go to, by kind, the preferred first."""

    kinds: tuple[str, ...]
    classes: tuple[tuple[Choice, ...], ...]


def units_of(worker: Resources, place: NodeClass | Template) -> int:
    """Units that a worker takes of a node; 0 if it cannot go there."""
    if place.gpus == 0:
        units = 0 if worker.gpus else max(worker.cpus, 1)
    elif worker.gpus == 0:
        units = 0
    else:
        units = max(worker.gpus, -(-worker.cpus * place.gpus // place.cpus) if place.cpus else worker.gpus)
    return units if units <= (place.gpus or place.cpus) else 0


class Index:
    """Free units of every node, with the nodes of a class in buckets by that number.

    A bucket is a stack that may hold nodes that have moved on since; they are dropped when they come to the top.
    """

    def __init__(self, free: list[int], class_of: list[int], sizes: Sequence[int]) -> None:
        self.free = free
        self.version = 0
        self._class_of = class_of
        self.stacks: list[list[list[int]]] = [[[] for _ in range(size + 1)] for size in sizes]
        for node, number in enumerate(class_of):
            if number >= 0:
                self.stacks[number][free[node]].append(node)
        self.counts = [[len(stack) for stack in stacks] for stacks in self.stacks]

    def change(self, node: int, units: int) -> None:
        """Free `units` more (negative: take them)."""
        number = self._class_of[node]
        if number < 0:
            return
        old = self.free[node]
        self.version += 1
        counts = self.counts[number]
        new = min(old + units, len(counts) - 1)  # a snapshot may say that more is held than there is
        assert new >= 0, (node, old, units)
        counts[old] -= 1
        counts[new] += 1
        self.stacks[number][new].append(node)
        self.free[node] = new

    def slots(self, classes: Sequence[Choice]) -> int:
        """Workers that fit, one by one."""
        total = 0
        for number, units, size, _ in classes:
            counts = self.counts[number]
            for free in range(units, size + 1):
                if counts[free]:
                    total += counts[free] * (free // units)
        return total

    def top(self, number: int, free: int) -> int:
        """A node of a class with exactly so many free units, -1 if there is none."""
        if not self.counts[number][free]:
            return -1
        stack = self.stacks[number][free]
        while self.free[stack[-1]] != free:
            stack.pop()
        return stack[-1]

    def some(self, number: int, free: int, most: int) -> list[int]:
        """Up to `most` nodes of a class with exactly so many free units."""
        most = min(most, self.counts[number][free])
        stack = self.stacks[number][free]
        if len(stack) > 4 * self.counts[number][free] + 16:
            stack[:] = dict.fromkeys(node for node in stack if self.free[node] == free)
        found: list[int] = []
        seen: set[int] = set()
        position = len(stack) - 1
        while len(found) < most:
            node = stack[position]
            if self.free[node] == free and node not in seen:
                seen.add(node)
                found.append(node)
            position -= 1
        return found


@dataclass(frozen=True, slots=True)
class _Layout:
    """The nodes by number and class; in `open_class_of` those that leave have the class -1."""

    nodes: Sequence[Node]
    number_of: dict[str, int]
    classes: list[NodeClass]
    class_of: list[int]
    open_class_of: list[int]
    has_notices: bool


_last_layout = _Layout((), {}, [], [], [], False)


def _layout(nodes: Sequence[Node]) -> _Layout:
    """The layout of these nodes. From round to round they are mostly the same tuple, so the last one is kept."""
    global _last_layout  # noqa: PLW0603 - a memo of a pure function, of one entry, compared by identity
    if _last_layout.nodes is not nodes or not isinstance(nodes, tuple):
        numbers: dict[tuple[str, frozenset[str], bool, int, int], int] = {}
        keys = [(node.kind, node.labels, node.is_spot, node.gpus, node.cpus) for node in nodes]
        class_of = [numbers.setdefault(key, len(numbers)) for key in keys]
        open_class_of = [-1 if node.leaves_at_s is not None else number for node, number in zip(nodes, class_of, strict=True)]
        number_of = {node.name: number for number, node in enumerate(nodes)}
        _last_layout = _Layout(nodes, number_of, [NodeClass(*key) for key in numbers], class_of, open_class_of, -1 in open_class_of)
    return _last_layout


class Room:
    """The free parts of a cluster."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        layout = _layout(nodes)
        self.nodes = nodes
        self.number_of = layout.number_of
        self.has_notices = layout.has_notices
        self.classes = layout.classes
        self.all_class_of = layout.class_of
        self._class_of = layout.open_class_of
        self._sizes = [place.size for place in self.classes]
        self._used = [0] * len(nodes)
        self._fixed = self._used
        self._leaving: dict[int, int] = {}
        self._options: dict[tuple[int, int, frozenset[str], str | None, bool], Options] = {}
        self._units: dict[tuple[int, int], list[int]] = {}
        self.idle: Index
        self.soon: Index

    # --- What is taken at the start of a round -----------------------------------------------------------------------

    def units(self, worker: Resources) -> list[int]:
        """Units per worker, by class."""
        key = (worker.gpus, worker.cpus)
        known = self._units.get(key)
        if known is None:
            known = self._units[key] = [units_of(worker, place) or max(key) for place in self.classes]
        return known

    def hold(self, groups: Sequence[Group], units: Sequence[int]) -> tuple[list[Group], list[Group], int]:
        """Count a run's groups: those that stay, those on a node that is gone or leaves, the number asked back already."""
        node_of, class_of, used, live = self.number_of.get, self.all_class_of, self._used, self._class_of
        staying: list[Group] = []
        closing: list[Group] = []
        for group in groups:
            stays = True
            for name, workers in group.places:
                node = node_of(name)
                if node is None:
                    stays = False
                    continue
                taken = workers * units[class_of[node]]
                used[node] += taken
                if group.leaving:
                    self._leaving[node] = self._leaving.get(node, 0) + taken
                elif live[node] < 0:
                    stays = False
            if not group.leaving:
                (staying if stays else closing).append(group)
        return staying, closing, len(groups) - len(staying) - len(closing)

    def hold_replicas(self, replicas: Sequence[Replica], units: Sequence[int]) -> int:
        """Count a deployment's replicas; returns how many of them stay."""
        node_of, class_of, used = self.number_of.get, self.all_class_of, self._used
        num_staying = 0
        for replica in replicas:
            node = node_of(replica.node)
            if node is None:
                continue
            taken = units[class_of[node]]
            used[node] += taken
            if replica.state == "draining":
                self._leaving[node] = self._leaving.get(node, 0) + taken
            elif self._class_of[node] >= 0:
                num_staying += 1
        return num_staying

    def fix(self) -> None:
        """What has been counted so far no run can move: see `could_hold`."""
        self._fixed = self._used.copy()

    def capacity(self) -> tuple[int, int]:
        """Units of nodes without and with GPUs that runs could hold."""
        total = [0, 0]
        for number, used in zip(self._class_of, self._fixed, strict=True):
            if number >= 0:
                total[self.classes[number].gpus > 0] += max(0, self._sizes[number] - used)
        return total[0], total[1]

    def could_hold(self, options: Options, workers: int) -> Options | None:
        """Of these options the first kind on which so many workers would fit if no run held anything; None if there is none."""
        for kind, classes in zip(options.kinds, options.classes, strict=True):
            units = {choice.number: choice.units for choice in classes}
            slots = 0
            for node, number in enumerate(self._class_of):
                if number in units:
                    slots += max(0, self._sizes[number] - self._fixed[node]) // units[number]
            if slots >= workers:
                return Options((kind,), (classes,))
        return None

    def settle(self) -> None:
        """Everything has been counted: build the indexes."""
        sizes, kinds = self._sizes, self.all_class_of
        idle = [max(0, sizes[number] - used) for number, used in zip(kinds, self._used, strict=True)]
        soon = idle.copy()
        for node, units in self._leaving.items():
            soon[node] = min(sizes[kinds[node]], idle[node] + units)
        self.idle = Index(idle, self._class_of, sizes)
        self.soon = Index(soon, self._class_of, sizes)

    # --- Places ------------------------------------------------------------------------------------------------------

    def options(self, worker: Resources, labels: frozenset[str], kind: str | None, prefers_spot: bool) -> Options:
        """Where a worker may go: classes with all its labels, of its kind if that is fixed."""
        key = (worker.gpus, worker.cpus, labels, kind, prefers_spot)
        known = self._options.get(key)
        if known is None:
            known = self._options[key] = self._find_options(worker, labels, kind, prefers_spot)
        return known

    def _find_options(self, worker: Resources, labels: frozenset[str], kind: str | None, prefers_spot: bool) -> Options:
        fits: dict[str, list[Choice]] = {}
        order = sorted(range(len(self.classes)), key=lambda number: (self.classes[number].is_spot != prefers_spot, number))
        for number in order:
            place = self.classes[number]
            units = units_of(worker, place)
            if units and labels <= place.labels and kind in {None, place.kind}:
                fits.setdefault(place.kind, []).append(Choice(number, units, place.size, int(place.is_spot != prefers_spot)))
        return Options(tuple(fits), tuple(tuple(classes) for classes in fits.values()))

    def take(self, index: Index, options: Options, groups: int, workers: int) -> list[Spot] | None:
        """Take places for `groups` gangs of `workers`, all of one kind, each on as few nodes as it takes; all or none.

        A place in `soon` is taken from `idle` too as far as it is idle, so that nobody else starts there meanwhile.
        """
        for classes in options.classes:
            if index.slots(classes) >= groups * workers:
                return [self._take_one(index, classes, workers) for _ in range(groups)]
        return None

    def _take_one(self, index: Index, classes: Sequence[Choice], workers: int) -> Spot:
        spot = find(index, classes, workers, self.nodes)
        units = {choice.number: choice.units for choice in classes}
        for node, count in spot:
            self.use(index, node, count * units[self.all_class_of[node]])
        return spot

    def use(self, index: Index, node: int, units: int) -> None:
        """Take units of a node, in both indexes."""
        self.soon.change(node, -units)
        if index is self.idle:
            self.idle.change(node, -units)
        elif self.idle.free[node] > self.soon.free[node]:
            self.idle.change(node, self.soon.free[node] - self.idle.free[node])

    def names(self, spot: Spot) -> Places:
        """A place by the nodes' names."""
        return tuple((self.nodes[node].name, workers) for node, workers in spot)


def find(index: Index, classes: Sequence[Choice], workers: int, nodes: Sequence[Node]) -> Spot:
    """The place of one gang on as few nodes as it takes, of one domain where that takes no more. There must be room."""
    best, best_at = -1, (2, 0)
    for number, units, size, rank in classes:
        for free in range(workers * units, size + 1):
            if (rank, free) >= best_at:
                break
            if (node := index.top(number, free)) >= 0:
                best, best_at = node, (rank, free)
                break
    if best >= 0:
        return ((best, workers),)
    for choice in classes:
        if index.slots([choice]) >= workers:
            return _spread(index, [choice], workers, nodes)
    return _spread(index, classes, workers, nodes)


def _spread(index: Index, classes: Sequence[Choice], workers: int, nodes: Sequence[Node]) -> Spot:
    """A gang over several nodes: the emptiest first, the last one as full as fits."""
    largest: list[tuple[int, int, int]] = []  # (node, units per worker, free)
    left = workers
    buckets = [(free // units, number, units, free) for number, units, size, _ in classes for free in range(units, size + 1)]
    for _, number, units, free in sorted(buckets, key=lambda bucket: -bucket[0]):
        for node in index.some(number, free, -(-left // (free // units))):
            largest.append((node, units, free))
            left -= free // units
        if left <= 0:
            break
    assert left <= 0, (workers, classes)
    within = _one_domain(index, largest, classes, workers, nodes) if len(classes) == 1 else None
    spot = within or _fill([(node, free // units) for node, units, free in largest], workers)
    return spot if within else _tighten(index, spot, classes)


def _fill(candidates: Iterable[tuple[int, int]], workers: int) -> Spot:
    spot: list[tuple[int, int]] = []
    for node, slots in candidates:
        count = min(slots, workers)
        spot.append((node, count))
        workers -= count
        if workers == 0:
            break
    return tuple(spot)


def _tighten(index: Index, spot: Spot, classes: Sequence[Choice]) -> Spot:
    """The workers left for the last node go to the fullest one that takes them."""
    last, count = spot[-1]
    used = {node for node, _ in spot}
    for number, units, size, _ in classes:
        for free in range(count * units, min(size + 1, index.free[last])):
            node = index.top(number, free)
            if node >= 0 and node not in used:
                return (*spot[:-1], (node, count))
    return spot


def _one_domain(
    index: Index, largest: Sequence[tuple[int, int, int]], classes: Sequence[Choice], workers: int, nodes: Sequence[Node]
) -> Spot | None:
    """A place within one domain on no more nodes than `largest` has; looks at no more than so many of each size."""
    number, units, size, _ = classes[0]
    by_domain: dict[str, list[tuple[int, int]]] = {}
    for free in range(size, units - 1, -1):
        for node in index.some(number, free, len(largest) + _MAX_NODES_TRIED):
            candidates = by_domain.setdefault(nodes[node].domain, [])
            if len(candidates) < len(largest):
                candidates.append((node, free // units))
                if len(candidates) == len(largest) and sum(slots for _, slots in candidates) >= workers:
                    return _fill(candidates, workers)
    return None
