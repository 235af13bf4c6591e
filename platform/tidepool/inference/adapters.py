"""The adapters that requests may use, in host memory: read from folders while the engine computes, dropped when they are idle.

Tiers: an object store and a node's disk, from which folders come; host memory, here; and the slots that a step computes with (`slots`),
which are filled from here. An adapter that has a slot, or a request, is here too.

Invariants:
- Everything here runs in the event loop; files are read and matrices packed in threads of their own, once for everybody who waits.
- What was read whole comes in; then the least recently used ones without a request go, as memory asks.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tidepool.errors import EngineBusyError, ModelError
from tidepool.inference.lora import PackedAdapter
from tidepool.openmp import end_workers

_NUM_READERS = 4
"""So many folders are read at a time: one on a slow disk does not hold up the others."""


class Adapters:
    """Up to `limit_bytes` of them. `is_used` tells whether a request needs an adapter, `forgotten` hears which have gone."""

    def __init__(
        self,
        read: Callable[[Path], PackedAdapter],
        limit_bytes: int,
        is_used: Callable[[str], bool],
        forgotten: Callable[[str], None],
    ) -> None:
        self._read, self._limit_bytes, self._is_used, self._forgotten = read, limit_bytes, is_used, forgotten
        self._packed: OrderedDict[str, PackedAdapter] = OrderedDict()  # the least recently used one first
        self._leaving: set[str] = set()  # those that only requests in flight use
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="adapters")

    @property
    def digests(self) -> tuple[str, ...]:
        """Those that new requests may use, the least recently used one first."""
        return tuple(digest for digest in self._packed if digest not in self._leaving)

    def __contains__(self, digest: str) -> bool:
        return digest in self._packed and digest not in self._leaving

    def __getitem__(self, digest: str) -> PackedAdapter:
        return self._packed[digest]

    def touch(self, digest: str) -> None:
        """It is used now."""
        self._packed.move_to_end(digest)

    async def load(self, digest: str, folder: Path) -> None:
        """Read an adapter that is not here; the reading goes on whether or not the caller does.

        Raises `ModelError` if it cannot be read, `EngineBusyError` if the memory is full of adapters that are used.
        """
        if digest in self._packed:
            self._leaving.discard(digest)
            self.touch(digest)
            return
        if digest not in self._loads:
            self._loads[digest] = asyncio.get_running_loop().create_task(self._load(digest, folder))
        await asyncio.shield(self._loads[digest])

    def leave(self, digest: str) -> None:
        """New requests cannot use it, unless it is loaded again before it is forgotten."""
        if digest in self._packed:
            self._leaving.add(digest)

    def is_leaving(self, digest: str) -> bool:
        """Whether it has neither been forgotten nor loaded again."""
        return digest in self._leaving

    def forget(self, digest: str) -> None:
        """An adapter that nobody uses is gone."""
        del self._packed[digest]
        self._leaving.discard(digest)
        self._forgotten(digest)

    async def close(self) -> None:
        """Wait for what is being read."""
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        self._threads.shutdown()

    async def _load(self, digest: str, folder: Path) -> None:
        try:
            packed = await asyncio.get_running_loop().run_in_executor(self._threads, self._read_once, folder)
            self._make_room(packed.size_bytes)
            self._packed[digest] = packed
        finally:
            del self._loads[digest]

    def _read_once(self, folder: Path) -> PackedAdapter:
        try:
            return self._read(folder)
        finally:
            end_workers()

    def _make_room(self, size_bytes: int) -> None:
        if size_bytes > self._limit_bytes:
            raise ModelError(
                f"The adapter takes {size_bytes / 1e9:.3g} GB, and adapters may take {self._limit_bytes / 1e9:.3g} GB of memory together: "
                "raise engine.adapters_gb."
            )
        free_bytes = self._limit_bytes - sum(one.size_bytes for one in self._packed.values())
        going = []
        for digest, packed in self._packed.items():
            if free_bytes >= size_bytes:
                break
            if not self._is_used(digest):
                going.append(digest)
                free_bytes += packed.size_bytes
        if free_bytes < size_bytes:
            raise EngineBusyError(
                f"The {len(self._packed)} adapters of this engine are in use and fill {self._limit_bytes / 1e9:.3g} GB. Try again later, "
                "or raise engine.adapters_gb."
            )
        for digest in going:
            self.forget(digest)
