"""LoRA adapters (Hu et al. 2021) as an engine keeps them: one buffer each, made once, copied whole, read by kernels at addresses.

For each linear layer that it changes an adapter has A (rank x input size) and B (output size x rank), one after the other, filled up
with zeros so that kernels know no ends, in the order in which a processor reads them:
- A in bands of 4 ranks (`RANK_STEP`), each of them in pieces of 16 inputs: number (r, k) is [r // 4, k // 16, r % 4, k % 16];
- B in tiles of 64 outputs: number (n, r) is [n // 64, r, n % 64].
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

RANK_STEP, INPUT_STEP, OUTPUT_STEP = 4, 16, 64
"""As in `lora.c`."""

Matrices = tuple[Tensor, Tensor, float]
"""A (rank x input size), B (output size x rank) and the scale of their product."""


@dataclass(frozen=True)
class Place:
    """Where a layer's matrices lie in the buffer of their adapter, in numbers. Rank and sizes are the filled up ones."""

    first_a: int
    first_b: int
    rank: int
    input_size: int
    output_size: int
    scale: float


@dataclass(frozen=True)
class PackedAdapter:
    """The buffer of an adapter, and what lies where in it, by the layers' names."""

    numbers: Tensor
    places: Mapping[str, Place]

    @property
    def size_bytes(self) -> int:
        """Of the buffer."""
        return self.numbers.numel() * self.numbers.itemsize

    def addresses(self, name: str) -> tuple[int, int]:
        """Of a layer's A and B."""
        place, first = self.places[name], self.numbers.data_ptr()
        return first + place.first_a * self.numbers.itemsize, first + place.first_b * self.numbers.itemsize

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """Views of a layer's A and B as they lie in the buffer, in four and in three dimensions."""
        place = self.places[name]
        a = self.numbers[place.first_a : place.first_b]
        b = self.numbers[place.first_b : place.first_b + place.rank * place.output_size]
        bands = place.rank // RANK_STEP, place.input_size // INPUT_STEP, RANK_STEP, INPUT_STEP
        return a.view(bands), b.view(place.output_size // OUTPUT_STEP, place.rank, OUTPUT_STEP)

    def plain(self, name: str) -> tuple[Tensor, Tensor]:
        """Copies of a layer's A and B as matrices, filled up."""
        place, (a, b) = self.places[name], self.matrices(name)
        return a.transpose(1, 2).reshape(place.rank, -1), b.transpose(1, 2).reshape(-1, place.rank)

    def on(self, device: torch.device) -> "PackedAdapter":
        """The same there: itself, if it is there already."""
        return replace(self, numbers=self.numbers.to(device, non_blocking=True))


def pack(matrices: Mapping[str, Matrices], dtype: torch.dtype, pin: bool = False) -> PackedAdapter:
    """Copy matrices into a buffer of host memory, for a base that computes in `dtype`. `pin`: to be copied to a GPU."""
    places, first = {}, 0
    for name, (a_RK, b_NR, scale) in matrices.items():
        rank, inputs, outputs = up_to(len(a_RK), RANK_STEP), up_to(a_RK.shape[1], INPUT_STEP), up_to(len(b_NR), OUTPUT_STEP)
        places[name] = Place(first, first + rank * inputs, rank, inputs, outputs, scale)
        first += rank * (inputs + outputs)
    packed = PackedAdapter(torch.empty(first, dtype=dtype, pin_memory=pin), places)
    for name, (a_RK, b_NR, _) in matrices.items():
        place, (a, b) = places[name], packed.matrices(name)
        a.copy_(_filled(a_RK, place.rank, place.input_size).view(a.shape[0], RANK_STEP, a.shape[1], INPUT_STEP).transpose(1, 2))
        b.copy_(_filled(b_NR, place.output_size, place.rank).view(len(b), OUTPUT_STEP, place.rank).transpose(1, 2))
    return packed


def up_to(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def _filled(matrix: Tensor, num_rows: int, num_columns: int) -> Tensor:
    return pad(matrix, (0, num_columns - matrix.shape[1], 0, num_rows - len(matrix)))
