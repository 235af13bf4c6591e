"""Reading a prepared dataset by sample number.

Invariants:
- `read` gives the samples asked for, in the order asked for, whatever the cache holds.
- At most `cache_row_groups` decoded row groups are kept (the least recently used goes first), and the footers of a few shards.
- No shard is opened before one of its samples is asked for: counts come from the manifest.
- Threads may read at the same time; what several of them need is fetched once.

A `Dataset` holds the store's sockets: each process makes its own. Which samples to read is decided by `order`.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np

from tidepool.data.manifest import BYTES_PER_TOKEN, DatasetInfo, SplitName
from tidepool.data.order import Layout
from tidepool.data.packing import Samples
from tidepool.data.shards import ShardReader
from tidepool.storage import ObjectStore

_MAX_OPEN_SHARDS = 64
_ValueT = TypeVar("_ValueT")


class Dataset:
    """One split of a prepared dataset."""

    def __init__(self, store: ObjectStore, info: DatasetInfo, split: SplitName, cache_row_groups: int) -> None:
        assert cache_row_groups >= 1, cache_row_groups
        self._store, self._info, self._shards = store, info, info.splits[split].shards
        self._readers: _Recent[ShardReader] = _Recent(_MAX_OPEN_SHARDS, self._open_shard)
        self._row_groups: _Recent[Samples] = _Recent(cache_row_groups, self._read_row_group)
        self.layout: Layout = info.layout(split)
        """How the samples are stored, for `order.sample_at`."""

    @property
    def sample_bytes(self) -> int:
        """What a sample takes in memory."""
        return self._info.sequence_length * BYTES_PER_TOKEN

    def __len__(self) -> int:
        return self.layout.num_samples

    def read(self, indices: Sequence[int]) -> Samples:
        """The samples of these numbers, N of them. Raises `IndexError`, `DataError` (missing or damaged), `StoreError`."""
        shape = (len(indices), self._info.sequence_length)
        result = Samples(np.empty(shape, np.int32), np.empty(shape, np.bool_), np.empty(shape, np.int32))
        for row in sorted(range(len(indices)), key=lambda one: indices[one]):  # so that no row group is fetched twice
            index = indices[row]
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} is not one of {len(self)}")
            number, offset = divmod(index, self.layout.row_group_size)
            group = self._row_groups[number]
            result.tokens_NT[row] = group.tokens_NT[offset]
            result.loss_mask_NT[row] = group.loss_mask_NT[offset]
            result.documents_NT[row] = group.documents_NT[offset]
        return result

    def _read_row_group(self, number: int) -> Samples:
        shard, row_group = divmod(number, self._info.row_groups_per_shard)
        return self._readers[shard].read(row_group)

    def _open_shard(self, number: int) -> ShardReader:
        return ShardReader(self._store, self._info, self._shards[number])


class _Recent(Generic[_ValueT]):
    """The values most recently used, at most `size` of them, by number; one that several threads ask for is made once."""

    def __init__(self, size: int, make: Callable[[int], _ValueT]) -> None:
        self._size, self._make = size, make
        self._values: OrderedDict[int, Future[_ValueT]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> _ValueT:
        with self._lock:
            value = self._values.get(number)
            is_known = value is not None
            if value is None:
                while len(self._values) >= self._size:
                    self._values.popitem(last=False)
                value = self._values[number] = Future()
            self._values.move_to_end(number)
        if not is_known:
            self._fill(number, value)
        return value.result()

    def _fill(self, number: int, value: "Future[_ValueT]") -> None:
        try:
            value.set_result(self._make(number))
        except BaseException as error:  # noqa: BLE001  whatever it is, the threads that wait for this value must wake up
            with self._lock:
                if self._values.get(number) is value:  # the next one who asks tries again
                    del self._values[number]
            value.set_exception(error)
