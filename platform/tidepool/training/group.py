"""The workers that take a step together, as four collectives; and the group of one. A barrier is an `all_reduce` of anything."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """`rank` 0 to `size` - 1. Every member makes the same calls in the same order; a lost member raises `QuorumLost`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, values: Tensor) -> None:
        """Add up `values` over the members, in place. Where no more than two have a value other than zero, no order of addition shows."""
        ...

    def all_to_all(self, sent: Tensor, num_sent: Sequence[int], num_received: Sequence[int]) -> Tensor:
        """Send `num_sent[r]` consecutive elements of the flat `sent` to each rank r; returns what came, by rank, flat."""
        ...

    def all_gather(self, part: Tensor, whole: Tensor) -> None:
        """Fill the flat `whole` with the members' parts, all of one size, by rank."""
        ...

    def broadcast(self, values: Tensor, source: int) -> None:
        """Give every member the values of rank `source`, in place."""
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

    def broadcast(self, values: Tensor, source: int) -> None:
        assert source == 0


class QuorumLost(Exception):
    """The quorum is over: a peer is gone, or somebody else found that one is. What was under way in it counts for nothing.

    Never reaches a person: whoever leads a worker catches it and waits for the next quorum.
    """
