"""Temporary folders of this machine that do not outlive their process for long, however it ends.

A process that is killed cannot remove its folder, and a worker's may hold gigabytes. So the name holds the process's id, and
whoever makes the next one removes those whose process is gone.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

import psutil

_NAME = re.compile(r"tidepool-[a-z]+-(\d+)-[a-z0-9_]+")


def scratch_folder(purpose: str) -> "tempfile.TemporaryDirectory[str]":
    """A new folder `tidepool-<purpose>-<pid>-...` below the system's folder for temporary files, removed with its context."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    return tempfile.TemporaryDirectory(prefix=f"tidepool-{purpose}-{os.getpid()}-")


def _remove_abandoned(parent: Path) -> None:
    for path in parent.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)  # another process may do the same at the same moment
