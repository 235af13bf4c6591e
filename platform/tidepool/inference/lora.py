"""LoRA adapters (Hu et al. 2021) as an engine keeps them: one buffer each, made once, copied whole, read by kernels at addresses.

For each linear layer that it changes an adapter has A (rank x input size) and the transpose of B (rank x output size), one after the
other. Ranks are filled up with zeros to a multiple of `RANK_STEP`, inputs and outputs to whole vectors, so that kernels know no ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

RANK_STEP, INPUT_STEP, OUTPUT_STEP = 4, 16, 64
"""As in `lora.c`."""

Matrices = tuple[Tensor, Tensor, float]
"""A (rank x input size), B (output size x rank) and the scale of their product."""
Shape = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where a layer's matrices lie in the buffer of their adapter, in numbers, and their filled up shapes."""

    first_a: int
    shape_a: Shape
    first_b: int
    shape_b: Shape
    scale: float

    @property
    def rank(self) -> int:
        """Filled up."""
        return self.shape_a[0]


@dataclass(frozen=True)
class PackedAdapter:
    """The buffer of an adapter, and what lies where in it, by the layers' names."""

    numbers: Tensor
    places: Mapping[str, Place]

    @property
    def size_bytes(self) -> int:
        """Of the buffer."""
        return self.numbers.numel() * self.numbers.itemsize

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """Views of A and the transpose of B, filled up."""
        place = self.places[name]
        return self._view(place.first_a, place.shape_a), self._view(place.first_b, place.shape_b)

    def on(self, device: torch.device) -> "PackedAdapter":
        """The same there: itself, if it is there already."""
        return replace(self, numbers=self.numbers.to(device, non_blocking=True))

    def _view(self, first: int, shape: Shape) -> Tensor:
        return self.numbers[first : first + prod(shape)].view(shape)


def pack(matrices: Mapping[str, Matrices], dtype: torch.dtype, pin: bool = False) -> PackedAdapter:
    """Copy matrices into a buffer of host memory, for a base that computes in `dtype`. `pin`: to be copied to a GPU."""
    places, first = {}, 0
    for name, (a_RK, b_NR, scale) in matrices.items():
        rank = up_to(len(a_RK), RANK_STEP)
        shape_a, shape_b = (rank, up_to(a_RK.shape[1], INPUT_STEP)), (rank, up_to(len(b_NR), OUTPUT_STEP))
        places[name] = Place(first, shape_a, first + prod(shape_a), shape_b, scale)
        first += prod(shape_a) + prod(shape_b)
    packed = PackedAdapter(torch.empty(first, dtype=dtype, pin_memory=pin), places)
    for name, (a_RK, b_NR, _) in matrices.items():
        for to, matrix in zip(packed.matrices(name), (a_RK, b_NR.t()), strict=True):
            num_rows, num_columns = matrix.shape
            to[num_rows:].zero_()
            to[:, num_columns:].zero_()
            to[:num_rows, :num_columns] = matrix
    return packed


def up_to(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step
