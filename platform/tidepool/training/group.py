"""The workers that take a step together, as three collectives; and the group of one. A barrier is an `all_reduce` of anything."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name changed after torch 2.11


class Group(Protocol):
    """`rank` 0 to `size` - 1. Every member makes the same calls in the same order; a lost member raises `RuntimeError`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, values: Tensor) -> None:
        """Add up `values` over the members, in place. Exact where at most one member has a value other than zero."""
        ...

    def all_to_all(self, sent: Tensor, num_sent: Sequence[int], num_received: Sequence[int]) -> Tensor:
        """Send `num_sent[r]` consecutive elements of the flat `sent` to each rank r; returns what came, by rank, flat."""
        ...

    def all_gather(self, part: Tensor, whole: Tensor) -> None:
        """Fill the flat `whole` with the members' parts, all of one size, by rank."""
        ...


class LocalGroup:
    """A worker alone."""

    rank, size = 0, 1

    def all_reduce(self, values: Tensor) -> None:
        """Nothing to add."""

    def all_to_all(self, sent: Tensor, num_sent: Sequence[int], num_received: Sequence[int]) -> Tensor:
        assert list(num_sent) == list(num_received) == [sent.numel()]
        return sent

    def all_gather(self, part: Tensor, whole: Tensor) -> None:
        whole.copy_(part)


class ProcessGroup:
    """A process group of torch.distributed (the default one unless given): gloo on CPUs, NCCL on GPUs."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def all_reduce(self, values: Tensor) -> None:
        dist.all_reduce(values, group=self._group)

    def all_to_all(self, sent: Tensor, num_sent: Sequence[int], num_received: Sequence[int]) -> Tensor:
        received = torch.empty(sum(num_received), dtype=sent.dtype, device=sent.device)
        dist.all_to_all_single(received, sent, list(num_received), list(num_sent), group=self._group)
        return received

    def all_gather(self, part: Tensor, whole: Tensor) -> None:
        _all_gather_flat(whole, part, group=self._group)
