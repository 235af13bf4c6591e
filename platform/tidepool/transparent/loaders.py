"""Data loaders in a replay: the sampler runs, batches are left out where they can be made again from an outline.

Invariants:
- The indices of a sampler are the script's Python: they are drawn again, so that an epoch is in the same order and ends where it did.
- A batch of a map-style dataset that is tensors alone, in memory of their own, is not loaded again. Any other batch is, from the
  random states that it was loaded from.
- An iterator with workers that is in use where the replay ends has really loaded all of its batches, so its workers are where they
  were. One that is not in use there is replaced by `_StandIn`, which draws indices as far ahead as it did.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from tidepool.errors import ReplayError
from tidepool.transparent.host_random import HostRandom, set_changes
from tidepool.transparent.outline import OpaqueError, empty, outline, rebuild, tensors_in
from tidepool.transparent.session import Session

_OWN_USES = 2
"""Of a storage that nobody but one tensor holds: the tensor, and the object by which it is counted."""


class Loaders:
    """The iterators of the script's loaders, by the order in which they were made."""

    def __init__(self, session: Session, really: frozenset[int]) -> None:
        self._session = session
        self._really = really  # iterators that a replay must not replace
        self._iterators: dict[int, Callable[[], Any]] = {}
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._loaded: set[int] = set()  # those of which a batch has to be loaded in a replay
        self._ended: set[int] = set()
        self._datasets: list[Callable[[], Any]] = []

    def make(self, original: Callable[[DataLoader[Any]], Any], loader: DataLoader[Any]) -> Any:
        """What `DataLoader._get_iterator` does."""
        if not self._session.is_watching:
            return original(loader)
        number = len(self._iterators)
        if all(known() is not loader.dataset for known in self._datasets):
            self._datasets.append(_weakly(loader.dataset))
        has_workers = loader.num_workers > 0
        if has_workers and (loader.persistent_workers or isinstance(loader.dataset, IterableDataset)):
            self._loaded.add(number)
        if has_workers and self._session.is_replaying and number not in self._really:
            iterator: Any = _StandIn(loader)
        else:
            iterator = original(loader)
        self._iterators[number] = _weakly(iterator)
        self._numbers[iterator] = number
        return iterator

    def next(self, original: Callable[[Any], Any], iterator: Any) -> Any:
        """What `next` does with an iterator."""
        if not self._session.is_watching or iterator not in self._numbers:
            return original(iterator)
        number = self._numbers[iterator]
        return self._replay(original, iterator, number) if self._session.is_replaying else self._record(original, iterator, number)

    def really(self) -> list[int]:
        """The iterators that a replay up to now must not replace."""
        in_use = {number for number, iterator in self._iterators.items() if iterator() is not None} - self._ended
        return sorted(in_use | self._loaded)

    def datasets(self) -> Iterator[tuple[int, Any]]:
        """The datasets in use, by number."""
        for number, dataset in enumerate(self._datasets):
            found = dataset()
            if found is not None:
                yield number, found

    def _record(self, original: Callable[[Any], Any], iterator: Any, number: int) -> Any:
        session = self._session
        session.skips()
        try:
            with session.outside():
                before, before_torch = HostRandom.now(), torch.get_rng_state()
                batch = original(iterator)
                drawn = not torch.equal(before_torch, torch.get_rng_state())
        except StopIteration:
            self._ended.add(number)
            session.journal.note(("end", number))
            raise
        new: list[Tensor] = []
        form = self._form(iterator, batch, new)
        if form is None:
            self._loaded.add(number)
            session.journal.note(("loaded", number), _bytes(before_torch) if drawn else b"")
            return batch
        session.journal.note(("batch", number, form), HostRandom.now().changes(before))
        for one in new:
            session.ledger.add(one)
        return batch

    def _form(self, iterator: Any, batch: Any, new: list[Tensor]) -> Any:
        """The outline of a batch, None if it has to be loaded again in a replay."""
        if iterator._dataset_kind != 0:  # iterable: where it stands is known to itself alone
            return None
        try:
            form = outline(batch, [], new)
        except OpaqueError:
            return None
        own = all(one.untyped_storage().nbytes() == one.numel() * one.element_size() for one in new)
        if not own or len(tensors_in(batch)) != len(new) or _has_values(form) or any(map(self._session.ledger.holds, new)):
            return None
        return form if all(_num_uses(one) <= _OWN_USES for one in new) else None

    def _replay(self, original: Callable[[Any], Any], iterator: Any, number: int) -> Any:
        session = self._session
        session.skips()
        batch = None
        is_real = isinstance(iterator, _MultiProcessingDataLoaderIter)
        if is_real:
            has_batch, batch = _try_next(original, iterator, session)
        else:
            has_batch, index = _try_next(type(iterator)._next_index, iterator, None)
        descriptor, payload = session.journal.take()
        if descriptor[:2] == ("end", number) and not (is_real and has_batch):
            self._ended.add(number)
            raise StopIteration
        if not has_batch or descriptor[0] not in ("batch", "loaded") or descriptor[1] != number:
            raise ReplayError(f"A data loader gives another number of batches than before, near step {session.num_steps + 1}.")
        if descriptor[0] == "loaded":
            self._loaded.add(number)
            return batch if is_real else self._load(iterator, index, payload)
        new: list[Tensor] = []
        if is_real:
            form = outline(batch, [], new)
            if form != descriptor[2]:
                raise ReplayError(f"A data loader gives batches of another form than before, near step {session.num_steps + 1}.")
        else:
            with session.outside():
                batch = rebuild(descriptor[2], [], new, empty)
            iterator._num_yielded += 1
            set_changes(payload)
        for one in new:
            session.ledger.add(one)
        return batch

    def _load(self, iterator: Any, index: Any, payload: bytes) -> Any:
        with self._session.outside():
            if payload:  # Python's and NumPy's states are as they were, PyTorch's is not
                torch.set_rng_state(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
            batch = iterator._dataset_fetcher.fetch(index)
        iterator._num_yielded += 1
        return batch


class _StandIn:
    """In place of an iterator with workers that is not in use where the replay ends."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._sampler_iter = iter(loader._index_sampler)
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item()  # the seed of the workers
        self._loader = loader
        self._num_yielded = self._num_ahead = 0
        for _ in range((loader.prefetch_factor or 2) * loader.num_workers):
            self._look_ahead()

    def _look_ahead(self) -> None:
        if next(self._sampler_iter, None) is not None:
            self._num_ahead += 1

    def _next_index(self) -> None:
        if self._num_ahead == 0:
            raise StopIteration
        self._num_ahead -= 1
        self._look_ahead()

    def __iter__(self) -> "_StandIn":
        return self

    def __next__(self) -> Any:
        return _BaseDataLoaderIter.__next__(cast(Any, self))  # the patched one

    def __len__(self) -> int:
        return len(self._loader)


def _try_next(function: Callable[[Any], Any], iterator: Any, session: Session | None) -> tuple[bool, Any]:
    try:
        if session is None:
            return True, function(iterator)
        with session.outside():
            return True, function(iterator)
    except StopIteration:
        return False, None


def _has_values(form: Any) -> bool:
    """Whether an outline holds numbers or texts: each would be a descriptor of its own."""
    if isinstance(form, tuple) and form and form[0] == "value":
        return form[1] is not None
    return isinstance(form, tuple) and any(_has_values(one) for one in form if isinstance(one, tuple))


def _num_uses(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata))


def _bytes(state: Tensor) -> bytes:
    return bytes(state.numpy())


def _weakly(value: Any) -> Callable[[], Any]:
    try:
        return ref(value)
    except TypeError:  # a list, or a class with slots
        return lambda: value
