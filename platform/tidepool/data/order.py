"""The global sample order: a pure function of (seed, epoch, index).

The samples of a split stand in row groups of B samples (the last may be short). Each epoch permutes the row groups,
cuts the permuted sequence into windows of W row groups, and permutes the samples inside each window.

Invariants:
- In an epoch, the indices 0 .. N-1 reach each of the N samples exactly once, for every N, B, W and seed. So any split of
  the indices over workers, and any point to resume from, reads every sample exactly once.
- The sample at an index takes O(1) integer operations: nothing is materialised, read or remembered.
- A window touches W row groups and no others, so a reader that caches W row groups fetches each of them once an epoch.
- The same arguments give the same sample on every machine and in every version of Python.

Who reads which index, and when an epoch ends, is left to training.
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

_ROUNDS = 8
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Layout:
    """How many samples there are and how they are stored; all counts, `num_samples` may be 0."""

    num_samples: int
    row_group_size: int
    window: int

    def __post_init__(self) -> None:
        assert self.num_samples >= 0, self
        assert self.row_group_size >= 1, self
        assert self.window >= 1, self

    @property
    def num_row_groups(self) -> int:
        """Row groups, the short one included."""
        return -(-self.num_samples // self.row_group_size)


def sample_at(seed: int, epoch: int, index: int, layout: Layout) -> int:
    """The number of the sample that epoch `epoch` reads at `index`. Raises `IndexError` outside 0 .. num_samples - 1."""
    if not 0 <= index < layout.num_samples:
        raise IndexError(f"index {index} is not one of {layout.num_samples} samples")
    size, window = layout.row_group_size, layout.window
    missing = layout.num_row_groups * size - layout.num_samples  # what the last row group lacks
    groups = permutation(layout.num_row_groups, seed, epoch, "row groups")
    short_window, short_slot = divmod(groups.inverse(layout.num_row_groups - 1), window)

    # All windows but the last have W row groups; the one that holds the short row group ends `missing` samples early.
    full = window * size
    before_its_end = index < (short_window + 1) * full - missing
    number = index // full if before_its_end else (index + missing) // full
    has_short = number == short_window
    start = number * full - (missing if number > short_window else 0)
    num_slots = min(window, layout.num_row_groups - number * window)
    num_here = num_slots * size - (missing if has_short else 0)

    place = permutation(num_here, seed, epoch, "window", number)(index - start)
    if has_short and place >= (short_slot + 1) * size - missing:
        place += missing
    slot, offset = divmod(place, size)
    return groups(number * window + slot) * size + offset


@dataclass(frozen=True)
class Permutation:
    """A keyed pseudo-random bijection on 0 .. size - 1, in either direction.

    A generalised Feistel network with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002):
    a number is split into (left, right) in Z_a x Z_b with a * b barely above the size; each round adds a keyed hash of one
    half to the other; a result outside the domain is put in again until it falls inside. It shuffles well and is no
    cipher: the hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """

    size: int
    round_keys: tuple[int, ...]

    def __call__(self, number: int) -> int:
        rows, columns = self._sides
        while True:
            left, right = divmod(number, columns)
            for i in range(0, _ROUNDS, 2):
                left = (left + _mix(self.round_keys[i] ^ right)) % rows
                right = (right + _mix(self.round_keys[i + 1] ^ left)) % columns
            number = left * columns + right
            if number < self.size:
                return number

    def inverse(self, number: int) -> int:
        """The number that the permutation takes to `number`."""
        rows, columns = self._sides
        while True:
            left, right = divmod(number, columns)
            for i in range(_ROUNDS - 2, -1, -2):
                right = (right - _mix(self.round_keys[i + 1] ^ left)) % columns
                left = (left - _mix(self.round_keys[i] ^ right)) % rows
            number = left * columns + right
            if number < self.size:
                return number

    @property
    def _sides(self) -> tuple[int, int]:
        rows = isqrt(self.size - 1) + 1
        return rows, -(-self.size // rows)


@lru_cache(maxsize=1024)
def permutation(size: int, *key: int | str) -> Permutation:
    """The permutation of 0 .. size - 1 (size at least 1) that belongs to a key of integers and words."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS, person=b"tidepool.order").digest()
    return Permutation(size, struct.unpack(f"<{_ROUNDS}Q", digest))


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
