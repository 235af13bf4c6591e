"""Who computes which logical shards, and the fixed binary tree along which their gradients are added. Pure.

The tree over n shards splits them at the largest power of two below n. Its shape depends on n alone, so the sum along it
has the same bits whoever computes which part.

Invariants:
- The workers' shards are disjoint, contiguous, cover everything, and differ in number by at most one.
- The covers of all workers together are disjoint nodes of the tree that hold every shard once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_ValueT = TypeVar("_ValueT")


@dataclass(frozen=True, order=True)
class Node:
    """The shards `start` to `stop - 1`, as one node of the tree."""

    start: int
    stop: int

    @property
    def is_leaf(self) -> bool:
        """Whether it is one shard."""
        return self.stop - self.start == 1

    @property
    def children(self) -> tuple["Node", "Node"]:
        """The two nodes that a node of several shards is the sum of, in the order of addition."""
        size = self.stop - self.start
        assert size > 1, self
        middle = self.start + (1 << (size - 1).bit_length() - 1)
        return Node(self.start, middle), Node(middle, self.stop)


def owned_shards(rank: int, world_size: int, num_shards: int) -> range:
    """The shards that a worker computes; the first `num_shards % world_size` workers have one more."""
    size, extra = divmod(num_shards, world_size)
    start = rank * size + min(rank, extra)
    return range(start, start + size + (rank < extra))


def cover(shards: range, num_shards: int) -> list[Node]:
    """The largest nodes of the tree that lie within `shards`, from left to right."""

    def within(node: Node) -> list[Node]:
        if shards.start <= node.start and node.stop <= shards.stop:
            return [node]
        if node.stop <= shards.start or shards.stop <= node.start:
            return []
        left, right = node.children
        return within(left) + within(right)

    return within(Node(0, num_shards))


def fold(node: Node, known: Callable[[Node], _ValueT | None], add: Callable[[_ValueT, _ValueT], _ValueT]) -> _ValueT:
    """The value of a node: what `known` gives for it, else the sum of its children's, left first."""
    value = known(node)
    if value is None:
        left, right = node.children
        value = add(fold(left, known, add), fold(right, known, add))
    return value
