"""Writes past the page cache: the same bytes whatever the memory, the size and the file system."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest

from tidepool.errors import StoreFullError
from tidepool.storage import open_store

SIZES = [2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 4097]


def aligned(size: int) -> memoryview:
    memory = memoryview(mmap.mmap(-1, size))
    memory[:] = os.urandom(size)
    return memory


class Kernel:
    """Notes the size of each direct write; fails them with `error` from the n-th on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.error, self.num_good = 0, 10**6
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor: int, data: memoryview) -> int:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        if len(self.sizes) == self.num_good:
            raise OSError(self.error, os.strerror(self.error))
        self.sizes.append(self._write(descriptor, data[: 2**20]))
        return self.sizes[-1]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


@pytest.mark.parametrize("size", SIZES)
def test_whole_blocks_go_past_the_page_cache_and_the_rest_follows(tmp_path: Path, kernel: Kernel, size: int) -> None:
    data, store = aligned(size), open_store(tmp_path.as_uri())
    store.put_if_absent("k", data)
    assert store.get("k") == bytes(data)
    assert sum(kernel.sizes) == (size // 4096 * 4096 if size >= 2**20 else 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_good", [0, 1])
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT])
def test_where_such_writes_are_refused_the_same_bytes_arrive(tmp_path: Path, kernel: Kernel, size: int, num_good: int, error: int) -> None:
    kernel.error, kernel.num_good = error, num_good
    data, store = aligned(size), open_store(tmp_path.as_uri())
    store.put_if_absent("k", data)
    assert store.get("k") == bytes(data)


@pytest.mark.parametrize("offset", [1, 64, 512])
def test_memory_that_is_not_aligned_is_written_all_the_same(tmp_path: Path, offset: int) -> None:
    data, store = aligned(2**21)[offset:], open_store(tmp_path.as_uri())
    store.put_if_absent("k", data)
    assert store.get("k") == bytes(data)


def test_a_disk_that_fills_up_in_the_middle_is_told_and_nothing_is_left(tmp_path: Path, kernel: Kernel) -> None:
    kernel.error, kernel.num_good = errno.ENOSPC, 1
    with pytest.raises(StoreFullError):
        open_store(tmp_path.as_uri()).put_if_absent("k", aligned(2**21))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
