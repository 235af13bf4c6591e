"""The exact reduction: gradients of the logical shards added along one fixed tree, with the same bits for every world size.

A worker computes its shards one at a time and adds up the subtrees that it owns whole. For what is left of the tree the
workers exchange slices: each takes one slice of the parameters, adds the subtrees of all workers there in the tree's
order, and the slices are gathered. Where shards divide evenly that is the traffic of an all-reduce.

Invariants:
- The result depends on the shards' gradients alone, not on who computed them (float addition in one fixed order).
- A worker holds at most log2(shards) + 1 gradient copies at a time while it computes, and lends them out again.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from tidepool.training.group import Group
from tidepool.training.sharding import Node, cover, fold, owned_shards


class GradientBuffers:
    """Flat float32 gradients of `parameters`, padded to a multiple of `multiple`, lent out and taken back.

    `point` makes one of them the `.grad` of the parameters, so that a backward pass accumulates in place there.
    """

    def __init__(self, parameters: Mapping[str, Parameter], multiple: int) -> None:
        self._parameters = list(parameters.values())
        self._device = self._parameters[0].device
        self.num_elements = sum(p.numel() for p in self._parameters)
        self._padded = -(-self.num_elements // multiple) * multiple
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        """A buffer of zeros, (num_elements and padding,)."""
        if self._free:
            return self._free.pop().zero_()
        return torch.zeros(self._padded, dtype=torch.float32, device=self._device)

    def give_back(self, buffer: Tensor) -> None:
        """The buffer is no longer needed."""
        self._free.append(buffer)

    def point(self, buffer: Tensor) -> None:
        """Make the parameters' `.grad` views of the buffer."""
        start = 0
        for parameter in self._parameters:
            parameter.grad = buffer[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()


def reduce_gradients(
    compute: Callable[[int], None],
    num_shards: int,
    buffers: GradientBuffers,
    group: Group,
    tick: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """The sum of all shards' gradients, (num_elements and padding,), the same bits on every worker; the caller gives the buffer back.

    `compute(shard)` adds the gradient of one shard to the parameters' `.grad`. It is called for the shards of this
    worker, in ascending order; `tick(phase)` is told when the exchange begins.
    """
    own = cover(owned_shards(group.rank, group.size, num_shards), num_shards)
    sums = [_sum_of(node, compute, buffers) for node in own]
    tick("exchange")
    if group.size == 1:
        return sums[0]
    covers = [cover(owned_shards(rank, group.size, num_shards), num_shards) for rank in range(group.size)]
    part = _exchange(sums, covers, num_shards, group)
    for buffer in sums:
        buffers.give_back(buffer)
    whole = buffers.take()
    group.all_gather(part, whole)
    return whole


def _sum_of(node: Node, compute: Callable[[int], None], buffers: GradientBuffers) -> Tensor:
    def leaf(one: Node) -> Tensor | None:
        if one.stop - one.start > 1:
            return None
        buffer = buffers.take()
        buffers.point(buffer)
        compute(one.start)
        return buffer

    def add(left: Tensor, right: Tensor) -> Tensor:
        left.add_(right)
        buffers.give_back(right)
        return left

    return fold(node, leaf, add)


def _exchange(sums: list[Tensor], covers: list[list[Node]], num_shards: int, group: Group) -> Tensor:
    """This worker's slice of the sum over the whole tree; `sums` are the values of `covers[group.rank]`."""
    slice_size = sums[0].numel() // group.size
    sent = torch.stack([buffer.view(group.size, slice_size) for buffer in sums], dim=1)
    num_sent = [len(sums) * slice_size] * group.size
    received = group.all_to_all(sent.view(-1), num_sent, [len(nodes) * slice_size for nodes in covers])
    values = dict(zip((node for nodes in covers for node in nodes), received.view(-1, slice_size), strict=True))
    total: Tensor = fold(Node(0, num_shards), values.get, torch.Tensor.add_)
    return total.contiguous()
