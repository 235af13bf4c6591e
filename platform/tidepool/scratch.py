"""Temporary folders of this machine that do not outlive their process for long, however it ends.

A process that is killed cannot remove its folder, and a worker's may hold gigabytes. So each process holds a lock (flock) on
the folders that it has, and whoever makes the next one removes those that nobody holds.
"""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_PREFIX = "tidepool-scratch-"
_YOUNG_S = 60.0
"""Nobody holds a folder in the moment between its making and its locking."""


class ScratchFolder:
    """A new folder at `name`, below the system's folder for temporary files; removed at the end of its context or by `cleanup`."""

    def __init__(self, purpose: str) -> None:
        _remove_abandoned(Path(tempfile.gettempdir()))
        self._folder = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{purpose}-")
        self.name = self._folder.name
        descriptor = os.open(self.name, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        self._unlock = weakref.finalize(self, os.close, descriptor)

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Remove the folder now."""
        self._folder.cleanup()
        self._unlock()


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it is another user's, or goes at this moment by another hand
            if time.time() - path.stat().st_mtime > _YOUNG_S and not _is_held(path):
                shutil.rmtree(path)


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
