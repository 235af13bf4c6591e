"""How long a worker computes for a logical shard, without what it waits for.

On a GPU the time is the device's own, between two events in its stream: the host, which runs ahead, does not wait for it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ShardClock:
    """Measures the shards of one step after the other."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._spent_s, self._num_shards = 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """The block computes one shard."""
        if self._is_gpu:
            begin: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._spent_s += time.perf_counter() - started
            self._num_shards += 1

    def take(self) -> float:
        """Seconds per shard since the last call, 0 if there was none. On a GPU all that was computed must be done."""
        if self._is_gpu:
            self._spent_s = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._num_shards = len(self._events)
            self._events.clear()
        shard_s = self._spent_s / self._num_shards if self._num_shards else 0.0
        self._spent_s, self._num_shards = 0.0, 0
        return shard_s
