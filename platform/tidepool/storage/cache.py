"""A node's cache of folders by digest, shared by all of its processes: each is fetched once, whoever asks first.

    <root>/<digest>/            a whole folder; it is never changed
    <root>/.filling-<digest>/   one that is being filled or removed
    <root>/.locks/<digest>      locked by the one process that looks, fills or removes; holds its pid
    <root>/.uses/<digest>       locked (shared) by those that use the folder; its time is that of the last use

Invariants:
- A folder is there whole or not at all, after SIGKILL and after a power cut: it is filled under another name, synced and
  then renamed, and to be removed it is renamed first.
- Of all processes that ask for a digest at once, one fills and the others wait. The locks are the kernel's (`flock`): those
  of a process that dies, however it dies, are free at once, and one of those that wait clears up and fills anew.
- A folder that a process was given stays until that process calls `release` as often, or ends.
- Before a folder is filled, those that nobody uses are removed, used longest ago first, until it fits the limit and the disk.
  So the cache holds no more than its limit, or what is in use (folders filled at the same moment do not count one another).

The two small lock files of a digest stay for good. A process that is stopped, not dead, while it fills holds up those that
wait for the same digest; their log names it. The root must be on a local file system of the node.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tidepool.errors import SpecError
from tidepool.storage.disk import disk_full, local_disk

CACHE_VARIABLE = "TIDEPOOL_CACHE"
LIMIT_VARIABLE = "TIDEPOOL_CACHE_GB"
_REMEDY = f"set {CACHE_VARIABLE} to a folder on a larger disk"
_FILLING = ".filling-"
_logger = logging.getLogger(__name__)
_held: dict[Path, list[int]] = {}
"""The descriptors that keep folders in use, of this process."""


def cached_folder(root: Path, digest: str, size_bytes: Callable[[], int], fill: Callable[[Path], None]) -> Path:
    """`root/digest`, in use by this process; if it is not there, `fill` is called with an empty folder to put it in.

    `size_bytes` tells what `fill` will write, and is called before it. Nothing is left if `fill` raises. Raises `DiskError`,
    `SpecError`, and what the two raise.
    """
    target = root / digest
    with local_disk(root, _REMEDY):
        for folder in (root / ".locks", root / ".uses"):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(root, digest):
            if not target.is_dir():
                _fill(root, digest, size_bytes(), fill)
            _hold(root, digest)
    return target


def release(folder: Path) -> None:
    """Say that this process no longer uses a folder it was given; files that it has open stay readable. Others are ignored."""
    descriptors = _held.get(folder, [])
    if descriptors:
        os.close(descriptors.pop())


def cache_limit_bytes(root: Path) -> int:
    """What a cache may hold: `TIDEPOOL_CACHE_GB` (10^9 bytes), else half of its disk. Raises `SpecError`."""
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return shutil.disk_usage(root).total // 2
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise SpecError(f"{LIMIT_VARIABLE} is {text!r}: set it to a number of gigabytes above 0, or leave it out (half of the disk).")
    return limit


def _fill(root: Path, digest: str, size_bytes: int, fill: Callable[[Path], None]) -> None:
    temporary = root / f"{_FILLING}{digest}"
    shutil.rmtree(temporary, ignore_errors=True)  # of one that died
    free = _make_room(root, digest, size_bytes, cache_limit_bytes(root))
    if free < size_bytes:
        raise disk_full(root, _REMEDY, size_bytes)
    temporary.mkdir()
    try:
        fill(temporary)
        _sync_below(temporary)
        temporary.rename(root / digest)
        _sync(root)
    except BaseException:  # also of an interrupt: what cannot be finished must not lie around
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _make_room(root: Path, digest: str, size_bytes: int, limit_bytes: int) -> int:
    """Remove what nobody uses, used longest ago first, until `size_bytes` more fit limit and disk; returns the free bytes."""
    for path in root.glob(f"{_FILLING}*"):
        if (other := path.name.removeprefix(_FILLING)) != digest:
            _remove(root, other)  # unless its filler lives
    entries = sorted(_entries(root), key=lambda entry: entry.used_at)
    total = sum(entry.size_bytes for entry in entries)
    for entry in entries:
        if total + size_bytes <= limit_bytes and size_bytes <= shutil.disk_usage(root).free:
            break
        if _remove(root, entry.digest):
            _logger.info("removed %s from the cache %s: used longest ago", entry.digest[:12], root)
            total -= entry.size_bytes
    return shutil.disk_usage(root).free


def _remove(root: Path, digest: str) -> bool:
    """Remove a folder, whole or not, unless a process uses or fills it; returns whether it is gone."""
    locks = [_open(root / kind / digest) for kind in (".locks", ".uses")]
    try:
        for lock in locks:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary = root / f"{_FILLING}{digest}"
        shutil.rmtree(temporary, ignore_errors=True)
        if (root / digest).is_dir():
            (root / digest).rename(temporary)
            shutil.rmtree(temporary, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        for lock in locks:
            os.close(lock)
    return True


@dataclass(frozen=True)
class _Entry:
    digest: str
    size_bytes: int
    used_at: float


def _entries(root: Path) -> Iterator[_Entry]:
    for path in root.glob("[!.]*"):
        try:
            size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            yield _Entry(path.name, size_bytes, (root / ".uses" / path.name).stat().st_mtime)
        except FileNotFoundError:  # another process removed it, or it is none of ours
            continue


@contextmanager
def _locked(root: Path, digest: str) -> Iterator[None]:
    """Hold the digest's lock; a wait for another process is logged with its pid."""
    lock = _open(root / ".locks" / digest)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if pid := os.pread(lock, 32, 0).decode():
                _logger.info("waiting for process %s, which fetches %s into %s", pid, digest[:12], root)
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
        os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def _hold(root: Path, digest: str) -> None:
    """Mark a folder as used by this process. Only whoever holds the digest's lock may exclude users, so this never waits."""
    use = _open(root / ".uses" / digest)
    fcntl.flock(use, fcntl.LOCK_SH)
    os.utime(use)
    _held.setdefault(root / digest, []).append(use)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _sync_below(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
