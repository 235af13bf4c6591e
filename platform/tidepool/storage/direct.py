"""Large writes from memory straight to the disk, past the page cache, where the file system lets us.

The page cache would copy every byte, on a processor that others train on, into memory that they could use, and keep it for a reader
who seldom comes. What is written is on the disk only after the caller's fsync, as ever.
"""

import errno
import os
import sys
from io import BufferedWriter

_MIN_BYTES = 2**20
"""Less is not worth it."""
_BLOCK_BYTES = 4096
_WRITE_BYTES = 64 * 2**20
_UNFIT = (errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT)
"""What the kernel says to a file system without such writes, to memory that is not aligned, and to a driver's memory."""


def write_all(file: BufferedWriter, data: bytes | memoryview) -> None:
    """Write `data` into an empty file. Raises `OSError`."""
    view = memoryview(data).cast("B")
    if len(view) >= _MIN_BYTES:
        file.seek(_write_blocks(file.fileno(), view[: len(view) // _BLOCK_BYTES * _BLOCK_BYTES]))
    file.write(view[file.tell() :])


def _write_blocks(descriptor: int, blocks: memoryview) -> int:
    """Write whole blocks past the page cache; returns how many bytes it took, fewer where the file system or the memory is not fit."""
    if sys.platform != "linux":
        return 0
    import fcntl

    flags, written = fcntl.fcntl(descriptor, fcntl.F_GETFL), 0
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while written < len(blocks):
            written += os.write(descriptor, blocks[written : written + _WRITE_BYTES])
    except OSError as error:
        if error.errno not in _UNFIT:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return written
