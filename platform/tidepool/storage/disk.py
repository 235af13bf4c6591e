"""The local disk of a machine when it is full: one error that says which folder, how much is free, and what to do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tidepool.errors import DiskError, TidepoolError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def local_disk(folder: Path, remedy: str) -> Iterator[None]:
    """Maps a disk without room, or one that must not be written, to `DiskError`; `remedy` says how to use another folder."""
    try:
        yield
    except Exception as error:  # each library that writes has a type of its own for this; everything else goes on as it is
        if isinstance(error, TidepoolError):
            raise
        if _is_full(error):
            raise disk_full(folder, remedy) from error
        if isinstance(error, OSError) and error.errno in _FORBIDDEN:
            raise DiskError(
                f"{error.filename or folder} cannot be written ({error.strerror}): give this user access, or {remedy}."
            ) from error
        raise


def disk_full(folder: Path, remedy: str, needed_bytes: int | None = None) -> DiskError:
    """The error for a folder whose disk has no room (for `needed_bytes`, if that is known)."""
    usage = shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists()))
    needed = "" if needed_bytes is None else f", {needed_bytes / 1e6:,.1f} MB are needed"
    return DiskError(
        f"The disk of {folder} on this machine is full: {usage.free / 1e6:,.1f} MB of {usage.total / 1e6:,.1f} MB are free{needed}. "
        f"Make room there, or {remedy}. What was committed or published is safe."
    )


def _is_full(error: Exception) -> bool:
    """Libraries written in Rust (safetensors, tokenizers) say the number in their text alone."""
    return getattr(error, "errno", None) in _FULL or any(f"(os error {number})" in str(error) for number in _FULL)
