"""The samples of the next steps, read while the current one computes.

Invariants:
- What `take` gives for a step and a shard are the samples of that shard at that step, whatever was read ahead and whatever is
  asked for: (step, shard) decides which samples they are (see `batch`). So there is no state to save or to restore.
- Of what nobody has taken yet, at most `max_bytes` are held (one step's shards at least), read or being read.
- An error comes out of the `take` that needs the data, and only if it is needed.
- When `close` has returned, no thread is left.

Several threads read, because a store answers after a while and many at a time. One thread, the step loop's, calls this.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Generic, TypeVar

_ValueT = TypeVar("_ValueT")
Key = tuple[int, int]
"""A step and a shard, both counted from 0."""

_NUM_READERS = 8
_MAX_STEPS = 64
_FIRST_STEPS, _AT_A_TIME = 2, 2
_MAX_BYTES = 64 * 2**20


class Prefetch(Generic[_ValueT]):
    """Reads shards with `read`, of `shard_bytes` each, as far ahead of the steps as the bounds allow."""

    def __init__(self, read: Callable[[int, int], _ValueT], shard_bytes: int, max_bytes: int = _MAX_BYTES) -> None:
        self._read, self._max_shards = read, max_bytes // shard_bytes
        self._readers: ThreadPoolExecutor | None = None
        self._ahead: dict[Key, Future[_ValueT]] = {}
        self._left: Iterator[Key] = iter(())
        self._most = 0
        self.waited_s = 0.0
        """How long `take` has waited for data, all in all."""

    def plan(self, steps: range, shards: Sequence[int]) -> None:
        """Begin to read these shards of these steps, in the order in which they will be asked for; replaces an earlier plan.

        What was read for that one and is wanted still is kept; reads under way that are not are left to end by themselves.
        """
        if self._readers is None:
            self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="prefetch")
        wanted = ((step, shard) for step in steps for shard in shards)
        self._most = max(len(shards), min(self._max_shards, _MAX_STEPS * len(shards)))
        window = list(islice(wanted, self._most))
        kept = {key: self._ahead.pop(key) for key in window if key in self._ahead}
        for reading in self._ahead.values():
            reading.cancel()
        self._ahead, self._left = kept, chain([key for key in window if key not in kept], wanted)
        # The rest comes as these are taken: a quorum that changes has better to do at once than to read for minutes ahead.
        self._read_on(_FIRST_STEPS * len(shards))

    def take(self, step: int, shard: int) -> _ValueT:
        """The samples of a shard of a step. One that was not planned, or that was taken before, is read now. Raises what `read` raises."""
        started = time.monotonic()
        reading = self._ahead.pop((step, shard), None)
        if reading is None:
            samples = self._read(step, shard)
        else:
            is_ready = reading.done()
            self._read_on(_AT_A_TIME)
            samples = reading.result()
            if is_ready:
                return samples
        self.waited_s += time.monotonic() - started
        return samples

    def close(self) -> None:
        """Drop what was read ahead, and wait for the reads that are under way."""
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)
        self._readers, self._ahead, self._left = None, {}, iter(())

    def _read_on(self, num_more: int) -> None:
        assert self._readers is not None
        for key in islice(self._left, min(num_more, self._most - len(self._ahead))):
            self._ahead[key] = self._readers.submit(self._read, *key)
