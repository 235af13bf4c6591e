"""A part of a run's state, copied to host memory while the next step is computed.

The copy is laid out as the bytes of a safetensors file, so that nothing is left to do but to put them into a store. Memory is
used again for the next snapshot, and pinned where the state lies on a GPU; there the copy runs on a stream of its own.
"""

import json
import mmap
import sys
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tidepool.openmp import end_workers

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
_SLACK = 2**16


class Snapshot:
    """Named tensors in host memory. `begin`, then `settle` before they change, then `data`; then `begin` again."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._laid_out: list[tuple[str, torch.dtype, torch.Size]] = []
        self._views: list[Tensor] = []
        self._num_bytes = 0
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | Future[None] | None = None

    def begin(self, tensors: Mapping[str, Tensor], executor: Executor) -> None:
        """Begin to copy `tensors`: on their GPU if one is on a GPU, else in a thread of `executor`."""
        sources = dict(sorted(tensors.items(), key=lambda one: (-one[1].element_size(), one[0])))  # as safetensors wants them aligned
        device = next((source.device for source in sources.values() if source.is_cuda), None)
        self._lay_out(sources, is_pinned=device is not None)
        values = list(sources.values())
        if device is None:
            self._copied = executor.submit(_copy_aside, self._views, values)
            return
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            _copy(self._views, values)
            self._copied = self._stream.record_event()

    def settle(self) -> None:
        """Return when the tensors may change: on a GPU, when what is given to the current stream comes after the copy."""
        if isinstance(self._copied, Future):
            self._copied.result()
        elif self._copied is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def data(self) -> memoryview:
        """The file's bytes, once the copy is done; valid until `begin` is called again."""
        if isinstance(self._copied, Future):
            self._copied.result()
        elif self._copied is not None:
            self._copied.synchronize()
        return memoryview(self._buffer.numpy())[: self._num_bytes]  # type: ignore[arg-type]

    def _lay_out(self, sources: Mapping[str, Tensor], is_pinned: bool) -> None:
        wanted = [(name, source.dtype, source.shape) for name, source in sources.items()]
        if wanted == self._laid_out:
            return
        header: dict[str, Any] = {}
        end = 0
        for name, source in sources.items():
            start, end = end, end + source.numel() * source.element_size()
            header[name] = {"dtype": _DTYPES[source.dtype], "shape": list(source.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        first = 8 + len(text)
        self._num_bytes = first + end
        if self._num_bytes > self._buffer.numel():
            self._buffer = _allocate(self._num_bytes + _SLACK, is_pinned)
        self._buffer[:first] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._views = [
            self._buffer[first + header[name]["data_offsets"][0] : first + header[name]["data_offsets"][1]]
            .view(source.dtype)
            .view(source.shape)
            for name, source in sources.items()
        ]
        self._laid_out = wanted


def _allocate(num_bytes: int, is_pinned: bool) -> Tensor:
    """Host memory from the start of a page, as a disk takes it; in large pages where there are some, which are soon there."""
    if is_pinned or sys.platform != "linux":
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _copy(views: list[Tensor], sources: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(views, sources, non_blocking=True)


def _copy_aside(views: list[Tensor], sources: list[Tensor]) -> None:
    """In a thread that will compute nothing until the next copy."""
    try:
        _copy(views, sources)
    finally:
        end_workers()


def divide(sizes_bytes: Mapping[str, int], num_parts: int) -> list[list[str]]:
    """Names in `num_parts` parts of about the same size: the largest first, each to the part that has least."""
    parts: list[list[str]] = [[] for _ in range(num_parts)]
    filled = [0] * num_parts
    for name, size in sorted(sizes_bytes.items(), key=lambda one: (-one[1], one[0])):
        least = filled.index(min(filled))
        parts[least].append(name)
        filled[least] += size
    return parts
