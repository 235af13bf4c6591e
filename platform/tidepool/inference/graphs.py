"""Decoding steps recorded once and replayed: a GPU then runs a whole forward pass at one call of the host's.

A step of decoding rows is filled up to the next recorded size with rows that write into a block of nobody's and read from it. All sizes
share the same memory for inputs, and a graph's output lies where it was when it was recorded: it is used before the next replay.

What records is given: CUDA, or `Rerun`, with which all but the recording itself runs on a CPU.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidepool.inference.attention import Cache, Ragged
from tidepool.inference.transfer import upload

MAX_ROWS = 512
"""Larger steps are computed without a graph: there what the host does for a step is a small part of it."""
Forward = Callable[[Ragged], Tensor]
"""A forward pass over rows that all decode; returns the logits of each."""


class Recording(Protocol):
    """Some work on fixed memory, done again at each call; returns where its result lies."""

    def __call__(self) -> Tensor: ...


Record = Callable[[Callable[[], Tensor]], Recording]


class Rerun:
    """No recording at all: the work itself, again, into the same memory."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self._work, self._output = work, work()

    def __call__(self) -> Tensor:
        return self._output.copy_(self._work())


class CudaGraph:
    """A recording of CUDA's, with its results in a pool of memory."""

    def __init__(self, pool: Any, work: Callable[[], Tensor]) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # compiles kernels and chooses algorithms, which cannot be recorded
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = work()

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._output


def cuda_graphs() -> Record:
    """What makes recordings that share one pool, so that the output of only one of them is good at a time."""
    return partial(CudaGraph, torch.cuda.graph_pool_handle())


class DecodeGraphs:
    """Recordings of `forward` for up to `max_rows` rows of up to `num_columns` blocks. The cache's last block must be nobody's."""

    def __init__(self, forward: Forward, cache: Cache, max_rows: int, num_columns: int, record: Record) -> None:
        device, max_rows = cache.keys[0].device, min(max_rows, MAX_ROWS)
        self._cache, self._num_columns = cache, num_columns
        self._free_block = len(cache.keys[0]) // cache.block_size - 1
        self.sizes = sorted(graph_sizes(max_rows))
        self._tokens_1T, self._positions_1T = torch.zeros(2, 1, max_rows, dtype=torch.long, device=device)
        self._places_T = torch.full((max_rows,), self._free_block * cache.block_size, device=device)
        self._lengths_T = torch.ones(max_rows, dtype=torch.int32, device=device)
        self._blocks_TN = torch.full((max_rows, num_columns), self._free_block, dtype=torch.int32, device=device)
        self._recordings: dict[int, Recording] = {}
        for size in reversed(self.sizes):  # the largest first: the others find room in its memory
            self._recordings[size] = record(partial(forward, self._rows(size)))

    def can_run(self, ragged: Ragged) -> bool:
        """Whether all of a step decodes, and there are few enough of it."""
        return not ragged.pieces and ragged.num_decoding <= self.sizes[-1] and ragged.blocks_DN.shape[1] <= self._num_columns

    def run(self, ragged: Ragged, fill_in: Callable[[Tensor], None]) -> Tensor:
        """The logits of all rows, good until the next call. `fill_in` completes the tokens (1, T) on the device."""
        num = ragged.num_decoding
        size = next(size for size in self.sizes if size >= num)
        device = self._places_T.device
        for static, given, filler in (
            (self._tokens_1T[0], ragged.tokens_1T[0], 0),
            (self._positions_1T[0], ragged.positions_1T[0], 0),
            (self._places_T, ragged.places_T, self._free_block * self._cache.block_size),
            (self._lengths_T, ragged.lengths_D, 1),
        ):
            static[:size].copy_(upload(pad(given, (0, size - num), value=filler), device))
        blocks_DN = pad(ragged.blocks_DN, (0, 0, 0, size - num), value=self._free_block)
        self._blocks_TN[:size, : blocks_DN.shape[1]].copy_(upload(blocks_DN, device))
        fill_in(self._tokens_1T)
        return self._recordings[size]()[:num]

    def _rows(self, size: int) -> Ragged:
        return Ragged(
            self._cache,
            self._tokens_1T[:, :size],
            self._positions_1T[:, :size],
            self._places_T[:size],
            self._lengths_T[:size],
            self._blocks_TN[:size],
            [],
        )


def graph_sizes(max_rows: int) -> Iterator[int]:
    """Numbers of rows that are recorded: the step to the next one wastes little."""
    yield from (size for size in (1, 2, 4, 8) if size < max_rows)
    yield from range(16, max_rows, 16)
    yield max_rows
