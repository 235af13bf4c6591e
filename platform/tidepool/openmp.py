"""OpenMP's worker threads, of which each thread that computes on a CPU has some of its own."""

import ctypes
import os
import re
from functools import cache
from pathlib import Path

_GNU = re.compile(r"/\S*/libgomp[^/\s]*\.so\S*")
_SOFT = 1


def end_workers() -> None:
    """End the workers of the calling thread; it gets new ones when it needs them.

    While a process has more of them than cores, GNU's library lets none of them wait actively, and each operation of whoever computes
    begins by waking one up: 80 us, where one that is awake begins within 2. A thread that has computed once, to load a model or to copy
    one, would cost the engine's own, or the step loop's, that much for each operation from then on. Nothing is done where torch has
    another library.
    """
    for library in _libraries():
        library.omp_pause_resource_all(_SOFT)


@cache
def _libraries() -> list[ctypes.CDLL]:
    """Those that torch has brought into the process."""
    maps = Path("/proc/self/maps")
    paths = set(_GNU.findall(maps.read_text())) if maps.is_file() else set()
    found = [ctypes.CDLL(path, mode=os.RTLD_NOLOAD | ctypes.DEFAULT_MODE) for path in sorted(paths)]
    return [library for library in found if hasattr(library, "omp_pause_resource_all")]
