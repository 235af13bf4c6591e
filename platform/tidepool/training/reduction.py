"""The exact reduction: gradients of the logical shards added along one fixed tree, with the same bits for every world size.

A worker computes its shards one at a time and adds up the subtrees that it owns whole. For what is left of the tree the
workers exchange slices: each takes one slice of the parameters, adds the subtrees of all workers there in the tree's
order, and the slices are gathered. Where shards divide evenly that is the traffic of an all-reduce.

Invariants:
- The result depends on the shards' gradients alone, not on who computed them (float addition in one fixed order).
- A worker holds at most log2(shards) + 1 gradient copies at a time while it computes, and none when it does not.
- A gradient is written once, by the backward pass that makes it, and read once, where it is added to another; a worker alone copies none.

Beside it stands the plain reduction, for runs that need no such promise (`reduction: fast`): one gradient and one all-reduce.
"""

from collections.abc import Callable, Sequence
from itertools import repeat

import torch
from torch import Tensor
from torch.nn import Parameter

from tidepool.training.group import Group
from tidepool.training.sharding import Node, cover, fold, owned_shards

Tick = Callable[[str], None]
Compute = Callable[[int], None]
"""Adds the gradient of one shard to the parameters' `.grad`, as a backward pass does: where there is none, it leaves its own there."""
Gradients = list[Tensor]
"""One for each parameter, float32, contiguous and of its shape."""

_ALIGNMENT = 64


class FlatLayout:
    """Where the gradients of `parameters` lie in one flat tensor that `num_slices` workers cut into slices of one size.

    Each begins where a tensor of its own might: on GPUs the bits of a sum over a tensor depend on how it is aligned.
    """

    def __init__(self, parameters: Sequence[Parameter], num_slices: int) -> None:
        self._shapes = [p.shape for p in parameters]
        self._gaps = [-shape.numel() % _ALIGNMENT for shape in self._shapes]
        self._gaps[-1] += -sum(shape.numel() + gap for shape, gap in zip(self._shapes, self._gaps, strict=True)) % num_slices

    def flatten(self, gradients: Gradients) -> Tensor:
        """A copy, (elements and zeros between them,)."""
        zeros = gradients[0].new_zeros(max(self._gaps))
        pairs = zip(gradients, self._gaps, strict=True)
        return torch.cat([part for gradient, gap in pairs for part in (gradient.view(-1), zeros[:gap])])

    def views(self, flat: Tensor) -> Gradients:
        """The gradients in a flat tensor."""
        sizes = [size for shape, gap in zip(self._shapes, self._gaps, strict=True) for size in (shape.numel(), gap)]
        return [part.view(shape) for part, shape in zip(torch.split(flat, sizes)[::2], self._shapes, strict=True)]


def reduce_gradients(
    compute: Compute, num_shards: int, parameters: Sequence[Parameter], group: Group, adds_once: bool, tick: Tick = lambda _: None
) -> Gradients:
    """The sum of all shards' gradients, the same bits on every worker; the parameters' `.grad` are left empty.

    `compute` is called for the shards of this worker, in ascending order. `adds_once`: it adds once to each parameter (in one
    backward pass), so that a shard may be added in place to the one before it where the tree adds these two; the bits are the same.
    `tick(phase)` is told when the exchange begins.
    """
    own = cover(owned_shards(group.rank, group.size, num_shards), num_shards)
    sums = [_sum_of(node, compute, parameters, adds_once) for node in own]
    _set(parameters, None)
    tick("exchange")
    if group.size == 1:
        return sums[0]
    layout = FlatLayout(parameters, group.size)
    flat = [layout.flatten(sums.pop(0)) for _ in own]
    covers = [cover(owned_shards(rank, group.size, num_shards), num_shards) for rank in range(group.size)]
    if [len(nodes) for nodes in covers] == [1, 1]:  # a sum of two has the same bits in any order
        group.all_reduce(flat[0])
        return layout.views(flat[0])
    part = _exchange(flat, covers, num_shards, group)
    group.all_gather(part, flat[0])
    return layout.views(flat[0])


def reduce_plainly(
    compute: Compute, num_shards: int, parameters: Sequence[Parameter], group: Group, _adds_once: bool, tick: Tick = lambda _: None
) -> Gradients:
    """As `reduce_gradients`, with the same bits on every worker, but other ones for every world size.

    All shards of a worker are added up in place, and the workers' sums in whatever order the group's all-reduce has.
    """
    total: Gradients | None = None
    for shard in owned_shards(group.rank, group.size, num_shards):
        total = _compute(shard, compute, parameters, total)
    assert total is not None
    _set(parameters, None)
    tick("exchange")
    if group.size == 1:
        return total
    layout = FlatLayout(parameters, group.size)
    whole = layout.flatten(total)
    del total
    group.all_reduce(whole)
    return layout.views(whole)


def _sum_of(node: Node, compute: Compute, parameters: Sequence[Parameter], adds_once: bool) -> Gradients:
    if node.is_leaf:
        return _compute(node.start, compute, parameters, None)
    left, right = node.children
    total = _sum_of(left, compute, parameters, adds_once)
    if adds_once and right.is_leaf:
        return _compute(right.start, compute, parameters, total)
    added = _sum_of(right, compute, parameters, adds_once)
    torch._foreach_add_(total, added)
    return total


def _compute(shard: int, compute: Compute, parameters: Sequence[Parameter], onto: Gradients | None) -> Gradients:
    """The gradient of a shard, added in place to that of others, if given."""
    _set(parameters, onto)
    compute(shard)
    return [torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for p in parameters]


def _set(parameters: Sequence[Parameter], gradients: Gradients | None) -> None:
    for parameter, gradient in zip(parameters, gradients or repeat(None), strict=False):
        parameter.grad = gradient


def _exchange(flat: list[Tensor], covers: list[list[Node]], num_shards: int, group: Group) -> Tensor:
    """This worker's slice of the sum over the whole tree; `flat` are the values of `covers[group.rank]`."""
    slice_size = flat[0].numel() // group.size
    sent = flat[0] if len(flat) == 1 else torch.stack([one.view(group.size, slice_size) for one in flat], dim=1)
    num_sent = [len(flat) * slice_size] * group.size
    received = group.all_to_all(sent.view(-1), num_sent, [len(nodes) * slice_size for nodes in covers])
    values = dict(zip((node for nodes in covers for node in nodes), received.view(-1, slice_size), strict=True))
    total: Tensor = fold(Node(0, num_shards), values.get, torch.Tensor.add_)
    return total.contiguous()


REDUCTIONS = {"exact": reduce_gradients, "fast": reduce_plainly}
"""By their names in a spec (`training.reduction`)."""
