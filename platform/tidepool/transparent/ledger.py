"""Which memory holds what was computed: the part of a script's state that its Python, run again, does not bring back.

Memory is known by its storage, not by a tensor, so views and shared parameters are one. A storage that holds something computed
gets the next number. Numbers are given by the events of the journal, so the same memory has the same number whenever the script
runs again, and a snapshot is: for each number that is still in use, its bytes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_PRUNE_EVERY = 4096


class Ledger:
    """The storages that hold computed values, by number, as long as anybody uses them."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # by the address of the StorageImpl, which a weak reference keeps from being used again
        self._references: dict[int, StorageWeakRef] = {}
        self._num_given = 0

    def add(self, tensor: Tensor) -> int:
        """The number of a tensor's memory, which holds something computed from now on."""
        storage = tensor.untyped_storage()
        known = self._numbers.get(storage._cdata)
        if known is not None:
            return known
        number = self._num_given
        self._num_given += 1
        self._numbers[storage._cdata] = number
        self._references[number] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        if self._num_given % _PRUNE_EVERY == 0:
            self._prune()
        return number

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory holds something computed."""
        return tensor.untyped_storage()._cdata in self._numbers

    def live(self) -> Iterator[tuple[int, Tensor]]:
        """Every number in use with all bytes of its memory, as uint8."""
        self._prune()
        for number, reference in self._references.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None and storage.nbytes() > 0:
                yield number, torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def _prune(self) -> None:
        dead = {number for number, reference in self._references.items() if reference.expired()}  # type: ignore[no-untyped-call]
        self._numbers = {address: number for address, number in self._numbers.items() if number not in dead}
        for number in dead:
            del self._references[number]
